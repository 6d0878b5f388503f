"""Checks of directions: the measured value is lower, or higher, than what it is compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from core.metrics.statistics import Interval, value_at_l0
from reports.checks.base import Check, Comparison, Side, TwoSides, comparison, of
from reports.collect import Cell
from reports.matching import Setting, by_setting, in_series, shown, words

MANY = 1000  # larger ratios, as to a value that is 0 but for rounding, are not given


@dataclass(frozen=True, kw_only=True)
class Directed(Check):
    """A check of a direction: the measured value is `lower` or `higher` than what it is compared with.

    By the means over seeds, or on `every_seed`.
    """

    expect: Literal["lower", "higher"]
    every_seed: bool = False

    @property
    def directed(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.expect not in ("lower", "higher"):
            raise ValueError(f"expect: {self.expect!r} is neither lower nor higher")

    def holds(self, comparison: Comparison) -> bool:
        pairs = comparison.pairs.values() if self.every_seed else [comparison.values]
        return all(a < b if self.expect == "lower" else a > b for a, b in pairs)

    def effects(self, comparison: Comparison) -> dict[int, float]:
        """(a - b) / |b|"""
        return {seed: (a - b) / abs(b) if b else float(np.sign(a - b)) for seed, (a, b) in comparison.pairs.items()}

    def say(self, effect: Interval) -> str:
        if effect.mean > MANY:
            return f"more than {MANY} times as high"
        word, sign = ("lower", -1) if effect.mean < 0 else ("higher", 1)
        low, high = sorted((sign * effect.low, sign * effect.high))
        return f"{abs(effect.mean):.1%} {word}" + (f" [{low:.1%}, {high:.1%}]" if effect.n > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Paired(TwoSides, Directed):
    """Method `a` against method `b`."""

    a: str
    b: str

    def sides(self, cells: Sequence[Cell]) -> list[Side]:
        return [("", of(cells, [self.a]), of(cells, [self.b]))]

    def _note(self, what: str) -> str:
        return f"no seed with both {self.a} and {self.b}"


@dataclass(frozen=True, kw_only=True)
class Ordered(TwoSides, Directed):
    """Each of the methods against the next."""

    methods: tuple[str, ...]

    def sides(self, cells: Sequence[Cell]) -> list[Side]:
        return [(f"{a} and {b}", of(cells, [a]), of(cells, [b])) for a, b in pairwise(self.methods)]


@dataclass(frozen=True, kw_only=True)
class Monotone(Directed):
    """The metric at each value of `along` against the next smaller one, for each of the methods."""

    methods: tuple[str, ...]
    along: str

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        return [step for method in self.methods for step in self._steps(method, of(cells, [method]))]

    def _steps(self, method: str, cells: Sequence[Cell]) -> Iterable[Comparison]:
        cells_at = by_setting(cells, self.match)
        at = self.match.index(self.along)
        series = defaultdict(list)
        for setting in in_series(cells_at, self.match, self.along):
            series[setting[:at] + setting[at + 1 :]].append(setting)
        for settings in series.values():
            settings.sort(key=lambda setting: setting[at])
            for smaller, larger in pairwise(settings):
                before, after = cells_at[smaller], cells_at[larger]
                pairs = {s: (self.value(after[s]), self.value(before[s])) for s in sorted(before.keys() & after.keys())}
                label = f"{method}, {words(self.match, larger)} (from {shown(smaller[at])})"
                yield comparison(label, pairs, "no seed with both values")


@dataclass(frozen=True, kw_only=True)
class Peak(Directed):
    """For each of the methods, its best value where `along` is one of `at`, against its best value elsewhere.

    The best is the highest or lowest mean over seeds, as `expect` says.
    """

    methods: tuple[str, ...]
    along: str
    at: tuple[float, ...]

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        return [best for method in self.methods for best in self._series(method, of(cells, [method]))]

    def _series(self, method: str, cells: Sequence[Cell]) -> Iterable[Comparison]:
        rest = tuple(key for key in self.match if key != self.along)
        series: dict[Setting, list[Cell]] = defaultdict(list)
        for cell in cells:
            if cell.get(self.along) is not None and self.value(cell) is not None:
                series[tuple(cell.get(key) for key in rest)].append(cell)
        for setting, group in series.items():
            ours, other = (self._best(group, inside) for inside in (True, False))
            pairs = {seed: (ours[seed], other[seed]) for seed in sorted(ours.keys() & other.keys())}
            label = ", ".join(part for part in (method, words(rest, setting)) if part)
            where = " or ".join(shown(value) for value in self.at)
            yield comparison(f"{label}, at {where}", pairs, f"not measured at {where} and elsewhere")

    def _best(self, cells: Sequence[Cell], inside: bool) -> dict[int, float | None]:
        """seed -> the metric at the best value of `along` inside (or outside) `at`."""
        values: dict[float, dict[int, float]] = defaultdict(dict)
        for cell in cells:
            if (cell.get(self.along) in self.at) is inside:
                values[cell.get(self.along)][cell.seed] = cell.metrics[self.metric]
        sign = 1 if self.expect == "higher" else -1
        best = max(values.values(), key=lambda by_seed: sign * np.mean(list(by_seed.values())), default={})
        return {seed: best[seed] for seed in best}


@dataclass(frozen=True, kw_only=True)
class Interpolated(Directed):
    """Method `a` against method `b`'s curve over measured L0, seed by seed.

    `knobs` are the settings of either method that set its sparsity: cells that agree on all other settings lie on one
    curve. `along` as in `Paired`, for the settings of `a`.
    """

    a: str
    b: str
    knobs: tuple[str, ...]
    along: str | None = None
    l0: str = "l0_mean"

    @property
    def metrics(self) -> set[str]:
        return {self.metric, self.l0}

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        ours = by_setting(of(cells, [self.a]), self.match)
        curves = defaultdict(list)
        for setting, by_seed in by_setting(of(cells, [self.b]), self.match).items():
            for seed, cell in by_seed.items():
                curves[self._curveof(setting), seed].append(cell)
        return [
            self._at(
                setting, {seed: (cell, curves[self._curveof(setting), seed]) for seed, cell in ours[setting].items()}
            )
            for setting in in_series(ours, self.match, self.along)
        ]

    def _curveof(self, setting: Setting) -> Setting:
        return tuple(value for key, value in zip(self.match, setting, strict=True) if key not in self.knobs)

    def _at(self, setting: Setting, by_seed: Mapping[int, tuple[Cell, list[Cell]]]) -> Comparison:
        pairs = {
            seed: (self.value(cell), self._read(curve, cell.metrics[self.l0]))
            for seed, (cell, curve) in by_seed.items()
        }
        measured = [cell.metrics[self.l0] for cell, _ in by_seed.values()]
        reached = [cell.metrics[self.l0] for _, curve in by_seed.values() for cell in curve]
        span = f"{min(reached):.3g} to {max(reached):.3g}" if reached else "no cell"
        note = f"{self.b} reaches {span} on these seeds"
        return comparison(f"{words(self.match, setting)} at L0 {np.mean(measured):.3g}", pairs, note)

    def _read(self, curve: Sequence[Cell], l0: float) -> float | None:
        points = {cell.metrics[self.l0]: self.value(cell) for cell in curve}
        known = {x: y for x, y in points.items() if x > 0 and y is not None}
        return value_at_l0(list(known), list(known.values()), l0) if known else None
