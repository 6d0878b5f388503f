"""The figures of leask_batchtopk: figures 1 to 3 of Bussmann et al. 2024.

For each language model and site: NMSE and cross-entropy degradation against the dictionary size at a fixed k and
against the measured L0 at a fixed size; and the histogram of BatchTopK's L0 per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from reports.collect import HISTOGRAM, Cell
from reports.figures import Drawing
from reports.figures.groups import by_model
from reports.looks import GREY, in_order, line, log_axis, look, mean_and_half, seeds_of
from reports.matching import refined

DICT_SIZE, K = "method.dict_size", "method.k"
METRICS = {"nmse_token_std": "NMSE", "ce_degradation": "CE degradation (nats per token)"}
FEWEST = 2e-5  # the histogram ends where a bin holds a smaller share of the tokens
ASIDE = 1.03  # factor on the dictionary size from one method to the next, so that bars do not hide one another


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    """Two figures for each model and site. A figure for which there is no cell is left out."""
    for title, name, group in by_model(cells):
        yield Drawing(f"leask_batchtopk_{name}_curves", group, partial(curves, title=title))
        yield Drawing(f"leask_batchtopk_{name}_l0_histogram", group, partial(histogram, title=title))


def curves(cells: Sequence[Cell], title: str) -> Figure:
    """Two rows (NMSE, cross-entropy degradation) by two columns (dictionary size, measured L0)."""
    figure = Figure(figsize=(8.2, 5.8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    k, size = _fixed(cells, K, DICT_SIZE), _fixed(cells, DICT_SIZE, "metrics.l0_mean")
    at_k = [cell for cell in cells if cell.get(K) is not None and cell.get(K) == k]
    at_size = [cell for cell in cells if cell.get(DICT_SIZE) == size]
    for row, (metric, label) in zip(axes, METRICS.items(), strict=True):
        _lines(row[0], at_k, DICT_SIZE, metric)
        _lines(row[1], at_size, "metrics.l0_mean", metric)
        row[0].set_ylabel(label)
    log_axis(axes[1, 0], {cell.get(DICT_SIZE) for cell in at_k}, "dictionary size")
    log_axis(axes[1, 1], {cell.get(K) for cell in at_size} - {None}, "measured L0 (mean active latents per token)")
    axes[0, 0].set_title(f"k = {k}" if at_k else "no cell yet", fontsize=10)
    axes[0, 1].set_title(f"dictionary size {size}", fontsize=10)
    axes[0, 1].legend()
    figure.suptitle(f"{title}, held-out text, {seeds_of(cell.seed for cell in cells)}", fontsize=10)
    return figure


def histogram(cells: Sequence[Cell], title: str) -> Figure | None:
    """L0 per token of BatchTopK with its threshold, all seeds together, beside the k of TopK."""
    drawn = [cell for cell in cells if cell.method == "BatchTopK" and HISTOGRAM.has(cell)]
    size, k = _fixed(drawn, DICT_SIZE, K), _fixed(drawn, K, DICT_SIZE)
    chosen = [cell for cell in drawn if (cell.get(DICT_SIZE), cell.get(K)) == (size, k)]
    if not chosen or k is None:
        return None
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    axes = figure.subplots()
    _bars(axes, _summed_histograms(chosen))
    axes.axvline(
        k, color=look("TopK").colour, linestyle="--", linewidth=1.8, label=f"k = {k}, as TopK has for every token"
    )
    axes.set_xlabel("L0 of a token (active latents)")
    axes.set_ylabel("share of tokens")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.grid(axis="x", visible=False)
    axes.legend()
    figure.suptitle(f"{title}, held-out text: BatchTopK with {size} latents and its threshold", fontsize=10)
    return figure


def _fixed(cells: Sequence[Cell], key: str, varied: str) -> int | None:
    """The value of `key` at which most different values of `varied` were measured; of equals the middle one."""
    values: dict[int, set[object]] = defaultdict(set)
    for cell in cells:
        if cell.get(key) is not None:
            values[cell.get(key)].add((cell.method, cell.get(varied)))
    best = sorted(value for value, seen in values.items() if len(seen) == max(map(len, values.values())))
    return best[len(best) // 2] if best else None


def _lines(axes: Axes, cells: Sequence[Cell], x: str, metric: str) -> None:
    """One line for each method, a point for each setting: means over seeds, and the t interval of the metric."""
    settings = refined(cells, (DICT_SIZE, K, "method.l0_coefficient"))
    methods = [m for m in in_order(cell.method for cell in cells) if x != DICT_SIZE or _has_k(cells, m)]
    for number, method in enumerate(methods):
        points: dict[tuple[object, ...], list[Cell]] = defaultdict(list)
        for cell in cells:
            if cell.method == method and metric in cell.metrics:
                points[tuple(cell.get(key) for key in settings)].append(cell)
        if not points:
            continue
        aside = ASIDE ** (number - (len(methods) - 1) / 2) if x == DICT_SIZE else 1.0
        drawn = sorted(
            (aside * _mean(group, x), *mean_and_half([cell.metrics[metric] for cell in group]))
            for group in points.values()
        )
        at, mean, half = (list(column) for column in zip(*drawn, strict=True))
        line(axes, look(method), at, mean, half, method)


def _has_k(cells: Sequence[Cell], method: str) -> bool:
    return any(cell.get(K) is not None for cell in cells if cell.method == method)


def _mean(cells: Sequence[Cell], key: str) -> float:
    return float(np.mean([cell.get(key) for cell in cells]))


def _summed_histograms(cells: Sequence[Cell]) -> pd.DataFrame:
    """Columns `count` and `count_without_bos` over the index `l0`, summed over the cells."""
    tables = [table for cell in cells if (table := HISTOGRAM.beside(cell)) is not None]
    return pd.concat(tables).groupby("l0").sum()


def _bars(axes: Axes, table: pd.DataFrame) -> None:
    """Shares of all tokens. The first tokens of texts are stacked on top of the others."""
    n_tokens = table["count"].sum()
    without_bos, everything = table["count_without_bos"] / n_tokens, table["count"] / n_tokens
    bos = everything - without_bos
    last = table.index[everything > FEWEST].max() if (everything > FEWEST).any() else 1
    axes.set_xlim(-1, max(last, 1) + 1)
    inside = table.index <= last  # a bar for each, of which there may be many thousands beyond
    at, bars, on_top = table.index[inside].to_numpy(), without_bos[inside], bos[inside]
    axes.bar(at, bars, width=1.0, color=look("BatchTopK").colour, alpha=0.5, label="tokens inside a text")
    axes.bar(
        at,
        on_top,
        width=1.0,
        bottom=bars,
        color=GREY,
        label=f"first tokens of texts (BOS), {bos.sum():.2%} of all tokens",
    )
