"""Which latents are specific to the chat model, by decoder norms and by Latent Scaling, and whether the two agree.

nu_error and nu_reconstruction of a probe with the chat decoder (`core.analysis.latent_scaling`) are near 0 for what
only the chat model has. Delta_norm (`core.metrics.crosscoder`) is 1 for a latent without base decoder.

Source: Minder et al. 2025, sec. 2.3 and 3, and the authors' notebooks. Shapes: m latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from core.analysis.latent_scaling import MODELS, TARGETS, LatentScaling, Target
from core.metrics.crosscoder import CLASSES, in_class, relative_norm

SPECIFIC: dict[Target, float] = {"error": 0.2, "reconstruction": 0.5}  # |nu| below both: chat-specific
RANKED = (-0.1, 2.0)  # ratios that ranks are made of; both must lie in it
MIN_ACTIVE = 100  # rows in which a latent fires, for its ratios to be judged
LATENTS_PER_CHAT_ONLY = 23  # the paper's dictionary size over its chat-only latents: 73,728 / 3,176
LEAST_EFFECTIVE = 50
N_LOWEST = 100  # latents with the lowest nu whose rank by Delta_norm is looked at
THRESHOLDS = np.linspace(0, 1, 100)
Rank = Literal["delta", "rank_sum"]


def latent_table(W_dec: Tensor, scaling: LatentScaling) -> pd.DataFrame:
    """A row for each latent: `delta`, `class`, `n_active`, `beta_<probe>_<target>_<model>` and `nu_<probe>_<target>`.
    Columns of the chat probe, which the paper uses, have no probe in their names."""
    delta = relative_norm(W_dec).cpu()
    table = pd.DataFrame({"delta": delta.numpy(), "class": "other", "n_active": scaling.n_active.cpu().numpy()})
    for name in CLASSES:
        table.loc[in_class(delta, name).numpy(), "class"] = name
    for probe in ("chat", "base"):
        result, prefix = scaling.result(probe), "" if probe == "chat" else "base_probe_"
        for target in TARGETS:
            for i, model in enumerate(MODELS):
                table[f"{prefix}beta_{target}_{model}"] = result.beta[target][:, i].cpu().numpy()
                table[f"{prefix}gain_{target}_{model}"] = result.gain[target][:, i].cpu().numpy()
            table[f"{prefix}nu_{target}"] = result.nu(target).cpu().numpy()
    return table


def mirrored(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it would be with the two models exchanged: Delta_norm from the other side, and the ratios of the
    base probe. So what is said of chat-only latents is said of base-only ones."""
    other = {"chat_only": "base_only", "base_only": "chat_only"}
    columns = {"delta": 1 - table["delta"], "class": table["class"].replace(other), "n_active": table["n_active"]}
    return pd.DataFrame(columns | {f"nu_{target}": table[f"base_probe_nu_{target}"] for target in TARGETS})


@dataclass(frozen=True, eq=False)
class Specificity:
    """
    table      of `latent_table`
    effective  bool `[m]`: the latents that are compared
    is_ranked  why these: True for those with the highest Delta_norm, False for the class chat-only
    """

    table: pd.DataFrame
    effective: np.ndarray
    is_ranked: bool

    @classmethod
    def of(cls, table: pd.DataFrame, n: int | None, by_class: bool) -> Specificity:
        """The effective set among latents that fired: the class chat-only if `by_class` is true and it is not empty,
        else the n with the highest Delta_norm (None: `default_size`)."""
        alive = (table["n_active"] > 0).to_numpy()
        chat_only = alive & (table["class"] == "chat_only").to_numpy()
        if by_class and chat_only.any():
            return cls(table, chat_only, False)
        order = np.argsort(-table["delta"].where(alive, -1).fillna(-1).to_numpy(), kind="stable")
        effective = np.zeros(len(table), dtype=bool)
        effective[order[: default_size(len(table)) if n is None else n]] = True
        return cls(table, effective & alive, True)

    @property
    def judged(self) -> np.ndarray:
        """bool `[m]`: latents that fire often enough for a ratio of their own."""
        return (self.table["n_active"] >= MIN_ACTIVE).to_numpy() & np.isfinite(self._nu()).all(0)

    def _nu(self) -> np.ndarray:
        return self.table[[f"nu_{target}" for target in SPECIFIC]].to_numpy().T  # [2, m]

    @property
    def specific(self) -> np.ndarray:
        """bool `[m]`: chat-specific by both ratios, whatever Delta_norm says; only latents that are judged."""
        bounds = np.array(list(SPECIFIC.values()))[:, None]
        with np.errstate(invalid="ignore"):
            return self.judged & (np.abs(self._nu()) < bounds).all(0)

    def chosen(self, name: str = "effective") -> np.ndarray:
        """bool `[m]`: judged latents of the effective set, or of a class."""
        return self.judged & (self.effective if name == "effective" else (self.table["class"] == name).to_numpy())

    @property
    def ranked(self) -> np.ndarray:
        """bool `[m]`: the effective set without ratios that are out of range: what is ranked, and patched in halves."""
        low, high = RANKED
        with np.errstate(invalid="ignore"):
            return self.chosen() & ((self._nu() >= low) & (self._nu() <= high)).all(0)

    def rank_sum(self) -> np.ndarray:
        """`[m]`: rank(nu_reconstruction) + rank(nu_error) among `ranked`, 2 for the lowest of both; NaN elsewhere."""
        total = np.full(len(self.table), np.nan)
        if self.ranked.any():
            total[self.ranked] = stats.rankdata(self._nu()[:, self.ranked], axis=1).sum(0)
        return total

    def scores(self, rank: Rank) -> Tensor:
        """`[m]`, higher for what should matter more."""
        values = self.table["delta"].to_numpy(copy=True) if rank == "delta" else -self.rank_sum()
        return torch.from_numpy(values)

    def counts_by_threshold(self) -> np.ndarray:
        """`[100]`: judged latents of the effective set with both |nu| below each of `THRESHOLDS`."""
        nu = np.abs(self._nu()[:, self.chosen()]).max(0, initial=0)
        return (nu[None] < THRESHOLDS[:, None]).sum(1)

    def overlap(self, central: float, target: Target = "reconstruction", name: str = "effective") -> float | None:
        """The share of the latents whose nu lies in the central part of that of shared latents (empirical quantiles);
        None if there are none of either kind."""
        nu, shared = self.table[f"nu_{target}"][self.chosen(name)], self.table[f"nu_{target}"][self.chosen("shared")]
        if nu.empty or shared.empty:
            return None
        low, high = np.quantile(shared, [(1 - central) / 2, (1 + central) / 2])
        return float(nu.between(low, high).mean())

    def correlations(self) -> dict[str, float]:
        """Over `ranked`, where there are three latents or more and both vary. 1 - Delta_norm with each nu, so that
        agreement is positive; Spearman of Delta_norm with -rank_sum; each nu with how often a latent fires."""
        of = self.table[self.ranked]
        found = {"spearman_delta_rank_sum": correlation(of["delta"], -self.rank_sum()[self.ranked], rank=True)}
        for target in SPECIFIC:
            nu = of[f"nu_{target}"]
            found[f"correlation_delta_nu_{target}"] = correlation(1 - of["delta"], nu)
            found[f"spearman_delta_nu_{target}"] = correlation(1 - of["delta"], nu, rank=True)
            found[f"correlation_n_active_nu_{target}"] = correlation(of["n_active"], nu)
        return {name: r for name, r in found.items() if r is not None}

    def ranks_of_lowest(self) -> np.ndarray:
        """The ranks by Delta_norm, 0 for the highest, of the latents of `ranked` with the lowest rank sums; sorted. If
        the two rankings agree, these are 0, 1, 2, ..."""
        of = self.table[self.ranked]
        by_delta = stats.rankdata(-of["delta"], method="ordinal") - 1
        lowest = np.argsort(self.rank_sum()[self.ranked], kind="stable")[:N_LOWEST]
        return np.sort(by_delta[lowest])


def correlation(a: Any, b: Any, rank: bool = False) -> float | None:
    """Pearson's r, or Spearman's; None for fewer than three values, or where one of the two does not vary."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float((stats.spearmanr if rank else stats.pearsonr)(a, b).statistic)


def default_size(m: int) -> int:
    """How many latents are compared where no number is given: the paper's share of them, 50 or more."""
    return min(m, max(LEAST_EFFECTIVE, m // LATENTS_PER_CHAT_ONLY))
