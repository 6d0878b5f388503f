"""The visual language of all figures, and how they are written.

Methods    have a colour and a marker, the same in every figure of every paper (`look`).
Settings   (sizes, k, classes of latents) have shades from dark to light (`shades`).
References have no colour: grey lines for chance, controls and thresholds, black for what is exact.
Published  numbers are open diamonds.

`LOOKS` lists the methods that often meet in one figure. A name that is not in it needs no entry: `look` derives its
colour and marker from the name alone, so they never change. A test compares the looks of methods that meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Literal, TypeVar
from zlib import crc32

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, LogFormatter, NullLocator

from core.errors import UserError
from reports.checks.outcomes import effect_of
from reports.safe_text import shortened

matplotlib.use("Agg")

BLACK, GREY, PALE = "#333333", "#777777", "#CCCCCC"
PUBLISHED = "published numbers"
Values = Sequence[float] | np.ndarray
T = TypeVar("T")
LONGEST_LABEL, LONGEST_LINE, MAX_LINES = 60, 240, 16  # of texts in a figure
MAX_PANELS = 16  # in a row

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


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of a method."""

    colour: str
    marker: str
    line: Literal["-", "--", ":", "-.", "none"] = "-"
    hollow: bool = False

    @property
    def face(self) -> str:
        """The colour inside a marker."""
        return "white" if self.hollow else self.colour


# Colours from the palettes of Okabe and Ito, and of Paul Tol: safe for the colour-blind where methods meet.
SAE, TOPK, BATCHTOPK, JUMPRELU = "#E69F00", "#882255", "#0072B2", "#56B4E9"
SPARSE_CODING, ITO, LCA = "#009E73", "#CC3311", "#117733"
NARROW, WIDE = "#CDB0E2", "#4B1A6B"  # MLPs, from 16 to 1024 hidden units
RESERVE = ("#CC79A7", "#44AA99", "#999933", "#8B5A2B", "#332288")  # of methods without an entry
MARKERS = ("<", ">", "p", "d", "*", "X")  # the same


def _mlp(width: float) -> Look:
    """Shades of violet by the number of hidden units, a marker for each power of 2."""
    octave = float(np.clip(np.log2(width), 4, 10))
    low, high = np.array(to_rgb(NARROW)), np.array(to_rgb(WIDE))
    return Look(to_hex(low + (high - low) * (octave - 4) / 6), "<v>dXp^"[round(octave) - 4])


LOOKS: Mapping[str, Look] = {
    "SAE": Look(SAE, "s"),
    "ReluL1": Look(SAE, "s"),  # the SAE of the language models
    "L-NL": Look(SAE, "s"),  # linear, then a nonlinearity: the SAE of the theorem
    "SAE+ITO": Look(ITO, "D", "--"),  # the SAE's dictionary, codes from ITO
    "TopK": Look(TOPK, "v"),
    "TopK SAE": Look(TOPK, "v"),
    "BatchTopK": Look(BATCHTOPK, "o"),
    "JumpReLU": Look(JUMPRELU, "^"),
    "L1Crosscoder": Look(SAE, "s"),
    "BatchTopKCrosscoder": Look(BATCHTOPK, "o"),
    **{f"MLP{width}": _mlp(width) for width in (16, 32, 64, 128, 256, 512, 1024)},
    "MLPEncoder": _mlp(128),
    "TopK MLP": replace(_mlp(32), marker="8", line="--", hollow=True),
    "SC": Look(SPARSE_CODING, "o"),
    "SC from -2": Look(SPARSE_CODING, "H", "--", hollow=True),
    "SC truncated": Look(SPARSE_CODING, "X", ":"),
    "TopK SC": Look(SPARSE_CODING, "h", "--", hollow=True),
    "TopK SC ReLU": Look(SPARSE_CODING, "d", ":", hollow=True),
    "ITO": Look(ITO, "P"),
    "ITO from -2": Look(ITO, "H", "--", hollow=True),
    "ITO warm": Look(SAE, "X", ":", hollow=True),  # they start from the SAE's codes
    "ITO warm floor": Look(SAE, "P"),
    "LCA": Look(LCA, "X"),
    "FISTA": Look(BLACK, "x", "-."),
    "NNLS": Look(BLACK, "+", "-."),
    "basis pursuit": Look(BLACK, "1", "-."),
    "L0 oracle": Look(BLACK, "*", "-."),
    "sklearn": Look(BLACK, "o"),
}


def look(method: str) -> Look:
    """The look of a method, known or new.

    `MLP<n>` has the shade of its width. A variant, `<known> <words>` or `<known>+<words>`, has the colour of the known
    method. Any other name has one of the colours in reserve.
    """
    if method in LOOKS:
        return LOOKS[method]
    if match := re.fullmatch(r"MLP(\d+)", method):
        return _mlp(int(match[1]))
    number = crc32(method.encode())
    marker = MARKERS[number // len(RESERVE) % len(MARKERS)]
    bases = [name for name in LOOKS if method.startswith((f"{name} ", f"{name}+"))]
    if bases:
        return Look(LOOKS[max(bases, key=len)].colour, marker, "--", hollow=True)
    return Look(RESERVE[number % len(RESERVE)], marker)


def in_order(methods: Iterable[Any]) -> list[str]:
    """The methods in the order of `LOOKS`, then the others by name; without None."""
    names = {str(method) for method in methods if method}
    return [name for name in LOOKS if name in names] + sorted(names - set(LOOKS))


def shades(n: int) -> list[str]:
    """Colours for n values of a setting, from dark to light."""
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0.05, 0.8, n))]


def styled() -> AbstractContextManager[None]:
    """Figures made inside have the common style."""
    return matplotlib.rc_context(STYLE)


def rendered(figure: Figure) -> dict[str, bytes]:
    """The figure as PNG and SVG, without a date inside. Texts are drawn as they are: a `$` begins no formula."""
    tame(figure)
    files = {}
    for ending in ("png", "svg"):
        buffer = BytesIO()
        figure.savefig(buffer, format=ending, dpi=160, metadata={"Date": None} if ending == "svg" else None)
        files[ending] = buffer.getvalue()
    return files


def tame(figure: Figure) -> None:
    """Make texts that models, data and results wrote harmless: formulas, what cannot be seen, texts beyond all bounds.

    Ticks of logarithmic axes keep their powers of ten, which are formulas; they hold numbers alone.
    """
    formulas: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formulas.add(axis.offsetText)
            for ticks, formatter in (
                (axis.get_major_ticks(), axis.get_major_formatter()),
                (axis.get_minor_ticks(), axis.get_minor_formatter()),
            ):
                if isinstance(formatter, LogFormatter):
                    formulas |= {text for tick in ticks for text in (tick.label1, tick.label2)}
    in_legends = {text for legend in figure.findobj(Legend) for text in legend.findobj(Text)}
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text not in formulas:
            text.set_parse_math(False)
            most = LONGEST_LABEL if text in in_legends else LONGEST_LINE
            lines = text.get_text().split("\n")[:MAX_LINES]
            text.set_text("\n".join(shortened(line, most) for line in lines))


def named(text: object) -> str:
    """A name for a tick, a title or a legend: on one line, not too long."""
    return shortened(text, LONGEST_LABEL)


def few(values: Sequence[T], what: str) -> Sequence[T]:
    """The values, for each of which a figure has a panel. Raises UserError if there are too many."""
    if len(values) > MAX_PANELS:
        raise UserError(f"There are {len(values)} values of {what}; a figure has panels for at most {MAX_PANELS}.")
    return values


def line(axes: Axes, look: Look, x: Values, mean: Values, half: Values, label: str = "") -> None:
    """Points with bars of `half` a width on either side, joined by the look's line."""
    axes.errorbar(
        x,
        mean,
        yerr=half,
        label=label or None,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markersize=5.5,
        markerfacecolor=look.face,
        linewidth=1.5,
        elinewidth=0.9,
        capsize=2.5,
    )


def published(axes: Axes, x: Iterable[float], y: Iterable[float], colour: str, **settings: Any) -> None:
    """Published numbers as open diamonds."""
    axes.plot(
        [*x],
        [*y],
        **{
            "linestyle": "none", "marker": "D", "markersize": 5.5, "markerfacecolor": "white",
            "markeredgecolor": colour, "markeredgewidth": 1.4, "zorder": 5, **settings,
        },
    )  # fmt: skip


def handles(methods: Iterable[str], with_published: bool) -> list[Line2D]:
    """The entries of a legend."""
    entries = []
    for name in methods:
        own = look(name)
        entries.append(
            Line2D(
                [], [], color=own.colour, linestyle=own.line, marker=own.marker, markerfacecolor=own.face,
                markersize=5.5, label=name,
            )
        )  # fmt: skip
    if with_published:
        entries.append(
            Line2D([], [], color=BLACK, marker="D", markerfacecolor="white", linestyle="none", label=PUBLISHED)
        )
    return entries


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its t interval; 0 where there is one seed, or no spread."""
    over_seeds = effect_of(values)
    return over_seeds.mean, over_seeds.high - over_seeds.mean if over_seeds.n > 1 else 0.0


def seeds_of(seeds: Iterable[int]) -> str:
    """`3 seeds (bars and bands: 95 % t intervals)`"""
    n_seeds = len(set(seeds))
    return f"{n_seeds} seeds (bars and bands: 95 % t intervals)" if n_seeds > 1 else "one seed"


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
