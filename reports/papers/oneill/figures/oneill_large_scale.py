"""The figure of oneill_large_scale: correlation with the true codes against steps and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.looks import in_order, save
from reports.papers.oneill.curves import read_curves
from reports.papers.oneill.figures.common import MODES, bands, legend, level, seeds_of, sizes_of

ORACLE = "FISTA"


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Curves of the encoders. The oracle is not trained, and is a horizontal line."""
    trained = [cell for cell in cells if cell.method != ORACLE]
    oracle = [cell.metrics["latent_mcc"] for cell in cells if cell.method == ORACLE]
    figure = curves(trained, read_curves(trained), oracle) if trained else None
    return save(figure, folder / f"oneill_large_scale_{cells[0].scale}")


def curves(cells: Sequence[Cell], table: pd.DataFrame, oracle: Sequence[float]) -> Figure:
    """Three panels: steps, and training FLOPs in both countings."""
    methods = in_order(table["coder.name"])
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    columns = {"steps": "step", **{f"training {label}": f"train_flops_{mode}" for mode, label in MODES.items()}}
    for axes, (label, x) in zip(panels, columns.items(), strict=True):
        axes.set_xscale("log")
        bands(axes, table, x, "latent_mcc", methods)
        axes.set_xlabel(label)
        for value in oracle:
            level(axes, value, f"{ORACLE}, true dictionary: {value:.3f}", below=True)
    panels[0].set_ylabel("correlation with the true codes,\nheld-out samples")
    panels[0].set_ylim(0, 1.02)
    legend(figure, methods, with_published=False)
    figure.suptitle(f"Known codes, {sizes_of(cells)}, {cells[0].scale} scale, {seeds_of(cells)}", fontsize=10)
    return figure
