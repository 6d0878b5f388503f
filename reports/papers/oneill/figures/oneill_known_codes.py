"""The figures of oneill_known_codes: fig. 2 of O'Neill et al. 2025, and the spread of the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import in_order
from reports.papers.oneill.curves import read_curves
from reports.papers.oneill.derived import BASELINE
from reports.papers.oneill.figures.common import (
    MODES,
    SPREAD,
    bands,
    crossing_at,
    legend,
    one_data_set,
    published,
    references,
    sae_level,
    same_range,
    seeds_of,
    sizes_of,
    spread,
)


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """Curves of the cosine objective, and every run's final value."""
    cosine = [cell for cell in cells if cell.get("objective") == "cosine"]
    yield Drawing(f"oneill_known_codes_{cells[0].scale}_curves", cosine, curves)
    yield Drawing(f"oneill_known_codes_{cells[0].scale}_runs", cells, runs)


def curves(cells: Sequence[Cell]) -> Figure | None:
    """Latent MCC over steps, and over FLOPs of training in both countings, with the mean crossing of the plateau."""
    shared = one_data_set(cells)
    table = read_curves(shared)
    methods = in_order(table["coder.name"])
    if not methods:
        return None
    paper = cells[0].scale == "paper"
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    columns = {"steps": "step", **{label: f"train_flops_{mode}" for mode, label in MODES.items()}}
    for axes, (label, x) in zip(panels, columns.items(), strict=True):
        axes.set_xscale("log")
        bands(axes, table, x, "latent_mcc", methods)
        axes.set_xlabel(label if x == "step" else f"training {label}")
        if paper:
            references(axes, published("oneill/codes-1"), methods)
    for axes, name in zip(
        panels[1:], ("mean_plateau_crossing_flops", "mean_plateau_crossing_flops_corrected"), strict=True
    ):
        sae_level(axes, shared, "latent_mcc")
        for place, method in enumerate(m for m in methods if m != BASELINE):
            crossing_at(axes, shared, name, method, 0.03 + 0.15 * place)
    same_range(panels[1:])
    panels[0].set_ylabel("latent MCC, held-out samples")
    panels[0].set_ylim(0.4, 1.0)
    legend(figure, methods, paper)
    figure.suptitle(f"Known codes, {sizes_of(cells)}, {cells[0].scale} scale, {seeds_of(shared)}", fontsize=10)
    return figure


def runs(cells: Sequence[Cell]) -> Figure | None:
    """Final values run by run, for each objective."""
    groups = {name: [cell for cell in cells if cell.get("objective") == name] for name in ("cosine", "mse")}
    drawn = {name: group for name, group in groups.items() if in_order(cell.method for cell in group)}
    if not drawn:
        return None
    widths = [len(in_order(cell.method for cell in group)) + 0.6 for group in drawn.values()]
    figure = Figure(figsize=(1.6 + 1.5 * sum(widths), 3.6), layout="constrained")
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (name, group) in zip(panels, drawn.items(), strict=True):
        spread(axes, group, "latent_mcc", in_order(cell.method for cell in group))
        axes.set_title(f"objective: {name}", fontsize=10)
    panels[0].set_ylabel("final latent MCC")
    figure.suptitle(f"{cells[0].scale} scale; {SPREAD}", fontsize=10)
    return figure
