"""The figures of leask_meta_sae: variance explained beside random directions, nearest latents, replaced decoders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from reports.collect import Cell
from reports.figures import Drawing
from reports.figures.groups import by_model
from reports.looks import GREY, Look, line, log_axis, mean_and_half, shades
from reports.side_files import SideTable

SIZE, K, AUX, PRESET = "meta.method.dict_size", "meta.method.k", "meta.method.aux", "meta.preset"
COSINES = SideTable("cosines.parquet", {"series": "text", "cosine": "filled", "count": "filled"})
META, REPLACED, PURSUIT = shades(3)
LINES = {"ve": (Look(META, "o"), "decoder directions"), "ve_null": (Look(GREY, "s"), "random directions")}
BARS = {
    "ve": ("meta-SAE", META),
    "ve_replaced_tuned": ("nearest latents of smaller dictionaries,\nencoder trained for them", REPLACED),
    "ve_replaced": ("nearest latents of smaller dictionaries,\nencoder as it was", REPLACED),
    "ve_random_decoder_tuned": ("random directions,\nencoder trained for them", GREY),
    "ve_random_decoder": ("random directions,\nencoder as it was", GREY),
    "ve_pursuit": ("pursuit over the small dictionary", PURSUIT),
    "ve_pursuit_random": ("pursuit over random directions", GREY),
    "ve_null": ("meta-SAE of random directions", GREY),
}
SCATTERED = 0.5  # a replaced decoder can explain less than nothing: the axis ends here


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """Up to three figures for each model and site. One for which there is no cell is left out."""
    chosen = [cell for cell in cells if cell.get("rows") == "base" and cell.get("meta.sampling") != "frequency"]
    for title, name, group in by_model(chosen):
        for kind in (variance, cosines, decoders):
            yield Drawing(f"leask_meta_sae_{name}_{kind.__name__}", group, partial(kind, title=title))


def variance(cells: Sequence[Cell], title: str) -> Figure | None:
    """Variance explained against the number of meta-latents, and against k, with that of random directions."""
    preset, aux = _commonest(cells, PRESET), _commonest(cells, AUX)
    chosen = [cell for cell in cells if (cell.get(PRESET), cell.get(AUX)) == (preset, aux)]
    size, k = _commonest(chosen, SIZE), _commonest(chosen, K)
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _lines(left, [cell for cell in chosen if cell.get(K) == k], SIZE)
    _lines(right, [cell for cell in chosen if cell.get(SIZE) == size], K)
    log_axis(left, {cell.get(SIZE) for cell in chosen if cell.get(K) == k}, "meta-latents")
    log_axis(
        right, {cell.get(K) for cell in chosen if cell.get(SIZE) == size}, "k (meta-latents per latent, on average)"
    )
    left.set_ylabel("variance explained")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_title(f"k = {k}", fontsize=10)
    right.set_title(f"{size} meta-latents", fontsize=10)
    right.legend()
    figure.suptitle(f"{title}: meta-SAE ({preset}, auxiliary loss {aux})", fontsize=10)
    return figure


def _lines(axes: Axes, cells: Sequence[Cell], key: str) -> None:
    for metric, (look, label) in LINES.items():
        points: dict[float, list[float]] = defaultdict(list)
        for cell in cells:
            points[cell.get(key)].append(cell.metrics[metric])
        at = sorted(points)
        mean, half = zip(*(mean_and_half(points[value]) for value in at), strict=True)
        line(axes, look, at, mean, half, label)


def cosines(cells: Sequence[Cell], title: str) -> Figure | None:
    """Largest cosines of meta-latents with latents of every size; and within the sets."""
    chosen = _detailed(cells)
    if not chosen:
        return None
    table = pd.concat([table for cell in chosen if (table := COSINES.beside(cell)) is not None])
    counts = table.groupby(["series", "cosine"], sort=True)["count"].sum().unstack(0)
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [str(name) for name in counts]
    sizes = sorted((n for n in names if n.startswith("meta-latents to")), key=lambda n: int(n.split()[-1]))
    to = {
        name: (colour, f"latents of {name.split()[-1]}") for name, colour in zip(sizes, shades(len(sizes)), strict=True)
    }
    _steps(left, counts, {**to, "null to the small one": (GREY, "of random directions, to the small one")})
    within = {
        "within meta": (META, "meta-latents"),
        "within small": (REPLACED, "small dictionary"),
        "within base": (PURSUIT, "base dictionary"),
    }
    _steps(right, counts, within)
    left.set_title("from a meta-latent to the nearest of other latents", fontsize=10)
    right.set_title("to the nearest within the same set", fontsize=10)
    left.set_ylabel("share")
    left.axvline(0.7, color="#bbbbbb", linewidth=1, zorder=0)
    figure.suptitle(f"{title}: largest cosines of directions, {_what(chosen)}", fontsize=10)
    return figure


def _steps(axes: Axes, counts: pd.DataFrame, series: Mapping[str, tuple[str, str]]) -> None:
    edges = counts.index.to_numpy()
    width = edges[1] - edges[0]
    for name, (colour, label) in series.items():
        share = counts[name].to_numpy() / max(1, counts[name].sum())
        axes.stairs(share, np.append(edges, edges[-1] + width), color=colour, label=label, linewidth=1.5)
    axes.set_xlabel("largest cosine")
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(fontsize=8)


def decoders(cells: Sequence[Cell], title: str) -> Figure | None:
    """Variance explained with other decoder rows, and by a matching pursuit over existing latents."""
    chosen = _detailed(cells)
    if not chosen:
        return None
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    names = [name for name in BARS if all(name in cell.metrics for cell in chosen)]
    at = np.arange(len(names))[::-1]
    mean, half = zip(*(mean_and_half([cell.metrics[name] for cell in chosen]) for name in names), strict=True)
    shown = np.clip(mean, -SCATTERED, None)
    axes.barh(at, shown, xerr=[h if m > -SCATTERED else 0 for m, h in zip(mean, half, strict=True)],
              color=[BARS[name][1] for name in names], height=0.7, capsize=2.5)  # fmt: skip
    for y, value, h in zip(at, mean, half, strict=True):
        axes.annotate(
            f"{value:.1%}", (max(value + h, 0.0), y), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(at, [BARS[name][0] for name in names])
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_xlim(right=min(1.0, max(mean) + 0.15))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("variance of the decoder directions explained")
    axes.grid(axis="y", visible=False)
    figure.suptitle(f"{title}: {_what(chosen)}", fontsize=10)
    return figure


def _detailed(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with details, of one preset and auxiliary loss: `lw` and `r1` if there are some."""
    detailed = [cell for cell in cells if "ve_replaced" in cell.metrics and COSINES.has(cell)]
    detailed.sort(key=lambda cell: (cell.get(PRESET) != "lw", cell.get(AUX) != "r1", str(cell.get(PRESET))))
    return [cell for cell in detailed if all(cell.get(key) == detailed[0].get(key) for key in (PRESET, AUX, SIZE, K))]


def _what(cells: Sequence[Cell]) -> str:
    one, n = cells[0], len({cell.seed for cell in cells})
    seeds = f"{n} seeds" if n > 1 else "one seed"
    n_rows = int(one.metrics["n_rows"])
    return f"{one.get(SIZE)} meta-latents of {n_rows} latents, k {one.get(K)}, {one.get(PRESET)}, {seeds}"


def _commonest(cells: Sequence[Cell], key: str) -> object:
    """The value that most cells have; of equals, the first."""
    values = [cell.get(key) for cell in cells]
    return max(dict.fromkeys(values), key=values.count)
