"""The figure of bench_quality: our error over each peer's against the steps, a panel for each method and k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import BLACK, few, log_axis

PEERS = {"dictionary_learning": ("#0072B2", "o"), "saelens": ("#D55E00", "s")}
KINDS = {"batchtopk": "BatchTopK", "topk": "TopK"}
DASHES = ("-", "--", ":", "-.")  # for learning rates, from the lowest
SETTING = ("kind", "k", "n_steps", "lr")

Point = tuple[float, float, float, float]  # steps; ratio, its low and high end


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure for the cells of each dictionary size that were compared with a peer."""
    groups: dict[object, list[Cell]] = defaultdict(list)
    for cell in cells:
        compared = any(f"over_{peer}" in cell.metrics for peer in PEERS)
        if compared and all(cell.get(key) is not None for key in SETTING):
            groups[cell.get("dict_size")].append(cell)
    for size, group in groups.items():
        yield Drawing(f"bench_quality_{group[0].scale}_{size}", group, ratios)


def ratios(cells: Sequence[Cell]) -> Figure:
    """Rows of panels are methods, columns are k; a line for each peer and learning rate, with its interval over
    seeds."""
    kinds = [kind for kind in KINDS if any(cell.get("kind") == kind for cell in cells)]
    ks = few(sorted({int(cell.get("k")) for cell in cells}), "k")
    rates = sorted({float(cell.get("lr")) for cell in cells})
    figure = Figure(figsize=(1.2 + 2.6 * len(ks), 1.0 + 2.3 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(ks), sharex=True, sharey=True, squeeze=False)
    for kind, row in zip(kinds, panels, strict=True):
        for k, axes in zip(ks, row, strict=True):
            here = [cell for cell in cells if cell.get("kind") == kind and int(cell.get("k")) == k]
            axes.axhline(1, color=BLACK, linewidth=0.9)
            for place, rate in enumerate(rates):
                for peer in PEERS:
                    curve(
                        axes, peer, [c for c in here if float(c.get("lr")) == rate], DASHES[place % len(DASHES)], rate
                    )
            log_axis(axes, sorted({float(cell.get("n_steps")) for cell in cells}), "steps")
            axes.set_title(f"{KINDS[kind]}, k {k}", fontsize=10)
        row[0].set_ylabel("our FVU over theirs")
    legends = [axes.get_legend_handles_labels() for row in panels for axes in row]
    handles = {label: handle for pair in legends for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def curve(axes: Axes, peer: str, cells: Sequence[Cell], dashes: str, rate: float) -> None:
    """The ratios of one peer at one learning rate."""
    points = sorted(point for cell in cells if (point := ratio_of(cell, peer)) is not None)
    if not points:
        return
    colour, marker = PEERS[peer]
    steps, ratio, low, high = np.array(points).T
    spread = np.nan_to_num(np.clip([ratio - low, high - ratio], 0, None))
    label = f"over {peer}, lr {rate:g}"
    axes.errorbar(steps, ratio, spread, color=colour, marker=marker, linestyle=dashes, capsize=2, label=label)


def ratio_of(cell: Cell, peer: str) -> Point | None:
    """None where the peer was left out."""
    name = f"over_{peer}"
    if name not in cell.metrics:
        return None
    value = float(cell.metrics[name])
    low, high = (float(cell.metrics.get(f"{name}_{end}", value)) for end in ("low", "high"))
    return float(cell.get("n_steps")), value, low, high
