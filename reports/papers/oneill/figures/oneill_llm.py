"""The figure of oneill_llm: normalised error and alive fraction against the measured L0, for each model and site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from reports.collect import Cell
from reports.figures import Drawing
from reports.figures.groups import by_model
from reports.looks import Look, line, look, mean_and_half, seeds_of

PANELS = {"fvu": "normalised error (fvu)", "alive_fraction": "alive latents (fraction of all)"}
KNOBS = ("method.l1_coefficient", "method.l1")


METHODS = {"ReluL1": "SAE", "MLPEncoder": "MLP encoder", "LCA": "LCA"}
# The MLP encoder is the same in both matched parts. Markers are hollow where the settings are the authors'.
PROFILES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "matched_steps": ("equal steps", {"line": "-"}),
    "matched_flops": ("equal FLOPs", {"line": "--"}),
    "paper_text": ("as published", {"line": ":", "hollow": True}),
    "repo": ("authors' script", {"line": "-.", "hollow": True}),
}


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure for each model and site."""
    for title, name, group in by_model(cells):
        yield Drawing(f"oneill_llm_{name}", group, partial(curves, title=title))


def curves(cells: Sequence[Cell], title: str) -> Figure:
    """Two panels over the measured L0; a line joins the coefficients of one series."""
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (metric, label) in zip(panels, PANELS.items(), strict=True):
        for method, name in METHODS.items():
            for profile, (words, changes) in PROFILES.items():
                own = [cell for cell in cells if (cell.method, cell.get("profile")) == (method, profile)]
                _line(axes, own, metric, replace(look(method), **changes), f"{name}, {words}")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("measured L0 (mean active latents per token)")
        axes.set_ylabel(label)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 1.05)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{title}, held-out text, {seeds_of(cell.seed for cell in cells)}", fontsize=10)
    return figure


def _line(axes: Axes, cells: Sequence[Cell], metric: str, look: Look, label: str) -> None:
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
            *mean_and_half([cell.metrics[metric] for cell in group]),
        )
        for group in points.values()
    )
    at, mean, half = (list(column) for column in zip(*drawn, strict=True))
    line(axes, look, at, mean, half, label)
