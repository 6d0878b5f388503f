"""The figure of minder_tools: what each tool reports of known changes, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import BLACK, GREY, named

CASES = {"planted": "as planted", "rare": "changes in 0.5 % of rows", "itself": "a model beside itself"}
FOUND, AGAIN, OVERSTATED, FALSE = "#0072B2", "#A6CFE8", "#E69F00", "#CC3311"
PARTS = {FOUND: "found", AGAIN: "found again", FALSE: "false"}
NAMES = {  # in the order of the rows
    "L1Crosscoder": "L1",
    "BatchTopKCrosscoder": "BatchTopK",
    "DedicatedCrosscoder": "dedicated",
    "TiedCrosscoder": "tied",
    "BridgeCrosscoder": "bridge",
    "difference L1": "difference, L1",
    "difference": "difference, BatchTopK",
    "PCA": "principal components",
    "mean": "mean difference",
}

Tool = tuple[str, str]  # the method, and its knobs


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    yield Drawing(f"minder_tools_{cells[0].scale}", cells, tools)


def tools(cells: Sequence[Cell]) -> Figure | None:
    """A row for each tool, a column for each pair, and one for the time; means over seeds."""
    cases = [case for case in CASES if any(cell.get("case") == case for cell in cells)]
    order = list(NAMES)
    rows = sorted({tool_of(cell) for cell in cells if cell.method in NAMES}, key=lambda t: (order.index(t[0]), t[1]))
    if not cases or not rows:
        return None
    figure = Figure(figsize=(2.6 + 2.6 * (len(cases) + 1), 1.5 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(cases) + 1, sharey=True)
    for axes, case in zip(panels, cases, strict=False):
        _reports(axes, [cell for cell in cells if cell.get("case") == case], rows)
        axes.set_title(CASES[case], fontsize=9)
    _seconds(panels[-1], [cell for cell in cells if cell.get("case") == cases[0]], rows)
    panels[0].set_yticks(range(len(rows)), [named(f"{NAMES[method]} {knobs}") for method, knobs in rows], fontsize=8)
    panels[0].invert_yaxis()
    entries: list[Any] = [Patch(color=colour, label=label) for colour, label in PARTS.items()]
    entries.append(Patch(facecolor="none", edgecolor=BLACK, hatch="////", label="overstated, of those found"))
    entries.append(Line2D([], [], color=GREY, linestyle="--", label="changes that there are"))
    figure.legend(handles=entries, loc="outside lower center", ncols=5)
    n_seeds = len({cell.seed for cell in cells})
    seeds = f"means over {n_seeds} seeds" if n_seeds > 1 else "one seed"
    figure.suptitle(f"{cells[0].scale} scale, {seeds}. Crosscoders are read by Latent Scaling", fontsize=10)
    return figure


def tool_of(cell: Cell) -> Tool:
    """The method of a cell, and its knobs with their names."""
    knobs = [("", "method.bridge"), ("k", "method.k"), ("mu", "method.l1_coefficient")]
    trained = cell.metrics.get("training_seconds", 0) > 0
    shown = [f"{name} {cell.get(key):g}".strip() for name, key in knobs if trained and cell.get(key) is not None]
    return str(cell.method), ", ".join(shown)


def _reports(axes: Axes, cells: Sequence[Cell], rows: Sequence[Tool]) -> None:
    for at, tool in enumerate(rows):
        own = [cell for cell in cells if tool_of(cell) == tool]
        if not own:
            continue
        reported, found, false, overstated = (
            float(np.mean([cell.metrics[f"n_{name}"] for cell in own]))
            for name in ("reported", "found", "false", "overstated")
        )
        left = 0.0
        for width, colour in ((found, FOUND), (max(0.0, reported - false - found), AGAIN), (false, FALSE)):
            axes.barh(at, width, left=left, color=colour, height=0.72)
            left += width
        start = max(0.0, reported - false - overstated)
        axes.barh(at, overstated, left=start, facecolor="none", edgecolor=BLACK, hatch="////", height=0.72, linewidth=0)
    there = [c.metrics["n_found"] / c.metrics["found_share"] for c in cells if c.metrics.get("found_share")]
    if there:
        axes.axvline(float(np.mean(there)), color=GREY, linestyle="--", linewidth=1.0)
    axes.set_xlabel("reports")
    axes.grid(axis="y", visible=False)


def _seconds(axes: Axes, cells: Sequence[Cell], rows: Sequence[Tool]) -> None:
    for at, tool in enumerate(rows):
        seconds = [c.metrics["training_seconds"] + c.metrics["analysis_seconds"] for c in cells if tool_of(c) == tool]
        if seconds:
            axes.plot(float(np.median(seconds)), at, marker="o", color=BLACK)
    axes.set_xscale("log")
    axes.set_xlabel("seconds, one core")
    axes.set_title("training and analysis", fontsize=9)
