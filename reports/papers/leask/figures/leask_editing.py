"""The figure of leask_editing: which edits change some attributes of an entity and leave the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from reports.collect import Cell
from reports.figures import Drawing
from reports.figures.groups import by_model
from reports.looks import GREY, mean_and_half, seeds_of, shades

META, THIRD, SWAP, SWAP_AT_ENTITY = shades(4)
KINDS = {
    "meta": ("meta-latents\nof the target", META),
    "third": ("meta-latents of\na third entity", THIRD),
    "random": ("random\ndirections", GREY),
    "swap": ("latents\nswapped", SWAP),
    "swap_at_entity": ("latents swapped,\nat the name only", SWAP_AT_ENTITY),
}
PANELS = {
    "reached_proper_fraction": "proper subsets of attributes reached",
    "reached_all": "pairs where all attributes are reached",
    "target_change_nats": "change of log-odds, targets (nats)",
    "other_change_nats": "change of log-odds, others (nats)",
}


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure for each model, preset, way of splicing and set of pairs."""
    for title, name, group in by_model(cells, "editing.preset", "editing.splice", "meta.preset"):
        of_pairs: dict[str, list[Cell]] = defaultdict(list)
        for cell in group:
            of_pairs[str(cell.get("editing.pairs"))].append(cell)
        for number, (_, part) in enumerate(sorted(of_pairs.items())):
            yield Drawing(f"leask_editing_{name}_{number}", part, partial(panels, title=title))


def panels(cells: Sequence[Cell], title: str) -> Figure:
    """A panel for each metric, a bar for each kind of edit."""
    figure = Figure(figsize=(9.6, 6.0), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS.items(), strict=True):
        _bars(axes, cells, metric)
        axes.set_ylabel(label)
        if not metric.endswith("_nats"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(0, 1)
    figure.suptitle(f"{title}, {seeds_of(cell.seed for cell in cells)}", fontsize=10)
    return figure


def _bars(axes: Axes, cells: Sequence[Cell], metric: str) -> None:
    for place, (kind, (_, colour)) in enumerate(KINDS.items()):
        mean, half = mean_and_half([cell.metrics[f"{metric}_{kind}"] for cell in cells])
        axes.bar(place, mean, 0.7, yerr=half, color=colour, capsize=2.5, error_kw={"elinewidth": 0.9})
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(KINDS)), [name for name, _ in KINDS.values()], fontsize=7.5)
    axes.grid(axis="x", visible=False)
