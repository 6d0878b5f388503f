"""The figures of oneill_regimes: fig. 5 of O'Neill et al. 2025, differences of methods over N, M and K.

A colour field for each pair of methods and each K. Below the line M = K log(N / K), codes need not be identifiable. In
brackets, at paper scale: the difference in the authors' result files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import BLACK, few
from reports.papers.oneill.figures.common import MCC, published, seeds_of

PAIRS = (("SC", "SAE"), ("SC", "MLP32"), ("MLP32", "SAE"))
CLAIMS = {
    ("latent_mcc", 3): "oneill/regimes-1",
    ("dict_mcc", 3): "oneill/regimes-2",
    ("latent_mcc", 9): "oneill/regimes-3",
    ("dict_mcc", 9): "oneill/regimes-4",
}

Means = Mapping[tuple[str, int, int, int], float]  # method, N, M, K -> mean over seeds


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """One figure for the latents, one for the dictionary."""
    for metric in MCC:
        yield Drawing(f"oneill_regimes_{cells[0].scale}_{metric}", cells, partial(fields, metric=metric))


def fields(cells: Sequence[Cell], metric: str) -> Figure | None:
    """Rows are K, columns pairs of methods."""
    means = means_of(cells, metric)
    pairs = [(a, b) for a, b in PAIRS if {a, b} <= {method for method, *_ in means}]
    Ks = few(sorted({K for *_, K in means}), "source.K")
    if not pairs:
        return None
    figure = Figure(figsize=(1.6 + 3.0 * len(pairs), 0.9 + 2.7 * len(Ks)), layout="constrained")
    panels = figure.subplots(len(Ks), len(pairs), sharex=True, sharey=True, squeeze=False)
    for row, K in zip(panels, Ks, strict=True):
        authors = published(CLAIMS[metric, K]) if cells[0].scale == "paper" and (metric, K) in CLAIMS else {}
        for axes, (a, b) in zip(row, pairs, strict=True):
            drawn = field(axes, means, authors, (a, b), K)
            axes.set_title(f"{a} - {b}, K {K}", fontsize=9)
        row[0].set_ylabel("dimensions M")
    for axes in panels[-1]:
        axes.set_xlabel("codes N")
    figure.colorbar(drawn, ax=panels, label=f"difference in {MCC[metric]}", shrink=0.8)
    brackets = "; in brackets: the authors' result files" if cells[0].scale == "paper" else ""
    figure.suptitle(f"{cells[0].scale} scale, means over {seeds_of(cells).split(' (')[0]}{brackets}", fontsize=10)
    return figure


def field(
    axes: Axes, means: Means, authors: Mapping[tuple[object, ...], float], pair: tuple[str, str], K: int
) -> QuadMesh:
    """A square for each (N, M), on logarithmic axes, and the line M = K log(N / K)."""
    a, b = pair
    Ns, Ms = sorted({N for _, N, _, _ in means}), sorted({M for _, _, M, _ in means})
    values = np.full((len(Ms), len(Ns)), np.nan)
    for i, M in enumerate(Ms):
        for j, N in enumerate(Ns):
            if (a, N, M, K) in means and (b, N, M, K) in means:
                values[i, j] = means[a, N, M, K] - means[b, N, M, K]
                theirs = authors[a, N, M] - authors[b, N, M] if {(a, N, M), (b, N, M)} <= set(authors) else None
                _number(axes, np.log2(N), np.log2(M), values[i, j], theirs)
    mesh = axes.pcolormesh(
        _edges(np.log2(Ns)), _edges(np.log2(Ms)), values, cmap="PuOr_r", norm=TwoSlopeNorm(0, vmin=-0.5, vmax=0.5)
    )
    _boundary(axes, K)
    axes.set_xlim(*_edges(np.log2(Ns))[[0, -1]])
    axes.set_ylim(*_edges(np.log2(Ms))[[0, -1]])
    axes.set_xticks(np.log2(Ns), [str(N) for N in Ns])
    axes.set_yticks(np.log2(Ms), [str(M) for M in Ms])
    axes.grid(visible=False)
    return mesh


def means_of(cells: Sequence[Cell], metric: str) -> Means:
    groups: dict[tuple[str, int, int, int], list[float]] = {}
    for cell in cells:
        if metric in cell.metrics and cell.method:
            key = (cell.method, cell.get("source.N"), cell.get("source.M"), cell.get("source.K"))
            groups.setdefault(key, []).append(cell.metrics[metric])
    return {key: float(np.mean(values)) for key, values in groups.items()}


def _boundary(axes: Axes, K: int) -> None:
    N = np.geomspace(1.01 * K, 1024, 400)
    bound = K * np.log(N / K)
    shown = bound > 0
    axes.plot(np.log2(N[shown]), np.log2(bound[shown]), color=BLACK, linewidth=1.6, linestyle="--")


def _number(axes: Axes, x: float, y: float, ours: float, theirs: float | None) -> None:
    text = f"{ours:+.2f}" + (f"\n({theirs:+.2f})" if theirs is not None else "")
    axes.annotate(text, (x, y), ha="center", va="center", fontsize=7.5, color="white" if abs(ours) > 0.35 else BLACK)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders halfway between neighbours, and as far beyond the ends."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middle[0], *middle, 2 * centres[-1] - middle[-1]])
