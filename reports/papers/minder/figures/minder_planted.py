"""The figures of minder_planted: what Latent Scaling measures beside the truth, and artefacts against sparsity.

The paper has no such figures: they test on known concepts what it says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import Drawing
from reports.looks import BLACK, GREY, handles, in_order, line, look, mean_and_half, seeds_of, shades
from reports.side_files import SideTable

LATENTS = SideTable(
    "latents.parquet",
    {"delta": "number", "nu_error": "number", "nu_reconstruction": "number", "n_active": "filled", "kind": "text"},
)
L1, BTK = "L1Crosscoder", "BatchTopKCrosscoder"
NAMES = {L1: "L1", BTK: "BatchTopK"}
KNOBS = {L1: ("method.l1_coefficient", "mu"), BTK: ("method.k", "k")}
KINDS = ("shared", "weak_base", "chat_only", "base_only", "sometimes")
PLANTED = {"stream.noise": 0.2, "stream.weak_strength": 0.3, "stream.p_both": 0.5}  # where nothing else is varied
COUNTS = {
    "n_chat_only": "called chat-only",
    "n_specific": "of these, specific",
    "n_chat_only_weak_base": "weak concepts called chat-only\n(Complete Shrinkage)",
    "n_split": "concepts split in twins\n(Latent Decoupling)",
}
FEWEST_ACTIVE = 100  # rows in which a latent must fire for a ratio of its own to be shown


def drawings(cells: Sequence[Cell]) -> Iterator[Drawing]:
    name = f"minder_planted_{cells[0].scale}"
    yield Drawing(f"{name}_diagonals", cells, diagonals)
    yield Drawing(f"{name}_counts", cells, counts)
    yield Drawing(f"{name}_nu", cells, scatters)


def diagonals(cells: Sequence[Cell]) -> Figure | None:
    """nu of the error against a concept's strength in the base model, nu of the reconstruction against P(both)/P(chat):
    one point for each run. Latent Scaling is right where points lie on the diagonal."""
    quiet = [cell for cell in cells if cell.get("stream.noise") == PLANTED["stream.noise"]]
    strength = [cell for cell in quiet if _as_planted(cell, "stream.weak_strength")]
    sharing = [cell for cell in quiet if _as_planted(cell, "stream.p_both")]
    if len({cell.get("stream.weak_strength") for cell in strength}) < 2:
        return None
    figure = Figure(figsize=(8.2, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _diagonal(
        left, strength, "stream.weak_strength", "nu_error_weak_base", "strength in the base model", "nu of the error"
    )
    _diagonal(right, sharing, "metrics.both_given_chat", "nu_reconstruction_sometimes", "P(both) / P(chat)",
              "nu of the reconstruction")  # fmt: skip
    left.set_title("weak concepts, every latent", fontsize=9)
    right.set_title("concepts sometimes in one model, chat-only latents", fontsize=9)
    points = _legend(cells)
    for entry in points:
        entry.set(linestyle="none", markerfacecolor="white")
    figure.legend(handles=points, loc="outside lower center", ncols=2)
    note = "BatchTopK near 0: latents for the rows in which the chat model alone has the concept"
    figure.suptitle(f"{cells[0].scale} scale, medians over a run's latents, one point a run\n{note}", fontsize=10)
    return figure


def counts(cells: Sequence[Cell]) -> Figure | None:
    """Chat-only latents and their artefacts against the penalty, against k, and against the measured L0."""
    chosen = [cell for cell in cells if _as_planted(cell)]
    series = [(method, error) for method in (L1, BTK) for error in ("squared", "norm")]
    drawn = [
        (m, e, own) for m, e in series if (own := [c for c in chosen if (c.method, c.get("method.error")) == (m, e)])
    ]
    if not drawn:
        return None
    figure = Figure(figsize=(9.4, 9.6), layout="constrained")
    panels = figure.subplots(len(COUNTS), 3, sharey="row", sharex="col")
    truth = float(np.mean([_true_l0(cell) for cell in chosen]))
    for row, (metric, label) in zip(panels, COUNTS.items(), strict=True):
        for method, error, own in drawn:
            column = [L1, BTK].index(method)
            _against(row[column], own, KNOBS[method][0], metric, error)
            _against(row[2], own, "metrics.l0", metric, error)
        row[2].axvline(truth, color=GREY, linestyle="--", linewidth=1.0)
        row[0].set_ylabel(label)
        row[0].set_ylim(bottom=-0.5)
    for axes, label in zip(panels[-1], ("mu of L1", "k of BatchTopK", "measured L0 (dashed: the truth)"), strict=True):
        axes.set_xlabel(label)
    figure.legend(handles=_legend(cells, with_errors=True), loc="outside lower center", ncols=4)
    seeds = seeds_of(cell.seed for cell in chosen)
    note = "L0 differs between the methods: the right column compares them at what was measured"
    figure.suptitle(f"{cells[0].scale} scale, {seeds}\n{note}", fontsize=10)
    return figure


def scatters(cells: Sequence[Cell]) -> Figure | None:
    """Both nu of every latent that leans to the chat model, by the kind of its concept; all seeds together."""
    chosen = [
        ("L1, squared, mu 0.3", L1, "squared", 0.3),
        ("L1, squared, mu 0.1", L1, "squared", 0.1),
        ("BatchTopK, k 1.4", BTK, "norm", 1.4),
        ("BatchTopK, k 3", BTK, "norm", 3.0),
    ]
    groups = []
    for title, *wanted in chosen:
        own = [cell for cell in cells if _as_planted(cell) and _setting(cell) == wanted and LATENTS.has(cell)]
        groups += [(title, own)] if own else []
    if not groups:
        return None
    figure = Figure(figsize=(1.0 + 2.9 * len(groups), 3.9), layout="constrained")
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, own) in zip(panels, groups, strict=True):
        _both_nu(axes, own)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("nu of the reconstruction")
    panels[0].set_ylabel("nu of the error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    seeds = seeds_of(cell.seed for _, own in groups for cell in own).split(" (")[0]
    figure.suptitle(f"{cells[0].scale} scale, latents with a Delta_norm above 0.6, {seeds}", fontsize=10)
    return figure


def _as_planted(cell: Cell, *varied: str) -> bool:
    return all(cell.get(key) == value for key, value in PLANTED.items() if key not in varied)


def _setting(cell: Cell) -> list[object]:
    """Method, error, and the value of the method's knob."""
    knob = KNOBS.get(str(cell.method), ("", ""))[0]
    return [cell.method, cell.get("method.error"), cell.get(knob)]


def _true_l0(cell: Cell) -> float:
    """Concepts that a row has on average."""
    return float(cell.get("stream.p")) * sum(float(cell.get(f"stream.counts.{kind}") or 0) for kind in KINDS)


def _legend(cells: Sequence[Cell], with_errors: bool = False) -> list:
    entries = handles(in_order(cell.method for cell in cells), with_published=False)
    for entry in entries:
        entry.set_label(
            NAMES.get(str(entry.get_label()), str(entry.get_label())) + (", squared error" if with_errors else "")
        )
    if with_errors:
        for entry in handles(in_order(cell.method for cell in cells), with_published=False):
            entry.set(
                linestyle="--", markerfacecolor="white", label=f"{NAMES[str(entry.get_label())]}, error of the paper"
            )
            entries.append(entry)
    return entries


def _diagonal(axes: Axes, cells: Sequence[Cell], x: str, metric: str, xlabel: str, ylabel: str) -> None:
    axes.plot([0, 1], [0, 1], color=BLACK, linewidth=1.0, linestyle="--")
    for method, aside in ((L1, -0.008), (BTK, 0.008)):
        points = [(c.get(x) + aside, c.metrics[metric]) for c in cells if c.method == method and metric in c.metrics]
        if points:
            own = look(method)
            at, values = zip(*points, strict=True)
            axes.scatter(at, values, s=22, marker=own.marker, edgecolors=own.colour, facecolors="white", linewidths=1.0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _against(axes: Axes, cells: Sequence[Cell], x: str, metric: str, error: str) -> None:
    """Means over seeds with their intervals, a point for each value of the method's knob."""
    method = str(cells[0].method)
    groups: dict[float, list[Cell]] = defaultdict(list)
    for cell in cells:
        if metric in cell.metrics and cell.get(x) is not None:
            groups[cell.get(KNOBS[method][0])].append(cell)
    if not groups:
        return
    points = sorted(
        (float(np.mean([c.get(x) for c in own])), *mean_and_half([c.metrics[metric] for c in own]))
        for own in groups.values()
    )
    own = look(method)
    if error == "norm":
        own = type(own)(own.colour, own.marker, "--", hollow=True)
    at, mean, half = zip(*points, strict=True)
    line(axes, own, at, mean, half)


def _both_nu(axes: Axes, cells: Sequence[Cell]) -> None:
    axes.plot([0.5, 0.5, -0.2], [-0.2, 0.2, 0.2], color=GREY, linestyle=":", linewidth=1.2)  # specific: below and left
    tables = [table for cell in cells if (table := LATENTS.beside(cell)) is not None]
    leaning = [kind for kind in KINDS if kind != "base_only"]
    for kind, colour in zip((*leaning, ""), (*shades(len(leaning)), GREY), strict=True):
        for number, table in enumerate(tables):
            own = table[(table["kind"] == kind) & (table["delta"] > 0.6) & (table["n_active"] >= FEWEST_ACTIVE)]
            axes.scatter(
                own["nu_reconstruction"], own["nu_error"], s=16, color=colour, alpha=0.8,
                label=(kind or "no concept") if number == 0 else None,
            )  # fmt: skip
    axes.set_xlim(-0.2, 1.3)
    axes.set_ylim(-0.2, 1.3)
