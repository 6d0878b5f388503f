"""The figure of bench_train_step: a bar for each implementation, its complete step over one encoder product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import BLACK, few, look, named
from reports.side_files import Listing, listing

NAMES = {"batchtopk": "BatchTopK", "topk": "TopK"}
OURS = "ours"


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure for each cell that has a table, a panel for each dictionary size."""
    for cell in cells:
        yield Drawing(f"bench_train_step_{cell.scale}_{cell.folder.name}", [cell], of_cell)


def of_cell(cells: Sequence[Cell]) -> Figure | None:
    """The figure of one cell."""
    table = listing(cells[0])
    return bars(table) if table else None


def bars(table: Listing) -> Figure:
    """Horizontal bars from the fastest to the slowest, with the quartiles of the ratio over repetitions."""
    sizes = few(sorted({row["dict_size"] for row in table.rows}), "dict_size")
    heights = [sum(row["dict_size"] == size for row in table.rows) for size in sizes]
    figure = Figure(figsize=(8.2, 1.6 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        panel(axes, [row for row in table.rows if row["dict_size"] == size])
        axes.set_title(f"{size:,} latents", fontsize=10, loc="left")
    panels[-1].set_xlabel("complete training step over one encoder product timed beside it")
    figure.suptitle("\n".join(table.notes[:2]), fontsize=8)
    return figure


def panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: row["step over product"])
    values = [row["step over product"] for row in ordered]
    labels = [named(f"{_name(row)}, {NAMES[row['method']]}") for row in ordered]
    places = range(len(ordered))
    below = [max(0.0, row["step over product"] - row["quartile 1"]) for row in ordered]
    above = [max(0.0, row["quartile 3"] - row["step over product"]) for row in ordered]
    colours = [look(NAMES[row["method"]]).colour for row in ordered]
    bars = axes.barh(places, values, xerr=[below, above], color=colours, capsize=2)
    for bar, row in zip(bars, ordered, strict=True):
        bar.set_alpha(1.0 if row["who"] == OURS else 0.55)
    for place, value, row in zip(places, values, ordered, strict=True):
        axes.annotate(
            f"{value:.2f}", (max(value, row["quartile 3"]), place), (4, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.1)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.axvline(1, color=BLACK, linewidth=0.9, linestyle="--")
    axes.grid(axis="y", visible=False)


def _name(row: Mapping[str, Any]) -> str:
    named = {OURS: "this project", "dense": f"plain dense PyTorch {row['version']}"}
    return named.get(row["who"], f"{row['who']} {row['version']}")
