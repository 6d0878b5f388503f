"""Stitching dictionaries of different sizes (Leask et al. 2025, section on stitching, and their post of 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis.evaluate import evaluate_dictionary
from core.analysis.frankenstein import frankenstein
from core.analysis.stitch_path import (
    Curve,
    StitchPath,
    insertion,
    insertion_in_order,
    interpolation,
    losses_along,
    lowest,
    walk,
)
from core.analysis.stitching import (
    CLASSES,
    DEAD,
    NOVEL,
    PAPER_THRESHOLD,
    RECONSTRUCTION,
    UNDECIDED,
    Components,
    LatentScores,
    Nearest,
    check_pair,
    components,
    error_and_bias,
    nearest,
    parents,
    predict_novel,
    score_latents,
)
from core.atomic import write_table
from core.building import plain
from core.errors import UserError
from core.fleet import Request
from core.methods.dictionary import Dictionary
from core.methods.stitched import Stitched
from core.preflight import check_method
from experiments.common import held_out, is_loaded, reference_losses, requests, trained
from experiments.leask.settings import StitchingSettings

SETTINGS = StitchingSettings
LATENTS, INTERPOLATION, INSERTION, FRANKENSTEIN = (
    f"{name}.parquet" for name in ("latents", "interpolation", "insertion", "frankenstein")
)


def check(cfg: DictConfig) -> None:
    """Raises UserError for members that cannot be, and without rows to measure the loss on."""
    for name, node in named_members(cfg).items():
        check_method(node, name)
    if cfg.evaluation.n_downstream_rows < 1:
        raise UserError("evaluation.n_downstream_rows: 0 must be 1 or more: stitching measures losses along its paths.")


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell: the two of a pair, or the family."""
    return requests(cfg, *members(cfg))


def members(cfg: DictConfig) -> list[dict[str, Any]]:
    """The `method` nodes of the cell's pair or family."""
    return list(named_members(cfg).values())


def named_members(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The `method` nodes of the cell by name: for each member of the pair or family, `method` with its settings.
    Raises UserError unless there are two or more, all different."""
    chosen = [("small", cfg.small), ("large", cfg.large)] if cfg.part == "pair" else []
    chosen += [(f"family[{i}]", node) for i, node in enumerate(cfg.family[: cfg.family_size] if not chosen else ())]
    method = plain(cfg.method)
    nodes: dict[str, dict[str, Any]] = {}
    for name, settings in chosen:
        own = {key: value for key, value in plain(settings).items() if value is not None}
        if unknown := own.keys() - method.keys():
            raise UserError(f"{name}.{sorted(unknown)[0]}: the method has no such setting.")
        nodes[name] = {**method, **own}
    made = list(nodes.values())
    if len(made) < 2 or any(node in made[:i] for i, node in enumerate(made)):
        keys = "small and large" if cfg.part == "pair" else "family"
        words = f"{keys}: stitching needs two dictionaries or more, each different from the others."
        how = " Set small.path and large.path, or the path of each in family." if is_loaded(method) else ""
        raise UserError(f"{words}{how}")
    return nodes


def run(cfg: DictConfig) -> dict[str, float]:
    """Stitch two neighbours of a family (`part: pair`), or grow its smallest member (`part: frankenstein`).

    Claims: leask/stitching-1 to -4.
    """
    family = [trained(cfg, node) for node in members(cfg)]
    Path(cfg.cell_folder).mkdir(parents=True, exist_ok=True)
    return run_pair(cfg, family[0], family[1]) if cfg.part == "pair" else run_frankenstein(cfg, family)


def activations(cfg: DictConfig) -> Iterator[Tensor]:
    """Raw activations `[B, d]` of the held-out rows, `stitch.rows_per_block` rows at a time. Beginnings of text and the
    first position of a row are left out: their activations are unlike all others."""
    text, size = held_out(cfg), cfg.stitch.rows_per_block
    for start in range(0, len(text.rows), size):
        here = slice(start, start + size)
        kept = ~text.starts[here]
        kept[:, 0] = False
        yield text.activations(here)[kept]


# ---- a pair


def run_pair(cfg: DictConfig, small: Dictionary, large: Dictionary) -> dict[str, float]:
    """Score every latent of the large dictionary, predict the scores from decoder rows, insert sets, interpolate."""
    check_pair(small, large)
    s, folder = cfg.stitch, Path(cfg.cell_folder)
    scores = score_latents(small, large, activations(cfg), s.n_blocks)
    if scores.dead.all():
        raise UserError("No latent of the large dictionary fires on the held-out text: is it made for this site?")
    near = nearest(small, large)
    low, high = scores.interval(cfg.seed, s.confidence, s.n_resamples)
    classes = scores.classes(cfg.seed, s.confidence, s.n_resamples)
    save_latents(folder / LATENTS, scores, near, classes, low, high)

    graphs = {"paper": components(small, large, PAPER_THRESHOLD)}
    paths = {
        **{f"insert_{name}": insertion(chosen.cpu(), small.dict_size) for name, chosen in sets(scores, near, classes)},
        "order": insertion_in_order(near.cosine.cpu(), ~scores.dead.cpu(), small.dict_size, s.insertion_steps),
        "paper": interpolation(near, graphs["paper"], s.steps_per_phase),
    }
    curves = walk(small, large, activations(cfg), paths)
    save_curves(folder / INSERTION, {"order": paths["order"]}, curves, {"order": near})
    from_data = lowest(paths["order"], curves["order"], near.cosine.cpu())
    graphs["data"] = components(small, large, from_data)
    graphs["parents"] = parents(near, small.dict_size, from_data)
    later = {key: interpolation(near, graphs[key], s.steps_per_phase) for key in ("data", "parents")}
    paths, curves = paths | later, curves | walk(small, large, activations(cfg), later)
    losses = {key: losses_along(small, large, paths[key], held_out(cfg)) for key in graphs}
    refit = {key: losses_along(small, large, paths[key], held_out(cfg), curves[key].shift) for key in graphs}
    save_curves(folder / INTERPOLATION, {key: paths[key] for key in graphs}, curves, losses=losses, refit=refit)

    clean = reference_losses(cfg).clean
    metrics = {**scores.metrics(), **of_classes(scores, near, classes)}
    metrics |= {"ce_clean": clean, "ce_small": float(losses["paper"][0]), "ce_large": float(losses["paper"][-1])}
    metrics |= {"ce_small_refit": float(refit["paper"][0]), "ce_large_refit": float(refit["paper"][-1])}
    start = float(curves["paper"].mse[0])
    for key, curve in curves.items():
        if key.startswith("insert_"):
            metrics[f"{key}_mse_ratio"] = float(curve.mse[1]) / start
    metrics["threshold_insertion"] = from_data
    metrics["insert_in_order_lowest_mse_ratio"] = float(curves["order"].mse.min()) / start
    metrics["insert_in_order_highest_mse_ratio"] = float(curves["order"].mse.max()) / start
    for key, graph in graphs.items():
        metrics |= {f"interpolation_{key}_{k}": v for k, v in of_path(scores, paths[key], curves[key], graph).items()}
    return metrics


def sets(scores: LatentScores, near: Nearest, classes: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Sets of latents of the large dictionary that are inserted at once: by the sign of the score, as in the paper; by
    a sign that is certain; and by the cosine alone."""
    lowers = (scores.delta_mse < 0) & ~scores.dead
    below = (near.cosine < PAPER_THRESHOLD) & ~scores.dead
    yield "novel", lowers
    yield "reconstruction", ~lowers & ~scores.dead
    yield "surely_novel", classes == NOVEL
    yield "surely_reconstruction", classes == RECONSTRUCTION
    yield "below_paper_threshold", below
    yield "above_paper_threshold", ~below & ~scores.dead


def of_classes(scores: LatentScores, near: Nearest, classes: Tensor) -> dict[str, float]:
    """Shares of the classes, and how well the cosine predicts them. Shares are of the latents that are not dead."""
    alive = ~scores.dead
    n_alive = int(alive.sum())
    shares = {name: int((classes == i).sum()) / n_alive for i, name in enumerate(CLASSES) if i != DEAD}
    metrics = {
        "dead_fraction": 1 - n_alive / len(alive),
        "novel_fraction": int((scores.delta_mse[alive] < 0).sum()) / n_alive,
        "surely_novel_fraction": shares["novel"],
        "surely_reconstruction_fraction": shares["reconstruction"],
        "undecided_fraction": shares["undecided"],
        "below_paper_threshold_fraction": int((near.cosine[alive] < PAPER_THRESHOLD).sum()) / n_alive,
        "cosine_median": float(near.cosine[alive].median()),
    }
    decided = alive & (classes != UNDECIDED)
    for name, chosen in (("", alive), ("_decided", decided)):
        if prediction := predict_novel(near.cosine[chosen], scores.delta_mse[chosen]):
            metrics[f"auc{name}"] = prediction.auc
            metrics[f"spearman{name}"] = prediction.spearman
            metrics[f"threshold_best{name}"] = prediction.threshold
            metrics[f"balanced_accuracy_best{name}"] = prediction.balanced_accuracy
            metrics[f"balanced_accuracy_paper{name}"] = prediction.balanced_accuracy_paper
    return metrics


def of_path(scores: LatentScores, path: StitchPath, curve: Curve, graph: Components) -> dict[str, float]:
    """An interpolation in numbers. Ratios are to the small dictionary's error or L0. `largest_rise` is the largest rise
    of the error above its lowest value so far, along the phases `insert` and `swap`."""
    mse, l0, ends = curve.mse, curve.l0, scores.metrics()
    inserted = path.phases.count("insert")
    swapped = inserted + path.phases.count("swap")
    until_swapped = mse[: swapped + 1]
    return {
        "mse_after_insert_ratio": float(mse[inserted] / mse[0]),
        "mse_after_swap_ratio": float(mse[swapped] / mse[0]),
        "mse_end_ratio": float(mse[-1] / mse[0]),
        "largest_rise": float(((until_swapped - until_swapped.cummin(0).values) / mse[0]).max()),
        "falling_share": float((until_swapped.diff() < 0).double().mean()),
        "largest_rise_refit": float(
            (curve.mse_refit - curve.mse_refit.cummin(0).values)[: swapped + 1].max() / curve.mse_refit[0]
        ),
        "l0_after_insert_ratio": float(l0[inserted] / l0[0]),
        "l0_end_ratio": float(l0[-1] / l0[0]),
        "start_gap": abs(float(mse[0]) / ends["mse_small"] - 1),
        "end_gap": abs(float(mse[-1]) / ends["mse_large"] - 1),
        "n_components": float(graph.paired.sum()),
        "largest_component": float(graph.sizes[graph.paired].max()) if graph.paired.any() else 0.0,
        "large_without_partner": float((~graph.paired[graph.large]).sum()),
        "small_without_partner": float((~graph.paired[graph.small]).sum()),
    }


def save_latents(path: Path, scores: LatentScores, near: Nearest, classes: Tensor, low: Tensor, high: Tensor) -> None:
    """One row for each latent of the large dictionary."""
    columns = {
        "frequency": scores.fired.double() / scores.total_rows,
        "delta_mse": scores.delta_mse,
        "delta_mse_low": low,
        "delta_mse_high": high,
        "cosine": near.cosine,
        "partner": near.partner,
    }
    table = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    table["class"] = [CLASSES[i] for i in classes.tolist()]
    write_table(table.rename_axis("latent").reset_index(), path)


def save_curves(
    path: Path,
    paths: Mapping[str, StitchPath],
    curves: Mapping[str, Curve],
    nears: Mapping[str, Nearest] | None = None,
    losses: Mapping[str, Tensor] | None = None,
    refit: Mapping[str, Tensor] | None = None,
) -> None:
    """One row for each point of each path. `nears` adds the largest cosine inserted so far; `losses` and `refit` add
    the language model's loss, with the path's own and with the best decoder biases."""
    tables = []
    for key, stitch_path in paths.items():
        curve = curves[key]
        columns: dict[str, Any] = {
            "path": key,
            "point": range(stitch_path.n_steps + 1),
            "phase": ["start", *stitch_path.phases],
            "n_latents": stitch_path.n_latents,
            "mse": curve.mse,
            "mse_refit": curve.mse_refit,
            "l0": curve.l0,
        }
        for name, by_path in (("ce", losses), ("ce_refit", refit)):
            if by_path is not None:
                columns[name] = by_path[key]
        if nears is not None:
            cosine = nears[key].cosine.cpu().double()
            largest = torch.full((stitch_path.n_steps + 2,), -torch.inf, dtype=torch.float64)
            columns["cosine"] = largest.scatter_reduce(0, stitch_path.comes, cosine, "amax").cummax(0).values[:-1]
        tables.append(pd.DataFrame({k: v.numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}))
    write_table(pd.concat(tables, ignore_index=True), path)


# ---- a family


def run_frankenstein(cfg: DictConfig, family: list[Dictionary]) -> dict[str, float]:
    """Grow the smallest dictionary by the novel latents of each larger one; compare with dictionaries of equal size."""
    s, batches = cfg.stitch, partial(activations, cfg)
    grown = frankenstein(family, batches, cfg.seed, s.frankenstein_below, s.n_blocks)
    ordered = sorted(family, key=lambda method: method.dict_size)
    rows = [row_of(cfg, "family", method) for method in ordered] + [row_of(cfg, "grown", m) for m in grown[1:]]
    table = pd.DataFrame(rows)
    write_table(table, Path(cfg.cell_folder) / FRANKENSTEIN)
    return of_family(table)


def row_of(cfg: DictConfig, kind: str, method: Dictionary) -> dict[str, Any]:
    """Error, L0 and loss of one dictionary, unchanged and with its best decoder bias (`_refit`); the encoder stays."""
    error, b_dec = error_and_bias(method, activations(cfg))
    refit = Stitched.of([(method, torch.ones(method.dict_size, dtype=torch.bool))], b_dec)
    losses = {"ce": spliced_loss(cfg, method), "ce_refit": spliced_loss(cfg, refit)}
    return {"kind": kind, "n_latents": method.dict_size, **error._asdict(), **losses}


def of_family(table: pd.DataFrame) -> dict[str, float]:
    """Metrics of the last grown dictionary. Then a comparison at equal size, over the grown dictionaries no larger than
    the family's largest: the mean ratio of error and L0, interpolated between two of the family in logarithms."""
    family, grown = (table[table["kind"] == kind] for kind in ("family", "grown"))
    last = grown.iloc[-1]
    names = ("n_latents", "mse", "mse_refit", "l0", "ce", "ce_refit")
    metrics = {f"grown_{name}": float(last[name]) for name in names}
    metrics |= {f"largest_{name}": float(family.iloc[-1][name]) for name in names}
    within = grown[grown["n_latents"] <= family["n_latents"].max()]
    metrics["n_grown_within_family"] = float(len(within))
    if len(within):
        for name in ("mse", "mse_refit", "l0"):
            same = np.interp(np.log(within["n_latents"]), np.log(family["n_latents"]), np.log(family[name]))
            metrics[f"grown_{name}_over_same_size"] = float(np.exp(np.log(within[name]) - same).mean())
        for name in ("ce", "ce_refit"):
            same = np.interp(np.log(within["n_latents"]), np.log(family["n_latents"]), family[name])
            metrics[f"grown_{name}_minus_same_size"] = float((within[name] - same).mean())
    return metrics


def spliced_loss(cfg: DictConfig, method: Dictionary) -> float:
    """Nats per token with the dictionary's reconstruction at all positions."""
    first = held_out(cfg).first(cfg.evaluation.n_downstream_rows)
    return evaluate_dictionary(method, first).metrics()["ce_spliced"]
