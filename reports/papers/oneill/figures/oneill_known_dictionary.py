"""The figures of oneill_known_dictionary: fig. 3 of O'Neill et al. 2025, and the effect of ITO's start.

For each penalty: MCC against steps and FLOPs, with what converged solvers reach, and every run's final value. And ITO
from different starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import in_order
from reports.papers.oneill.curves import read_curves, total_flops
from reports.papers.oneill.figures.common import (
    CONVERGED,
    MODES,
    SPREAD,
    bands,
    ceilings,
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

MAIN = ("SAE", "MLP32", "MLP256", "ITO")
STARTS = ("ITO", "ITO from -2", "ITO warm", "ITO warm floor")
CLAIM_OF_L1 = {0.01: "oneill/dictionary-1", 0.05: "oneill/dictionary-2"}


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """Two figures for each penalty at which there is an SAE, and one of the starts at the smallest of them."""
    penalties = sorted({cell.get("coder.l1") for cell in cells if cell.method == "SAE"})
    for l1 in penalties:
        own = [cell for cell in cells if cell.get("coder.l1") == l1]
        name = f"oneill_known_dictionary_{cells[0].scale}"
        yield Drawing(f"{name}_l1_{l1:g}_curves", own, partial(curves, l1=l1))
        yield Drawing(f"{name}_l1_{l1:g}_runs", own, partial(runs, l1=l1))
        if l1 == penalties[0]:
            yield Drawing(f"{name}_starts", own, partial(starts, l1=l1))


def table_at(cells: Sequence[Cell], l1: float) -> pd.DataFrame:
    """The cells' curves at one penalty."""
    table = read_curves(cells)
    return table[table["coder.l1"] == l1] if len(table) else table


def curves(own: Sequence[Cell], l1: float) -> Figure | None:
    """Latent MCC over steps, and over FLOPs in both countings, training and one inference."""
    cells = one_data_set(own)
    table = table_at(cells, l1)
    methods = [method for method in MAIN if method in set(table["coder.name"])]
    if not methods:
        return None
    paper = cells[0].scale == "paper"
    figure = Figure(figsize=(10.5, 4.1), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, mode in zip(panels, (None, *MODES), strict=True):
        axes.set_xscale("linear" if mode is None else "log")
        shown = table if mode is None else table.assign(flops=total_flops(table, mode))
        bands(axes, shown, "step" if mode is None else "flops", "latent_mcc", methods)
        axes.set_xlabel("steps, or iterations of ITO" if mode is None else MODES[mode])
        ceilings(axes, cells, named=mode is None)
        chance(axes, cells, "latent_mcc")
        if mode is not None:
            sae_level(axes, cells, "latent_mcc")
            crossing_at(axes, cells, f"mean_crossing_flops_{mode}", "ITO", 0.2)
        if paper and l1 in CLAIM_OF_L1:
            references(axes, published(CLAIM_OF_L1[l1]), methods)
    same_range(panels[1:])
    panels[0].set_ylabel("latent MCC, held-out samples")
    legend(figure, methods, paper)
    figure.suptitle(
        f"Known dictionary, {sizes_of(cells)}, penalty {l1:g}, {cells[0].scale} scale, {seeds_of(cells)}", fontsize=10
    )
    return figure


def starts(own: Sequence[Cell], l1: float) -> Figure | None:
    """ITO from log-codes of -10, of -2, and from the SAE's codes: the start causes the delay."""
    cells = one_data_set(own)
    table = table_at(cells, l1)
    methods = [method for method in STARTS if method in set(table["coder.name"])]
    if len(methods) < 2:
        return None
    figure = Figure(figsize=(7.2, 4.1), layout="constrained")
    axes = figure.subplots()
    bands(axes, table, "step", "latent_mcc", methods)
    ceilings(axes, cells)
    axes.set_xlabel("iterations")
    axes.set_ylabel("latent MCC, held-out samples")
    legend(figure, methods, with_published=False)
    setting = f"{sizes_of(cells)}, penalty {l1:g}, {cells[0].scale} scale"
    figure.suptitle(f"Starts of ITO, {setting}\n{seeds_of(cells)}", fontsize=10)
    return figure


def runs(cells: Sequence[Cell], l1: float) -> Figure | None:
    """Final values run by run."""
    methods = in_order(cell.method for cell in cells if not str(cell.method).startswith(CONVERGED))
    if not methods:
        return None
    figure = Figure(figsize=(1.8 + 1.15 * len(methods), 3.6), layout="constrained")
    axes = figure.subplots()
    spread(axes, cells, "latent_mcc", methods)
    axes.set_ylabel("final latent MCC")
    figure.suptitle(f"Known dictionary, penalty {l1:g}, {cells[0].scale} scale\n{SPREAD}", fontsize=9)
    return figure
