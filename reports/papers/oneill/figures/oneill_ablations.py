"""The figures of oneill_ablations, the appendix studies of O'Neill et al. 2025: width, bias, Zipf codes, geometry.

At paper scale, open diamonds are the authors' result files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports import looks
from reports.collect import Cell, one_per_folder
from reports.figures import Drawing
from reports.looks import Look, few, in_order, line, log_axis, look, mean_and_half, named, shades
from reports.papers.oneill.figures.common import MCC, published, seeds_of
from reports.side_files import SideTable

ATOMS = SideTable("atoms.parquet", {}, others="filled")
WIDTH_CLAIMS = {"latent_mcc": "oneill/ablations-1", "dict_mcc": "oneill/ablations-2"}
BIAS_CLAIMS = {"latent_mcc": "oneill/ablations-6", "dict_mcc": "oneill/ablations-7"}
ZIPF_CLAIMS = {
    ("known_codes", "latent_mcc"): "oneill/ablations-8",
    ("known_dictionary", "latent_mcc"): "oneill/ablations-9",
    ("unknown", "latent_mcc"): "oneill/ablations-10",
    ("unknown", "dict_mcc"): "oneill/ablations-11",
}
MARKERS = "os^Dv"  # of the lines over width
GEOMETRY = ("SAE", "MLP32", "SC")


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """A figure for each study that has cells."""
    parts: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        parts[str(cell.get("part"))].append(cell)
    for part, make in {"width": width, "bias": bias, "zipf": zipf, "geometry": geometry}.items():
        if parts[part]:
            yield Drawing(f"oneill_ablations_{cells[0].scale}_{part}", parts[part], make)


def width(cells: Sequence[Cell]) -> Figure:
    """MCC over the MLP's hidden units, a line for each (N, M, K)."""
    figure = Figure(figsize=(8.4, 3.7), layout="constrained")
    shapes = sorted({tuple(int(cell.get(f"source.{name}")) for name in "NMK") for cell in cells})
    widths = sorted({cell.get("coder.width") for cell in cells})
    for axes, (metric, label) in zip(figure.subplots(1, 2), MCC.items(), strict=True):
        numbers = published(WIDTH_CLAIMS[metric]) if cells[0].scale == "paper" else {}
        for (N, M, K), colour, marker in zip(shapes, shades(len(shapes)), MARKERS, strict=False):
            own = [cell for cell in cells if (cell.get("source.N"), cell.get("source.M")) == (N, M)]
            points = _by(own, "coder.width", metric)
            _points(axes, points, Look(colour, marker), f"N {N}, M {M}, K {K}")
            theirs = {w: numbers[f"MLP{w}", N, M] for w in widths if (f"MLP{w}", N, M) in numbers}
            looks.published(axes, theirs.keys(), theirs.values(), colour)
        log_axis(axes, widths, "hidden units of the MLP")
        axes.set_ylabel(label)
    axes.legend(fontsize=8)
    figure.suptitle(f"Width, {_title(cells)}", fontsize=10)
    return figure


def bias(cells: Sequence[Cell]) -> Figure:
    """MCC without and with biases, method by method."""
    figure = Figure(figsize=(8.4, 3.7), layout="constrained")
    methods = in_order(cell.method for cell in cells)
    for axes, (metric, label) in zip(figure.subplots(1, 2), MCC.items(), strict=True):
        numbers = published(BIAS_CLAIMS[metric]) if cells[0].scale == "paper" else {}
        without, bias_colour = shades(2)
        for colour, with_bias, aside, name in ((without, False, -0.2, "no bias"), (bias_colour, True, 0.1, "bias")):
            own = [cell for cell in cells if bool(cell.get("coder.bias")) is with_bias]
            points = {methods.index(method) + aside: value for method, value in _by(own, "method", metric).items()}
            _points(axes, points, Look(colour, "s" if with_bias else "o", "none"), name)
            theirs = {
                i + aside + 0.1: numbers[m, with_bias] for i, m in enumerate(methods) if (m, with_bias) in numbers
            }
            looks.published(axes, theirs.keys(), theirs.values(), colour)
        axes.set_xticks(range(len(methods)), [named(method) for method in methods])
        axes.set_xlim(-0.6, len(methods) - 0.4)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(label)
    axes.legend(fontsize=8)
    figure.suptitle(f"Biases, {_title(cells)}", fontsize=10)
    return figure


def zipf(cells: Sequence[Cell]) -> Figure:
    """Final MCCs of the three problems with Zipf codes."""
    panels = [
        (task, metric)
        for task, metric in ZIPF_CLAIMS
        if any(cell.get("task") == task and metric in cell.metrics for cell in cells)
    ]
    figure = Figure(figsize=(1.2 + 2.7 * len(panels), 3.7), layout="constrained")
    for axes, (task, metric) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        own = [cell for cell in cells if cell.get("task") == task]
        methods = in_order(cell.method for cell in own if metric in cell.metrics)
        numbers = published(ZIPF_CLAIMS[task, metric]) if cells[0].scale == "paper" else {}
        for i, (method, value) in enumerate((m, _by(own, "method", metric)[m]) for m in methods):
            _points(axes, {i: value}, replace(look(method), line="none"), method)
            if (method,) in numbers:
                looks.published(axes, [i + 0.22], [numbers[method,]], look(method).colour)
        axes.set_xticks(range(len(methods)), [named(method) for method in methods], rotation=30, ha="right")
        axes.set_xlim(-0.6, len(methods) - 0.4)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(MCC[metric])
        axes.set_title(task.replace("_", " "), fontsize=9)
    figure.suptitle(f"Zipf codes, {_title(cells)}", fontsize=10)
    return figure


def geometry(cells: Sequence[Cell]) -> Figure | None:
    """|cosine| of every two atoms of the first run, for too few, enough and too many of them."""
    with_atoms = [cell for cell in one_per_folder(cells) if ATOMS.has(cell)]
    methods = [method for method in GEOMETRY if any(cell.method == method for cell in with_atoms)]
    sizes = few(sorted({cell.get("coder.N") for cell in with_atoms}), "coder.N")
    if not methods:
        return None
    figure = Figure(figsize=(1.4 + 2.3 * len(sizes), 0.9 + 2.3 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), len(sizes), squeeze=False)
    for row, method in zip(panels, methods, strict=True):
        for axes, N in zip(row, sizes, strict=True):
            own = [cell for cell in with_atoms if cell.method == method and cell.get("coder.N") == N]
            axes.set_axis_off()
            if own and (table := ATOMS.beside(own[0])) is not None:
                atoms = table.to_numpy()
                unit = atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12)
                image = axes.imshow(np.abs(unit @ unit.T), cmap="cividis", vmin=0, vmax=1)
                runs = [
                    c.metrics["interference"]
                    for c in cells
                    if c.folder == own[0].folder and "interference" in c.metrics
                ]
                spread = f", interference {np.mean(runs):.2f}" if runs else ""
                axes.set_title(f"{method}, {N} atoms{spread}", fontsize=8)
    figure.colorbar(image, ax=panels, label="|cosine| of two atoms", shrink=0.7)
    figure.suptitle(f"Decoder geometry for {cells[0].get('source.N')} true codes, {cells[0].scale} scale", fontsize=10)
    return figure


def _by(cells: Sequence[Cell], key: str, metric: str) -> dict[Any, tuple[float, float]]:
    """Value of the key -> mean over seeds and half of its interval, in the order of the values."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for cell in cells:
        if metric in cell.metrics:
            groups[cell.get(key)].append(cell.metrics[metric])
    return {value: mean_and_half(groups[value]) for value in sorted(groups)}


def _points(axes: Axes, points: Mapping[float, tuple[float, float]], look: Look, label: str) -> None:
    mean, half = (np.array([value[i] for value in points.values()]) for i in (0, 1))
    line(axes, look, list(points), mean, half, label)


def _title(cells: Sequence[Cell]) -> str:
    authors = "; open diamonds: the authors' result files" if cells[0].scale == "paper" else ""
    return f"{cells[0].scale} scale, {seeds_of(cells)}{authors}"
