"""The figure of oneill_llm: normalised error and alive fraction against the measured L0, for each model and site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from core.metrics.statistics import t_interval
from reports.collect import Cell
from reports.figures.groups import by_model
from reports.figures.style import save, styled

PANELS = {"fvu": "normalised error (fvu)", "alive_fraction": "alive latents (fraction of all)"}
KNOBS = ("method.l1_coefficient", "method.l1")


class Look(NamedTuple):
    label: str
    colour: str  # from the palette of Okabe and Ito
    marker: str
    filled: bool = True


# The MLP is the same in both matched parts.
SERIES = {
    ("ReluL1", "matched_steps"): Look("SAE, equal steps", "#E69F00", "s"),
    ("ReluL1", "matched_flops"): Look("SAE, equal FLOPs", "#D55E00", "D"),
    ("MLPEncoder", "matched_steps"): Look("MLP encoder", "#0072B2", "o"),
    ("ReluL1", "paper_text"): Look("SAE as published (axis slip)", "#E69F00", "s", False),
    ("MLPEncoder", "paper_text"): Look("MLP encoder as published", "#0072B2", "o", False),
    ("LCA", "paper_text"): Look("LCA", "#009E73", "^"),
    ("ReluL1", "repo"): Look("SAE, authors' script", "#CC79A7", "s", False),
    ("MLPEncoder", "repo"): Look("MLP encoder, authors' script", "#CC79A7", "o", False),
    ("LCA", "repo"): Look("LCA, authors' script", "#CC79A7", "^", False),
}


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """One figure for each model and site, as PNG and SVG."""
    written: list[Path] = []
    with styled():
        for title, name, group in by_model(cells):
            figure = curves(group, f"{title}, held-out text, {_seeds(group)}")
            written += save(figure, folder / f"oneill_llm_{name}")
    return written


def curves(cells: Sequence[Cell], title: str) -> Figure:
    """Two panels over the measured L0; a line joins the coefficients of one series."""
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (metric, label) in zip(panels, PANELS.items(), strict=True):
        for key, look in SERIES.items():
            _line(axes, [cell for cell in cells if (cell.method, cell.get("profile")) == key], metric, look)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("measured L0 (mean active latents per token)")
        axes.set_ylabel(label)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 1.05)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _line(axes: Axes, cells: Sequence[Cell], metric: str, look: Look) -> None:
    """A point for each coefficient: the means over seeds, and the t interval of the metric."""
    points: dict[Any, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.metrics["l0_mean"] > 0:
            points[tuple(cell.get(knob) for knob in KNOBS)].append(cell)
    if not points:
        return
    drawn = sorted(
        (
            float(np.mean([cell.metrics["l0_mean"] for cell in group])),
            *_interval([cell.metrics[metric] for cell in group]),
        )
        for group in points.values()
    )
    at, mean, half = (list(column) for column in zip(*drawn, strict=True))
    axes.errorbar(
        at,
        mean,
        yerr=half,
        label=look.label,
        color=look.colour,
        marker=look.marker,
        markerfacecolor=look.colour if look.filled else "white",
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2.5,
        markersize=5.5,
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its interval; 0 where one seed gives none."""
    if len(values) == 1:
        return values[0], 0.0
    interval = t_interval(values)
    return interval.mean, interval.high - interval.mean


def _seeds(cells: Sequence[Cell]) -> str:
    n = len({cell.seed for cell in cells})
    return f"{n} seeds (bars: 95 % t intervals)" if n > 1 else "one seed"
