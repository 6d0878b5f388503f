"""The figure of oneill_sparsity: fig. 6 of O'Neill et al. 2025, active codes against error and recovery.

Below: L1 penalties on the left, TopK on the right. At paper scale, open diamonds are the authors' result files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports import looks
from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import GREY, in_order, look, mean_and_half
from reports.papers.oneill.figures.common import legend, published, seeds_of

SMALLEST = 1e-6  # error that is drawn
MCC_OF_L1, L0_OF_L1, MSE_OF_L1 = "oneill/sparsity-1", "oneill/sparsity-3", "oneill/sparsity-2"


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure of four panels."""
    yield Drawing(f"oneill_sparsity_{cells[0].scale}", cells, tradeoffs)


def tradeoffs(cells: Sequence[Cell]) -> Figure | None:
    """Above: active codes against error and latents. Below: latents over the penalty, and over k."""
    chosen = [cell for cell in cells if cell.method != "SC truncated"]
    methods = in_order(cell.method for cell in chosen)
    if not methods:
        return None
    paper = cells[0].scale == "paper"
    figure = Figure(figsize=(9.4, 7.2), layout="constrained")
    (error, recovery), (over_l1, over_k) = figure.subplots(2, 2)
    for method in methods:
        own = [cell for cell in chosen if cell.method == method]
        knob = "coder.k" if method.startswith("TopK") else "coder.l1"
        line(error, own, method, knob, "metrics.l0", "mse")
        line(recovery, own, method, knob, "metrics.l0", "latent_mcc")
        line(over_k if knob == "coder.k" else over_l1, own, method, knob, knob, "latent_mcc")
    if paper:
        authors(error, L0_OF_L1, MSE_OF_L1)
        authors(recovery, L0_OF_L1, MCC_OF_L1)
        authors(over_l1, None, MCC_OF_L1)
        authors(over_k, None, "oneill/sparsity-8")
    density = cells[0].get("source.K") / cells[0].get("source.N")
    for axes in (error, recovery):
        axes.axvline(density, color=GREY, linestyle=":", linewidth=1.2)
        axes.annotate(
            "true", (density, 0.99), xycoords=axes.get_xaxis_transform(), xytext=(3, 0), textcoords="offset points",
            fontsize=7, color=GREY, va="top",
        )  # fmt: skip
        axes.set_xlabel("fraction of active codes")
    error.set_yscale("log")
    error.set_ylim(bottom=SMALLEST)
    error.set_ylabel("mean squared error")
    over_l1.set_xscale("log")
    over_l1.set_xlabel("L1 penalty")
    over_k.set_xlabel("k")
    for axes in (recovery, over_l1, over_k):
        axes.set_ylabel("latent MCC")
        axes.set_ylim(0, 1)
    legend(figure, methods, paper)
    figure.suptitle(f"Sparsity, {cells[0].scale} scale, {seeds_of(cells)}", fontsize=10)
    return figure


def line(axes: Axes, cells: Sequence[Cell], method: str, knob: str, x: str, y: str) -> None:
    """A point for each value of the knob: means over seeds, with the interval of y."""
    groups: dict[Any, list[Cell]] = defaultdict(list)
    for cell in cells:
        if y in cell.metrics and cell.get(x) is not None:
            groups[cell.get(knob)].append(cell)
    if not groups:
        return
    points = [
        (np.mean([c.get(x) for c in groups[value]]), *mean_and_half([c.metrics[y] for c in groups[value]]))
        for value in sorted(groups)
    ]
    at, mean, half = (np.array(column) for column in zip(*points, strict=True))
    looks.line(axes, look(method), at, mean, np.minimum(half, 0.999 * mean) if y == "mse" else half)


def authors(axes: Axes, x_claim: str | None, y_claim: str) -> None:
    """Published pairs as open diamonds; without a claim for x, x is the value of the knob."""
    xs, ys = published(x_claim) if x_claim else None, published(y_claim)
    for (method, knob), y in ys.items():
        x = knob if xs is None else xs.get((method, knob))
        if x is not None:
            looks.published(axes, [x], [y], look(method).colour)
