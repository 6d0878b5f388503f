"""The figure of oneill_theorem: codes read by a solver and by an encoder, and the encoder's error against N - M."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from reports.collect import RUNS, Cell, one_per_folder
from reports.figures import Drawing
from reports.looks import BLACK, Look, line, look, shades
from reports.side_files import Kind, SideTable

METRICS: dict[str, Kind] = dict.fromkeys(
    ("metrics.relative_mse", "metrics.readable_share", "metrics.readable_share_expected"), "number"
)
SIZES: dict[str, Kind] = dict.fromkeys(("seed", "source.N", "source.M", "source.K"), "filled")
RUNS_TABLE = SideTable(RUNS, {"coder.name": "text", **SIZES, **METRICS})
ILLUSTRATION = SideTable("illustration.parquet", {"coder.name": "text", "true": "number", "inferred": "number"})
ENCODER, SOLVER = "L-NL", "NNLS"
OF_K = {K: Look(colour, marker) for K, colour, marker in zip((1, 2, 3), shades(3), "^os", strict=True)}


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure for each cell that has both tables."""
    for cell in one_per_folder(cells):
        yield Drawing(f"oneill_theorem_{cell.scale}_{cell.folder.name}", [cell], of_cell)


def of_cell(cells: Sequence[Cell]) -> Figure | None:
    """The figure of one cell."""
    runs, samples = RUNS_TABLE.beside(cells[0]), ILLUSTRATION.beside(cells[0])
    return None if runs is None or samples is None else figure(runs, samples)


def figure(runs: pd.DataFrame, samples: pd.DataFrame) -> Figure:
    """Three panels: codes at N 3 and M 2; error against N - M; atoms that are read exactly when they are alone."""
    drawn = Figure(figsize=(10.5, 3.6), layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    encoder = runs[(runs["coder.name"] == ENCODER) & (runs["source.M"] > 2)]
    scatter(left, samples)
    error(middle, encoder)
    readable(right, encoder)
    drawn.suptitle(f"mean and range over {encoder['seed'].nunique()} dictionaries", fontsize=8)
    return drawn


def scatter(axes: Axes, samples: pd.DataFrame) -> None:
    for name in (ENCODER, SOLVER):
        points = samples[samples["coder.name"] == name]
        size, own = (7, look(name)) if name == ENCODER else (3, look(name))
        axes.scatter(points["true"], points["inferred"], s=size, alpha=0.6, color=own.colour, label=name, linewidths=0)
    axes.set_title("N = 3, M = 2, K = 2", fontsize=9)
    axes.set_xlabel("true code")
    axes.set_ylabel("inferred code")
    axes.legend()


def error(axes: Axes, encoder: pd.DataFrame) -> None:
    for K, group in encoder.groupby("source.K"):
        points = group.groupby(group["source.N"] - group["source.M"])["metrics.relative_mse"].agg(
            ["mean", "min", "max"]
        )
        spread = [points["mean"] - points["min"], points["max"] - points["mean"]]
        line(axes, OF_K[int(str(K))], list(points.index), list(points["mean"]), np.array(spread), f"K = {K}")
    axes.axhline(0, color=BLACK, linewidth=0.9, linestyle="--", label="L0 oracle (error below 1e-12)")
    axes.set_title("trained L-NL encoder, M = 8", fontsize=9)
    axes.set_xlabel("rank deficit N - M")
    axes.set_ylabel("relative error of held-out codes")
    axes.legend()


def readable(axes: Axes, encoder: pd.DataFrame) -> None:
    one = encoder.drop_duplicates(["seed", "source.N", "source.M"])
    points = one.groupby("source.N")[["metrics.readable_share", "metrics.readable_share_expected"]].mean()
    axes.plot(points.index, points.iloc[:, 1], color=BLACK, linestyle="--", label="expected (Wendel 1962)")
    axes.plot(points.index, points.iloc[:, 0], color=shades(1)[0], marker="o", label="by linear programming")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("atoms read exactly when alone (K = 1), M = 8", fontsize=9)
    axes.set_xlabel("number of atoms N")
    axes.legend(loc="lower left")
