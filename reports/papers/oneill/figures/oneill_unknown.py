"""The figures of oneill_unknown: fig. 4 of O'Neill et al. 2025, and more.

For each profile: MCC of latents and dictionary against steps, and against FLOPs in the paper's counting and corrected,
with the crossings of sparse coding over the SAE; every run's final value. And sparse coding from different starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import in_order, named
from reports.papers.oneill.curves import read_curves, total_flops
from reports.papers.oneill.derived import NAMES
from reports.papers.oneill.figures.common import (
    MCC,
    MODES,
    SPREAD,
    bands,
    chance,
    crossing_at,
    legend,
    one_data_set,
    published,
    references,
    sae_level,
    same_range,
    seeds_of,
    sizes_of,
    spread,
)

MAIN = ("SAE", "SAE+ITO", "MLP32", "MLP256", "SC")
STARTS = ("SAE", "SC", "SC from -2")
CLAIMS = {"latent_mcc": "oneill/unknown-1", "dict_mcc": "oneill/unknown-2"}
REPO = "repo"  # the profile of the authors' numbers


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """Curves and runs for each profile, and the starts of sparse coding."""
    for profile in sorted({str(cell.get("profile")) for cell in cells}):
        own = [cell for cell in cells if str(cell.get("profile")) == profile]
        name = f"oneill_unknown_{cells[0].scale}_{profile}"
        yield Drawing(f"{name}_curves", own, partial(curves, profile=profile))
        yield Drawing(f"{name}_runs", own, partial(runs, profile=profile))
        yield Drawing(f"{name}_starts", own, starts)


def curves(own: Sequence[Cell], profile: str) -> Figure | None:
    """Latents above, dictionary below; steps, FLOPs as published, FLOPs corrected (training and one inference)."""
    cells = one_data_set(own)
    table = read_curves(cells)
    methods = [method for method in MAIN if method in set(table["coder.name"])]
    if not methods:
        return None
    with_published = cells[0].scale == "paper" and profile == REPO
    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    for row, (metric, name) in zip(figure.subplots(2, 3, sharex="col", sharey="row"), MCC.items(), strict=True):
        row[0].set_ylabel(name)
        for axes, mode in zip(row, (None, *MODES), strict=True):
            axes.set_xscale("linear" if mode is None else "log")
            shown = table if mode is None else table.assign(flops=total_flops(table, mode))
            drawn = [
                method for method in methods if metric != "dict_mcc" or method != "SAE+ITO"
            ]  # the SAE's dictionary
            bands(axes, shown, "step" if mode is None else "flops", metric, drawn)
            chance(axes, cells, metric)
            if mode is not None:
                sae_level(axes, cells, metric)
                crossing_at(axes, cells, f"mean_{NAMES[metric]}_{mode}", "SC", 0.02)
            if with_published:
                references(axes, published(CLAIMS[metric]), methods)
            if metric == "dict_mcc":
                axes.set_xlabel("training steps" if mode is None else MODES[mode])
        same_range(row[1:])
    legend(figure, methods, with_published)
    title = f"Codes and dictionary unknown, {sizes_of(cells)}, profile {named(profile)}, {cells[0].scale} scale"
    figure.suptitle(f"{title}, {seeds_of(cells)}", fontsize=10)
    return figure


def starts(own: Sequence[Cell]) -> Figure | None:
    """Sparse coding from log-codes of -10 and of -2, beside the SAE: the start causes the delay."""
    cells = one_data_set(own)
    table = read_curves(cells)
    methods = [method for method in STARTS if method in set(table["coder.name"])]
    if not {"SC", "SC from -2"} <= set(methods):
        return None
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(1, 2), MCC.items(), strict=True):
        bands(axes, table, "step", metric, methods)
        chance(axes, cells, metric)
        axes.set_xlabel("training steps")
        axes.set_ylabel(name)
    legend(figure, methods, with_published=False)
    figure.suptitle(
        f"Starts of sparse coding, {sizes_of(cells)}, {cells[0].scale} scale\n{seeds_of(cells)}", fontsize=10
    )
    return figure


def runs(cells: Sequence[Cell], profile: str) -> Figure | None:
    """Final values run by run, latents above and dictionary below."""
    methods = in_order(cell.method for cell in cells)
    if not methods:
        return None
    figure = Figure(figsize=(2.4 + 1.15 * max(len(methods), 4), 5.6), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(2, 1), MCC.items(), strict=True):
        spread(axes, cells, metric, methods)
        chance(axes, cells, metric)
        axes.set_ylabel(f"final {name}")
    figure.suptitle(
        f"Codes and dictionary unknown, profile {named(profile)}, {cells[0].scale} scale\n{SPREAD}", fontsize=9
    )
    return figure
