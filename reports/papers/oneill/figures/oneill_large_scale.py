"""The figure of oneill_large_scale: correlation with the true codes against steps and FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import in_order
from reports.papers.oneill.curves import read_curves
from reports.papers.oneill.figures.common import MODES, bands, legend, level, seeds_of, sizes_of

ORACLE = "FISTA"


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """Curves of the encoders."""
    yield Drawing(f"oneill_large_scale_{cells[0].scale}", cells, curves)


def curves(every: Sequence[Cell]) -> Figure | None:
    """Three panels: steps, and training FLOPs in both countings. The oracle, which is not trained, is a level."""
    cells = [cell for cell in every if cell.method != ORACLE]
    oracle = [cell.metrics["latent_mcc"] for cell in every if cell.method == ORACLE]
    table = read_curves(cells)
    methods = in_order(table["coder.name"])
    if not methods:
        return None
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    columns = {"steps": "step", **{f"training {label}": f"train_flops_{mode}" for mode, label in MODES.items()}}
    for axes, (label, x) in zip(panels, columns.items(), strict=True):
        axes.set_xscale("log")
        bands(axes, table, x, "latent_mcc", methods)
        axes.set_xlabel(label)
        for value in oracle:
            level(axes, value, f"{ORACLE}, true dictionary: {value:.3f}", below=True)
    panels[0].set_ylabel("correlation with the true codes,\nheld-out samples")
    panels[0].set_ylim(0, 1.02)
    legend(figure, methods, with_published=False)
    figure.suptitle(f"Known codes, {sizes_of(cells)}, {cells[0].scale} scale, {seeds_of(cells)}", fontsize=10)
    return figure
