"""What the figures of the synthetic experiments of O'Neill et al. 2025 share: curves with bands, levels, crossings.

Lines are means over seeds, bands their 95 % t intervals. Open diamonds at paper scale are the numbers of the authors'
result files, read from the claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports import looks
from reports.checks import Near
from reports.claims import PAPERS, load_paper
from reports.collect import Cell
from reports.looks import GREY, look, mean_and_half
from reports.papers.oneill.derived import BASELINE, sae_levels

MODES = {"paper": "FLOPs, the paper's counting", "corrected": "FLOPs, corrected"}
MCC = {"latent_mcc": "latent MCC", "dict_mcc": "dictionary MCC"}
CONVERGED = ("L0 oracle", "FISTA", "NNLS")  # solvers whose result is one number
SPREAD = "filled: one data set for all runs; open: one for each run; below the names: standard deviations"


def one_data_set(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The runs that share one data set, as the paper's do; if there are none, those with data of their own."""
    return [cell for cell in cells if not cell.get("source.per_run")] or cells


def bands(axes: Axes, table: pd.DataFrame, x: str, y: str, methods: Sequence[str]) -> None:
    """One line for each method with its band; `x`: a column that is the same for all seeds at one step."""
    for method in methods:
        own = table[(table["coder.name"] == method) & table[y].notna()]
        own = own if axes.get_xscale() == "linear" else own[own["step"] > 0]
        points = [(group[x].mean(), *mean_and_half(group[y].to_list())) for _, group in own.groupby("step")]
        if not points:
            continue
        at, mean, half = (np.array(column) for column in zip(*points, strict=True))
        style = look(method)
        axes.plot(at, mean, color=style.colour, linestyle=style.line, linewidth=1.6, label=method)
        axes.plot(
            at[-1:], mean[-1:], color=style.colour, marker=style.marker, markerfacecolor=style.face, linestyle="none"
        )
        axes.fill_between(at, mean - half, mean + half, color=style.colour, alpha=0.15, linewidth=0)


def references(axes: Axes, numbers: Mapping[tuple[Any, ...], float], methods: Sequence[str]) -> None:
    """Published numbers right of the axes, alternately in two columns so that they do not hide one another."""
    shown = [(method, numbers[(method,)]) for method in methods if (method,) in numbers]
    for i, (method, number) in enumerate(sorted(shown, key=lambda entry: entry[1])):
        place = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        looks.published(axes, [1.02 + 0.03 * (i % 2)], [number], look(method).colour, **place)


def level(axes: Axes, value: float, text: str, below: bool = False) -> None:
    """A horizontal line with its name at its right end, above or below it."""
    axes.axhline(value, color=GREY, linestyle=":", linewidth=1.0, zorder=1)
    axes.annotate(
        text, (0.99, value), xycoords=axes.get_yaxis_transform(), xytext=(0, -2 if below else 1.5),
        textcoords="offset points", ha="right", va="top" if below else "bottom", fontsize=7, color=GREY,
    )  # fmt: skip


def ceilings(axes: Axes, cells: Sequence[Cell], named: bool = True) -> None:
    """What converged solvers reach: a line for each, and their names in the lower right corner."""
    names = []
    for method in CONVERGED:
        if values := [cell.metrics["latent_mcc"] for cell in cells if cell.method == method]:
            mean = float(np.mean(values))
            axes.axhline(mean, color=GREY, linestyle="-.", linewidth=1.0, zorder=1)
            names.append(f"{method} {mean:.3f}")
    if names and named:
        axes.annotate(
            "\n".join(["dash-dotted, from above:", *names]), (0.98, 0.03), xycoords="axes fraction", ha="right",
            fontsize=7, color=GREY,
        )  # fmt: skip


def chance(axes: Axes, cells: Iterable[Cell], metric: str) -> None:
    """What an untrained encoder or a random dictionary reaches, where the cells have it."""
    values = {cell.metrics[f"{metric}_chance"] for cell in cells if f"{metric}_chance" in cell.metrics}
    for value in {round(value, 2) for value in values}:
        if value > 0:
            level(axes, value, f"chance {value:.2f}")


def crossing_at(axes: Axes, cells: Sequence[Cell], name: str, method: str, height: float) -> None:
    """A vertical line at the crossing `name` (the mean where cells have several), labelled at a height from 0 to 1."""
    values = [cell.metrics[name] for cell in cells if cell.method == method and name in cell.metrics]
    if not values:
        return
    mean = float(np.mean(values))
    axes.axvline(mean, color=look(method).colour, linestyle=(0, (2, 2)), linewidth=1.2)
    axes.annotate(
        f"{method} passes\nthe SAE: {power_of_10(mean)}", (mean, height), xycoords=axes.get_xaxis_transform(),
        xytext=(4, 0), textcoords="offset points", ha="left", va="bottom", fontsize=7, color=looks.BLACK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
    )  # fmt: skip


def sae_level(axes: Axes, cells: Sequence[Cell], metric: str) -> None:
    """The level that is passed at the crossings: one of the SAE's mean curve."""
    for levels in sae_levels([cell for cell in cells if cell.method == BASELINE]).values():
        if metric in levels:
            axes.axhline(levels[metric], color=look(BASELINE).colour, linestyle=(0, (2, 2)), linewidth=1.0)


def power_of_10(value: float) -> str:
    """`4.9e11`"""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def same_range(panels: Sequence[Axes]) -> None:
    """One horizontal range for panels whose axes are to be compared."""
    ends = np.array([axes.get_xlim() for axes in panels])
    for axes in panels:
        axes.set_xlim(ends[:, 0].min(), ends[:, 1].max())


def legend(figure: Figure, methods: Sequence[str], with_published: bool) -> None:
    """One legend for all panels, below them, in rows of equal length."""
    entries = looks.handles(methods, with_published)
    n_rows = -(-len(entries) // 7)
    figure.legend(handles=entries, loc="outside lower center", ncols=-(-len(entries) // n_rows))


def seeds_of(cells: Iterable[Cell]) -> str:
    return looks.seeds_of(cell.seed for cell in cells)


def sizes_of(cells: Sequence[Cell]) -> str:
    """`N 16, M 8, K 3`, of the first cell."""
    return ", ".join(f"{name} {cells[0].get(f'source.{name}')}" for name in ("N", "M", "K"))


@cache
def published(claim_id: str) -> dict[tuple[Any, ...], float]:
    """The published numbers of a claim: the values of its keys -> the number."""
    paper = load_paper(PAPERS / "oneill")
    check = paper.check(paper.claim(claim_id))
    if not isinstance(check, Near):
        raise ValueError(f"{claim_id} has no numbers: its check is not `near`")
    return {tuple(point[: len(check.over)]): float(point[len(check.over)]) for point in check.points}


def spread(axes: Axes, cells: Sequence[Cell], metric: str, methods: Sequence[str]) -> None:
    """Every run's final value, and below it their standard deviation.

    Filled where the runs share one data set, open where each has its own.
    """
    names = []
    for place, method in enumerate(methods):
        deviations = []
        for own, aside in ((False, -0.2), (True, 0.15)):
            values = [
                c.metrics[metric]
                for c in cells
                if c.method == method and bool(c.get("source.per_run")) is own and metric in c.metrics
            ]
            if values:
                _strip(axes, place + aside, values, look(method).colour, own)
            if len(values) > 1:
                deviations.append(f"{np.std(values, ddof=1):.3f}")
        names.append(f"{looks.named(method)}\n{', '.join(deviations)}")
    axes.set_xticks(range(len(methods)), names, fontsize=8)
    axes.set_xlim(-0.6, len(methods) - 0.4)
    axes.grid(axis="x", visible=False)


def _strip(axes: Axes, at: float, values: Sequence[float], colour: str, hollow: bool) -> None:
    """A point for each value, and beside them their mean and its interval."""
    axes.scatter(
        [at] * len(values), values, s=22, edgecolors=colour, facecolors="white" if hollow else colour, zorder=3
    )
    mean, half = mean_and_half(values)
    axes.errorbar(at + 0.12, mean, yerr=half, color=colour, capsize=3, marker="_", markersize=9)
