"""The figure of oneill_classical: latent and dictionary MCC of scikit-learn against N, beside the chance level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures.style import BLUE, ORANGE, PURPLE, log_axis, mean_and_half, save, styled

METRICS = {"latent_mcc": "latent MCC", "dict_mcc": "dictionary MCC"}
OF_M = {8: (ORANGE, "s"), 16: (BLUE, "o"), 32: (PURPLE, "^")}


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """One figure for signed and one for nonnegative codes."""
    written: list[Path] = []
    with styled():
        for codes in ("signed", "nonnegative"):
            drawn = [cell for cell in cells if cell.get("codes") == codes]
            if drawn:
                written += save(panels(drawn, codes), folder / f"oneill_classical_{drawn[0].scale}_{codes}")
    return written


def panels(cells: Sequence[Cell], codes: str) -> Figure:
    """A row for each metric, a column for each K; dashed: what chance gives."""
    every_k = sorted({cell.get("source.K") for cell in cells})
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
    axes[0, -1].legend()
    figure.suptitle(f"scikit-learn dictionary learning, {codes} codes,\nheld-out samples; dashed: chance", fontsize=9)
    return figure


def lines(axes: Axes, cells: Sequence[Cell], metric: str) -> None:
    for M, (colour, marker) in OF_M.items():
        of_n = {
            n: [c.metrics for c in cells if c.get("source.N") == n and c.get("source.M") == M] for n in _sizes(cells)
        }
        points = [(n, [m[metric] for m in found], found[0][f"{metric}_chance"]) for n, found in of_n.items() if found]
        if not points:
            continue
        at, values, chance = zip(*points, strict=True)
        mean, half = zip(*(mean_and_half(v) for v in values), strict=True)
        axes.errorbar(at, mean, yerr=half, color=colour, marker=marker, capsize=2.5, label=f"M = {M}")
        axes.plot(at, chance, color=colour, linestyle="--", linewidth=0.9)


def _sizes(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.get("source.N") for cell in cells})
