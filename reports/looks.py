"""How all figures look, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from reports.checks.base import interval

matplotlib.use("Agg")

# the palette of Okabe and Ito, safe for the colour-blind
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, BLACK = "#0072B2", "#D55E00", "#CC79A7", "#333333"
GREY = "#777777"

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "figures",  # the same file from the same numbers
}


def styled() -> AbstractContextManager[None]:
    """Figures made inside look as all do."""
    return matplotlib.rc_context(STYLE)


def save(figure: Figure | None, path: Path) -> list[Path]:
    """PNG and SVG beside each other, without a date inside; nothing for no figure."""
    if figure is None:
        return []
    written = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    for file in written:
        figure.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)
    return written


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its t interval; 0 where one seed gives none."""
    found = interval(values)
    return found.mean, found.high - found.mean if found.n > 1 else 0.0


def log_axis(axes: Axes, ticks: Iterable[float], label: str) -> None:
    """A horizontal axis in powers of 2 with a tick at each of the measured values."""
    axes.set_xscale("log", base=2)
    if values := sorted(ticks):
        axes.xaxis.set_major_locator(FixedLocator(values))
    if len(values) == 1:
        axes.set_xlim(values[0] / 2, values[0] * 2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label)
