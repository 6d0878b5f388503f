"""The figures of leask_stitching, for each language model, site and method.

latents        for each pair of sizes, the largest cosine of a latent with the small dictionary, by class, and dMSE
interpolation  for each pair of sizes, error, L0 and loss on the way from the small dictionary to the large one
grown          error and L0 of the dictionary grown by novel latents, beside those of the family
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.figures.groups import by_model
from reports.looks import BLACK, GREY, PALE, log_axis, shades
from reports.side_files import Kind, SideTable

LATENTS = SideTable("latents.parquet", {"class": "text", "cosine": "number", "delta_mse": "number"})
ERRORS: dict[str, Kind] = {"mse": "number", "mse_refit": "number", "l0": "number"}
INTERPOLATION = SideTable(
    "interpolation.parquet", {"path": "text", "phase": "text", "point": "filled", **ERRORS}, {"ce": "number"}
)
FRANKENSTEIN = SideTable("frankenstein.parquet", {"kind": "text", "n_latents": "filled", **ERRORS})
PAPER_THRESHOLD = 0.7
PANELS = {"mse": "MSE over that of the small", "l0": "L0 (active latents)", "ce": "loss (nats per token)"}
NOVEL, RECONSTRUCTION = shades(2)
PAPER, DATA, PARENTS = shades(3)
WAYS = {
    "paper": (PAPER, "similar from cosine 0.7 on"),
    "data": (DATA, "similar from the best cosine on"),
    "parents": (PARENTS, "each with the most similar one only"),
}
MAX_COLUMNS = 7


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """Three figures for each model, site and method; a figure without cells is left out."""
    for model, name, group in by_model(cells, "method"):
        pairs = sorted((cell for cell in group if cell.get("part") == "pair"), key=_place)[:MAX_COLUMNS]
        for kind, of, make in (
            ("latents", pairs, latents),
            ("interpolation", pairs, interpolations),
            ("grown", group, grown),
        ):
            yield Drawing(f"leask_stitching_{name}_{kind}", of, partial(make, title=f"{model}, held-out text"))


def _place(cell: Cell) -> tuple[int, float]:
    """Sorts pairs by seed, then by the error of the small dictionary, the largest first: that is by its size."""
    return cell.seed, -cell.metrics.get("mse_small", 0.0)


def _name(cell: Cell) -> str:
    sizes = [cell.get(f"{which}.dict_size") or _last(cell.get(f"{which}.path")) for which in ("small", "large")]
    return f"{sizes[0]} to {sizes[1]}"


def _last(path: Any) -> str:
    return str(path or "?").rstrip("/").rpartition("/")[2].rpartition("_")[2]


def _columns(n: int, n_rows: int, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(4.4, 3.0 * n + 0.8), height), layout="constrained")
    return figure, figure.subplots(n_rows, n, sharex="col", squeeze=False)


def latents(cells: Sequence[Cell], title: str) -> Figure | None:
    """Above, histograms of the largest cosine of latents that lower the error and of those that do not; below, dMSE."""
    tables = [(cell, table) for cell in cells if (table := LATENTS.beside(cell)) is not None]
    if not tables:
        return None
    figure, axes = _columns(len(tables), 2, 5.4)
    bins = np.linspace(0, 1, 41)
    for (above, below), (cell, table) in zip(axes.T, tables, strict=True):
        alive = table[table["class"] != "dead"]
        novel = alive["delta_mse"] < 0
        for chosen, colour, label in (
            (novel, NOVEL, "novel: lowers the error"),
            (~novel, RECONSTRUCTION, "reconstruction"),
        ):
            above.hist(alive.loc[chosen, "cosine"], bins=bins, color=colour, alpha=0.65, label=label)
            below.scatter(alive.loc[chosen, "cosine"], alive.loc[chosen, "delta_mse"], s=4, color=colour, linewidths=0)
        for panel in (above, below):
            panel.axvline(PAPER_THRESHOLD, color=BLACK, linewidth=1, linestyle="--", label="paper's threshold")
            if best := cell.metrics.get("threshold_best"):
                panel.axvline(best, color=GREY, linewidth=1, linestyle=":", label="best on these latents")
        spread = float(alive["delta_mse"].abs().quantile(0.5)) or 1e-9
        below.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(spread)))  # a power of 10, so that ticks are apart
        below.axhline(0, color=BLACK, linewidth=0.8)
        below.set_xlabel("largest cosine with the small dictionary")
        auc = f", AUC {cell.metrics['auc']:.3f}" if "auc" in cell.metrics else ""
        above.set_title(f"{_name(cell)}{auc}", fontsize=9)
    axes[0, 0].set_ylabel("latents")
    axes[1, 0].set_ylabel("change of MSE by inserting")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def interpolations(cells: Sequence[Cell], title: str) -> Figure | None:
    """Rows: error, L0, loss. The first third of the steps inserts, the second swaps, the last removes."""
    tables = [(cell, table) for cell in cells if (table := INTERPOLATION.beside(cell)) is not None]
    if not tables:
        return None
    figure, axes = _columns(len(tables), len(PANELS), 6.6)
    for panel, label in zip(axes[:, 0], PANELS.values(), strict=True):
        panel.set_ylabel(label)
    for column, (cell, table) in zip(axes.T, tables, strict=True):
        for panel, metric in zip(column, PANELS, strict=True):
            for way, (colour, words) in WAYS.items():
                if (table["path"] == way).any():
                    _way(panel, table[table["path"] == way], metric, colour, words)
        column[0].set_title(_name(cell), fontsize=9)
        column[-1].set_xlabel("step: insert | swap | remove")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _way(axes: Axes, table: pd.DataFrame, metric: str, colour: str, label: str) -> None:
    start = table["mse"].iloc[0] if metric == "mse" else 1.0
    axes.plot(table["point"], table[metric] / start, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    if metric == "mse":
        refit = table["mse_refit"] / start
        axes.plot(table["point"], refit, color=colour, linestyle=":", linewidth=1.2, label="with its best decoder bias")
    for phase in ("insert", "swap"):
        last = table.loc[table["phase"] == phase, "point"].max()
        axes.axvline(last, color=PALE, linewidth=0.8, zorder=0)


def grown(cells: Sequence[Cell], title: str) -> Figure | None:
    """Error and L0 over the number of latents, of the family and of what is grown from it; a line for each family."""
    tables = [table for cell in cells if (table := FRANKENSTEIN.beside(cell)) is not None]
    if not tables:
        return None
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric, label in zip(panels, ("mse", "l0"), ("MSE", "L0 (active latents)"), strict=True):
        for table in tables:
            for kind, colour, words in (("family", BLACK, "trained"), ("grown", NOVEL, "grown by novel latents")):
                name = words if table is tables[0] else None
                chosen = table[table["kind"] == kind]
                axes.plot(chosen["n_latents"], chosen[metric], color=colour, marker="o", linewidth=1.5, label=name)
                if metric == "mse" and kind == "grown":
                    name = name and "grown, with its best decoder bias"
                    axes.plot(chosen["n_latents"], chosen["mse_refit"], color=RECONSTRUCTION, marker=".", label=name)
        axes.set_ylabel(label)
        sizes = pd.concat(tables)
        log_axis(axes, sizes.loc[sizes["kind"] == "family", "n_latents"], "latents")
    panels[0].legend()
    figure.suptitle(title, fontsize=10)
    return figure
