"""The figure of bench_scaling: a step over its product against each axis, and rows per second of growing fleets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import BLACK, line, log_axis, look
from reports.side_files import SideTable, listing

CURVES = SideTable(
    "scaling.parquet",
    {"axis": "text", "value": "number"},
    dict.fromkeys(("over_product", "quartile1", "quartile3", "rows_per_second"), "number"),
)
OURS = look("BatchTopK")  # what is timed
LABELS = {"dict_size": "dictionary size m", "k": "active latents per row k", "batch_size": "rows in the batch B"}


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure for each cell that has curves."""
    for cell in cells:
        yield Drawing(f"bench_scaling_{cell.scale}_{cell.folder.name}", [cell], of_cell)


def of_cell(cells: Sequence[Cell]) -> Figure | None:
    """The figure of one cell."""
    [cell] = cells
    table, notes = CURVES.beside(cell), listing(cell)
    return None if table is None else curves(table, notes.notes if notes else [])


def curves(table: pd.DataFrame, notes: Sequence[str]) -> Figure:
    """Three panels of steps over products with their quartiles, and one panel of fleets."""
    figure = Figure(figsize=(8.2, 5.8), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for axes, (axis, label) in zip(panels, LABELS.items(), strict=False):
        points = table[table["axis"] == axis].sort_values("value")
        spread = [
            (points["over_product"] - points["quartile1"]).clip(lower=0),
            (points["quartile3"] - points["over_product"]).clip(lower=0),
        ]
        line(axes, OURS, list(points["value"]), list(points["over_product"]), np.array(spread))
        axes.set_ylim(0, 1.1 * points["quartile3"].max())
        axes.set_ylabel("step over encoder product")
        axes.axhline(1, color=BLACK, linewidth=0.9, linestyle="--")
        log_axis(axes, list(points["value"]), label)
    fleets = table[table["axis"] == "n_dictionaries"].sort_values("value")
    panels[-1].plot(fleets["value"], fleets["rows_per_second"], marker=OURS.marker, color=OURS.colour)
    panels[-1].set_ylim(0, 1.1 * fleets["rows_per_second"].max())
    panels[-1].set_ylabel("rows/s, summed over dictionaries")
    log_axis(panels[-1], list(fleets["value"]), "dictionaries in the fleet")
    figure.suptitle("\n".join(notes), fontsize=7)
    return figure
