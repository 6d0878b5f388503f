"""Latent Scaling of a trained crosscoder (Minder et al. 2025, sec. 2.3 and 3.1): which latents are specific."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from core.analysis.latent_scaling import MODELS, TARGETS, LatentScaling
from core.analysis.specificity import SPECIFIC, THRESHOLDS, Specificity, latent_table, mirrored
from core.atomic import write_table
from experiments.minder.analysis import Trained, specificity, the_crosscoder, training_batches
from experiments.minder.common import check, dictionaries, held_out_batches, later_dictionaries
from experiments.minder.settings import ScalingSettings

__all__ = ["SETTINGS", "check", "dictionaries", "later_dictionaries", "run"]

SETTINGS = ScalingSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """Scale every latent on training tokens, and test what that gives on held-out ones.

    Claims: minder/scaling-1 to -6.
    """
    trained = the_crosscoder(cfg)
    sums, validation = trained.scaling(training_batches(cfg)), trained.scaling(held_out_batches(cfg))
    use = trained.use(held_out_batches(cfg))
    table = latent_table(trained.decoder, sums)
    found, base_side = specificity(cfg, table), specificity(cfg, mirrored(table))
    checked = latent_table(trained.decoder, validation)
    gains = held_out_gains(trained, sums, validation, found.chosen())
    save_tables(Path(cfg.cell_folder), found, use.template_share, use.largest)
    return {
        "l0": float(use.counts.sum() / use.n_tokens.sum()),
        **class_counts(table),
        **specific_counts(found),
        **{f"{name}_of_base": value for name, value in specific_counts(base_side).items()},
        **ratios(found),
        **found.correlations(),
        **gains,
        **moved(found, checked),
    }


def class_counts(table: pd.DataFrame) -> dict[str, float]:
    """Latents by class among those that fired, and with the others."""
    alive = table[table["n_active"] > 0]
    counts = {"n_latents": len(table), "n_dead": len(table) - len(alive), "n_rare": (alive["n_active"] < 100).sum()}
    for name in ("chat_only", "base_only", "shared", "other"):
        counts[f"n_{name}"] = (alive["class"] == name).sum()
        counts[f"n_{name}_with_dead"] = (table["class"] == name).sum()
    return {name: float(n) for name, n in counts.items()}


def specific_counts(found: Specificity) -> dict[str, float]:
    """Specific latents among the compared ones, in the class, and among all; shares are of those that are judged."""
    counts = {
        "n_effective": found.effective.sum(),
        "effective_is_ranked": found.is_ranked,
        "n_judged": found.chosen().sum(),
        "n_specific": (found.chosen() & found.specific).sum(),
        "n_specific_chat_only": (found.chosen("chat_only") & found.specific).sum(),
        "n_specific_anywhere": found.specific.sum(),
    }
    for name, chosen in (("", found.chosen()), ("_chat_only", found.chosen("chat_only"))):
        if chosen.any():
            counts[f"specific_share{name}"] = found.specific[chosen].mean()
    return {name: float(value) for name, value in counts.items()}


def ratios(found: Specificity) -> dict[str, float]:
    """Medians of the ratios, their spread, and how much the compared latents overlap with shared ones."""
    values: dict[str, float | None] = {
        "overlap_share_95": found.overlap(0.95),
        "overlap_share_50": found.overlap(0.5),
        "overlap_share_95_chat_only": found.overlap(0.95, name="chat_only"),
    }
    for target in SPECIFIC:
        for name in ("effective", "shared"):
            nu = found.table[f"nu_{target}"][found.chosen(name)]
            if len(nu):
                values |= {f"nu_{target}_{name}": float(nu.median()), f"nu_{target}_{name}_90": float(nu.quantile(0.9))}
    lowest = found.ranks_of_lowest()
    if len(lowest):
        values["rank_of_lowest"] = float(lowest.mean())
    return {name: float(value) for name, value in values.items() if value is not None}


def held_out_gains(
    trained: Trained, sums: LatentScaling, validation: LatentScaling, chosen: np.ndarray
) -> dict[str, float]:
    """By how much each scaled latent, with its beta of training tokens, lowers the mean square of its targets on
    held-out tokens; over the latents chosen that fire there."""
    metrics: dict[str, float] = {}
    fitted = sums.result("chat")
    for target in TARGETS[:2]:
        gains = validation.gain(fitted, target).cpu().numpy()  # [m, 2], per row and component
        for i, model in enumerate(MODELS):
            own = gains[chosen & np.isfinite(gains[:, i]), i]
            if len(own):
                name = f"mse_gain_{target}_{model}"
                metrics |= {f"{name}_least": own.min(), f"{name}_mean": own.mean(), f"{name}_largest": own.max()}
                metrics[f"n_{name}_negative"] = (own < 0).sum()
    return {name: float(value) for name, value in metrics.items()}


def moved(found: Specificity, checked: pd.DataFrame) -> dict[str, float]:
    """How far the ratios of the compared latents are from those of held-out tokens: median and 90 % quantile."""
    metrics = {}
    chosen = found.chosen() & (checked["n_active"] > 0).to_numpy()
    for target in SPECIFIC:
        apart = (found.table[f"nu_{target}"] - checked[f"nu_{target}"])[chosen].abs()
        if len(apart):
            metrics[f"moved_nu_{target}"] = float(apart.median())
            metrics[f"moved_nu_{target}_90"] = float(apart.quantile(0.9))
    return metrics


def save_tables(folder: Path, found: Specificity, template_share: np.ndarray, largest: np.ndarray) -> None:
    """`latents.parquet`, one row each; `thresholds.parquet`, how many are specific at each; `lowest_ranks.parquet`."""
    columns = {"effective": found.effective, "judged": found.judged, "specific": found.specific}
    columns |= {"rank_sum": found.rank_sum(), "template_share": template_share, "largest": largest}
    write_table(found.table.assign(**columns).reset_index(names="latent"), folder / "latents.parquet")
    curve = pd.DataFrame({"threshold": THRESHOLDS, "n": found.counts_by_threshold()})
    write_table(curve, folder / "thresholds.parquet")
    write_table(pd.DataFrame({"rank": found.ranks_of_lowest()}), folder / "lowest_ranks.parquet")
