"""The figure of bench_scaling: a step over its product against each axis, and rows per second of growing fleets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from core.bench import TABLE
from core.results import read
from reports.collect import Cell
from reports.looks import BLACK, line, log_axis, look, save

CURVES = "scaling.parquet"
OURS = look("BatchTopK")  # what is timed
LABELS = {"dict_size": "dictionary size m", "k": "active latents per row k", "batch_size": "rows in the batch B"}


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """One figure for each cell that has curves."""
    written: list[Path] = []
    for cell in cells:
        if (cell.folder / CURVES).is_file():
            notes = (read(cell.folder / TABLE) or {"notes": []})["notes"]
            figure = curves(pd.read_parquet(cell.folder / CURVES), notes)
            written += save(figure, folder / f"bench_scaling_{cell.scale}_{cell.folder.name}")
    return written


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
