"""Crosscoders on two models whose concepts are known: which latents they call chat-only, and which of these are.

Every latent is matched with the concept that its decoder is nearest to. The claims of Minder et al. 2025, sec. 2 and 3,
become statements about known concepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import normalize

from core.analysis.latent_scaling import LatentScaling, Scaling, Target
from core.analysis.specificity import MIN_ACTIVE, SPECIFIC, correlation
from core.atomic import write_table
from core.fleet import Request, load_or_train
from core.kernels.codes import Codes
from core.methods.crosscoder import L1Crosscoder
from core.methods.dictionary import Dictionary
from core.metrics.crosscoder import in_class, relative_norm, twins
from core.runtime import Runtime
from core.streams.planted_pairs import PlantedPairSource
from core.synthetic.planted_pair import KINDS, PlantedPair
from experiments.common import request, requests, stored, write_record
from experiments.minder.settings import PlantedSettings

SETTINGS = PlantedSettings

MATCHED = 0.8  # cosine from which a latent stands for a concept
SHRUNK, KEPT = 0.05, 0.5  # |d_base| / |d_chat| of latents without, and with, a base decoder


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell."""
    return requests(cfg)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train one crosscoder, scale its latents, and compare them with the concepts."""
    wanted = request(cfg)
    source = cast(PlantedPairSource, wanted.source)
    crosscoder = load_or_train(wanted, Runtime.of(cfg)).cpu()
    write_record(cfg, "dictionary", stored(cfg, wanted.spec))
    x = source.held_out(cfg.n_heldout).x
    with torch.no_grad():
        codes = crosscoder.encode(x)
        x_hat = crosscoder.decode(codes)
    scaling = LatentScaling(crosscoder)
    scaling.add(x, codes)
    latents = Latents.of(crosscoder, codes, scaling, source.truth)
    write_table(latents.table(), Path(cfg.cell_folder) / "latents.parquet")
    return {
        **explained(x, x_hat),
        "l0": float(codes.l0()),
        **latents.metrics(crosscoder.W_dec.detach()),
        **shrinkage(crosscoder, x, x_hat, codes),
    }


def explained(x: Tensor, x_hat: Tensor) -> dict[str, float]:
    """Fraction of variance explained, over both models and in each; x and x_hat `[B, 2, d]`."""
    error, total = ((x - x_hat).var(0).sum(1), x.var(0).sum(1))  # [2]
    base, chat = (1 - error / total).tolist()
    return {"fve": float(1 - error.sum() / total.sum()), "fve_base": base, "fve_chat": chat}


@dataclass(frozen=True)
class Latents:
    """What is known of every latent, `[m]` each.

    delta    Delta_norm
    alive    fired on the held-out rows
    concept  the concept that it stands for; -1: none
    scaling  with the chat decoder as the probe; mirrored: with the base decoder
    """

    delta: Tensor
    alive: Tensor
    concept: Tensor
    scaling: Scaling
    mirrored: Scaling
    truth: PlantedPair

    @classmethod
    def of(cls, crosscoder: Dictionary, codes: Codes, scaling: LatentScaling, truth: PlantedPair) -> Latents:
        W = crosscoder.W_dec.detach()
        norms = torch.linalg.vector_norm(W, dim=2)
        larger = W[torch.arange(len(W)), norms.argmax(1)]  # [m, d], the decoder of the model with the larger one
        cosine, nearest = (normalize(larger, dim=1) @ truth.directions.T).max(1)
        alive = codes.fired()
        concept = nearest.where(alive & (cosine > MATCHED), -1)
        return cls(relative_norm(W), alive, concept, scaling.result("chat"), scaling.result("base"), truth)

    def of_kind(self, kind: str) -> Tensor:
        """bool `[m]`: which latents stand for a concept of this kind."""
        return self.truth.of_kind(kind)[self.concept] & (self.concept >= 0)

    @property
    def chat_only(self) -> Tensor:
        return self.alive & in_class(self.delta, "chat_only")

    @property
    def base_only(self) -> Tensor:
        return self.alive & in_class(self.delta, "base_only")

    @property
    def specific(self) -> Tensor:
        """Chat-only, and Latent Scaling agrees."""
        return self.chat_only & _low(self.scaling)

    @property
    def base_specific(self) -> Tensor:
        """Base-only, and Latent Scaling with the base decoder agrees."""
        return self.base_only & _low(self.mirrored)

    def table(self) -> pd.DataFrame:
        names = ["", *self.truth.kinds]
        return pd.DataFrame(
            {
                "delta": self.delta.numpy(),
                "nu_error": self.scaling.nu("error").numpy(),
                "nu_reconstruction": self.scaling.nu("reconstruction").numpy(),
                "n_active": self.scaling.n_active.numpy(),
                "concept": self.concept.numpy(),
                "kind": [names[concept + 1] for concept in self.concept.tolist()],
                "specific": self.specific.numpy(),
                "nu_error_of_base": self.mirrored.nu("error").numpy(),
                "nu_reconstruction_of_base": self.mirrored.nu("reconstruction").numpy(),
                "base_specific": self.base_specific.numpy(),
            }
        )

    def metrics(self, W_dec: Tensor) -> dict[str, float]:
        counts: dict[str, Any] = {
            "n_dead": (~self.alive).sum(),
            "n_chat_only": self.chat_only.sum(),
            "n_base_only": self.base_only.sum(),
            "n_shared": (self.alive & in_class(self.delta, "shared")).sum(),
            "n_specific": self.specific.sum(),
            "n_base_specific": self.base_specific.sum(),
            **{f"n_specific_{kind}": (self.specific & self.of_kind(kind)).sum() for kind in KINDS},
            "n_twins": len(twins(W_dec, self.chat_only, self.base_only)),
            "n_split": len(self._split()),
            "n_chat_concepts_found": len(self._found()),
            **{f"n_chat_only_{kind}": (self.chat_only & self.of_kind(kind)).sum() for kind in KINDS},
        }
        medians = {
            "specific_share": self._share(self.specific, self.chat_only),
            "delta_weak_base_lowest": _of(self.delta, self.of_kind("weak_base"), torch.amin),
            "delta_weak_base_highest": _of(self.delta, self.of_kind("weak_base"), torch.amax),
            **{
                f"nu_{target}_{kind}": _of(self.scaling.nu(target), self._judged(kind), torch.median)
                for target in SPECIFIC
                for kind in ("weak_base", "sometimes", "shared")
            },
            "correlation_delta_nu_error": self._correlation("error"),
            "correlation_delta_nu_reconstruction": self._correlation("reconstruction"),
        }
        return {
            **{name: float(value) for name, value in counts.items()},
            **{name: value for name, value in medians.items() if value is not None},
        }

    def _judged(self, kind: str) -> Tensor:
        """Latents of a kind whose nu has a known value: all of `weak_base`, of the others those called chat-only."""
        return self.of_kind(kind) & (self.alive if kind == "weak_base" else self.chat_only)

    def _split(self) -> set[int]:
        """`sometimes` concepts that have both a chat-only latent and a base-only one."""
        own = self.of_kind("sometimes")
        chat, base = (self.concept[own & in_class(self.delta, name)].tolist() for name in ("chat_only", "base_only"))
        return set(chat) & set(base)

    def _found(self) -> set[int]:
        """`chat_only` concepts that have a latent with Delta_norm > 0.95 and both |nu| < 0.05."""
        low = (self.scaling.nu("error").abs() < 0.05) & (self.scaling.nu("reconstruction").abs() < 0.05)
        return set(self.concept[self.of_kind("chat_only") & (self.delta > 0.95) & low].tolist())

    def _correlation(self, target: Target) -> float | None:
        """Pearson, of 1 - Delta_norm with nu, over latents with Delta_norm > 0.5 that fire often enough."""
        chosen = (self.scaling.n_active >= MIN_ACTIVE) & (self.delta > 0.5)
        return correlation(1 - self.delta[chosen], self.scaling.nu(target)[chosen])

    @staticmethod
    def _share(part: Tensor, whole: Tensor) -> float | None:
        return float(part.sum() / whole.sum()) if whole.any() else None


def _low(scaling: Scaling) -> Tensor:
    """bool `[m]`: whether both |nu| are below the paper's thresholds."""
    return torch.stack([scaling.nu(target).abs() < bound for target, bound in SPECIFIC.items()]).all(0)


def _of(values: Tensor, chosen: Tensor, statistic: Any) -> float | None:
    return float(statistic(values[chosen])) if chosen.any() else None


def shrinkage(crosscoder: Dictionary, x: Tensor, x_hat: Tensor, codes: Codes) -> dict[str, float]:
    """The condition for Complete Shrinkage: left side over right side, for latents with and without a base decoder.

    A base decoder of zero is stationary where |E[f_j u]| <= bound E[f_j], with u the base model's error over its norm
    and bound 2 mu (error=norm), or u the error and bound mu (squared). Where there is one, both sides are equal.
    """
    if not isinstance(crosscoder, L1Crosscoder) or crosscoder.settings.code_norm != "sum":
        return {}
    s = crosscoder.settings
    error = (x - x_hat)[:, 0]
    u, bound = (normalize(error, dim=1), 2 * s.l1_coefficient) if s.error == "norm" else (error, s.l1_coefficient)
    f = codes.dense()  # [B, m]
    ratio = torch.linalg.vector_norm(f.T @ u, dim=1) / (bound * f.sum(0))
    base, chat = torch.linalg.vector_norm(crosscoder.W_dec.detach(), dim=2).T
    judged = (f > 0).sum(0) >= MIN_ACTIVE
    shrunk, kept = judged & (base < SHRUNK * chat), judged & (base > KEPT * chat)
    values = {
        "shrinkage_ratio_shrunk_highest": _of(ratio, shrunk, torch.amax),
        "shrinkage_ratio_kept_median": _of(ratio, kept, torch.median),
        "shrinkage_ratio_kept_lowest": _of(ratio, kept, torch.amin),
    }
    return {name: value for name, value in values.items() if value is not None}
