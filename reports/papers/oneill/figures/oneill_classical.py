"""The figure of oneill_classical: latent and dictionary MCC of scikit-learn against N, beside the chance level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import Look, few, line, log_axis, mean_and_half, shades

METRICS = {"latent_mcc": "latent MCC", "dict_mcc": "dictionary MCC"}
MARKERS = "so^Dv"  # one for each M


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure for signed and one for nonnegative codes."""
    for codes in ("signed", "nonnegative"):
        own = [cell for cell in cells if cell.get("codes") == codes]
        if own:
            yield Drawing(f"oneill_classical_{own[0].scale}_{codes}", own, partial(panels, codes=codes))


def panels(cells: Sequence[Cell], codes: str) -> Figure:
    """A row for each metric, a column for each K. Dashed lines are the chance level."""
    every_k = few(sorted({cell.get("source.K") for cell in cells}), "source.K")
    figure = Figure(figsize=(1.6 + 2.8 * len(every_k), 5.0), layout="constrained")
    axes = figure.subplots(len(METRICS), len(every_k), squeeze=False, sharey="row", sharex=True)
    for row, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for panel, K in zip(row, every_k, strict=True):
            lines(panel, [cell for cell in cells if cell.get("source.K") == K], metric)
            panel.set_ylim(0, 1.02)
            log_axis(panel, _sizes(cells), "number of atoms N" if metric == "dict_mcc" else "")
        row[0].set_ylabel(label)
    for panel, K in zip(axes[0], every_k, strict=True):
        panel.set_title(f"K = {K}", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"scikit-learn dictionary learning, {codes} codes,\nheld-out samples; dashed: chance", fontsize=9)
    return figure


def lines(axes: Axes, cells: Sequence[Cell], metric: str) -> None:
    every_m = sorted({cell.get("source.M") for cell in cells})
    for M, colour, marker in zip(every_m, shades(len(every_m)), MARKERS, strict=False):
        of_n = {
            n: [c.metrics for c in cells if c.get("source.N") == n and c.get("source.M") == M] for n in _sizes(cells)
        }
        points = [(n, [m[metric] for m in own], own[0][f"{metric}_chance"]) for n, own in of_n.items() if own]
        if not points:
            continue
        at, values, chance = zip(*points, strict=True)
        mean, half = zip(*(mean_and_half(v) for v in values), strict=True)
        line(axes, Look(colour, marker), at, mean, half, f"M = {M}")
        axes.plot(at, chance, color=colour, linestyle="--", linewidth=0.9)


def _sizes(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.get("source.N") for cell in cells})
