"""Checks of directions: the measured value is lower, or higher, than what it is compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from core.metrics.statistics import Interval, value_at_l0
from reports.checks.base import LEAST, Check, Comparison, Ranges, Side, TwoSides, comparison, differences, of
from reports.checks.outcomes import Effect, Range, Region, enough_digits
from reports.collect import Cell
from reports.matching import Setting, by_setting, in_series, shown, words

MANY = 1000  # larger ratios, as to a value that is 0 but for rounding, are not given


@dataclass(frozen=True, kw_only=True)
class Directed(Check):
    """A check of a direction: the measured value is `lower` or `higher` than what it is compared with.

    Judged by the differences of pairs. `every_seed`: the claim is that every one of them shows the direction.
    """

    expect: Literal["lower", "higher"]
    every_seed: bool = False

    @property
    def directed(self) -> bool:
        return True

    @property
    def on_each(self) -> bool:
        return self.every_seed

    def __post_init__(self) -> None:
        if self.expect not in ("lower", "higher"):
            raise ValueError(f"expect: {self.expect!r} is neither lower nor higher")

    def region(self, comparison: Comparison) -> Region:
        return Region(high=0.0, strict=True) if self.expect == "lower" else Region(low=0.0, strict=True)

    def effects(self, comparison: Comparison) -> dict[int, float]:
        """a - b, over the size of the mean of b: the same for all seeds, so that the sign of an interval stays."""
        scale = self._scale(comparison)
        return {seed: (a - b) / scale for seed, (a, b) in comparison.pairs.items()}

    def limits(self, comparison: Comparison, ranges: Ranges) -> Range:
        low, high = differences(self.metric, self._other, ranges)
        scale = self._scale(comparison)
        return low / scale, high / scale

    def say(self, effect: Interval) -> str:
        if abs(effect.mean) > MANY:
            return f"more than {MANY} times as {'high' if effect.mean > 0 else 'low'}"
        word, sign = ("lower", -1) if effect.mean < 0 else ("higher", 1)
        if isinstance(effect, Effect) and effect.runs:
            return f"{abs(effect.mean):.1%} {word} (runs {', '.join(f'{run:+.1%}' for run in effect.runs)})"
        if effect.n == 1:
            return f"{abs(effect.mean):.1%} {word}"
        form = enough_digits(effect, ".1%")
        low, high = sorted((sign * effect.low, sign * effect.high))
        return f"{format(abs(effect.mean), form)} {word} [{format(low, form)}, {format(high, form)}]"

    @property
    def _other(self) -> str:
        """The metric of the other side."""
        return self.metric

    def _scale(self, comparison: Comparison) -> float:
        _, b = comparison.values
        return max(abs(b), LEAST)


@dataclass(frozen=True, kw_only=True)
class Paired(TwoSides, Directed):
    """Method `a` against method `b`; each against each, where one of them is a list."""

    a: str | tuple[str, ...]
    b: str | tuple[str, ...]

    @property
    def averaged(self) -> bool:
        return isinstance(self.a, str) and isinstance(self.b, str)

    @property
    def _other(self) -> str:
        return self.b_metric or self.metric

    def sides(self, cells: Sequence[Cell]) -> list[Side]:
        if isinstance(self.a, str) and isinstance(self.b, str):
            return [("", of(cells, [self.a]), of(cells, [self.b]))]
        pairs = [(a, b) for a in _listed(self.a) for b in _listed(self.b)]
        return [(f"{a} and {b}", of(cells, [a]), of(cells, [b])) for a, b in pairs]

    def _note(self, what: str) -> str:
        return f"no seed with both {what or f'{self.a} and {self.b}'}"


def _listed(methods: str | tuple[str, ...]) -> tuple[str, ...]:
    return (methods,) if isinstance(methods, str) else methods


@dataclass(frozen=True, kw_only=True)
class Ordered(TwoSides, Directed):
    """Each of the methods against the next."""

    methods: tuple[str, ...]

    @property
    def chained(self) -> bool:
        return True

    @property
    def _other(self) -> str:
        return self.b_metric or self.metric

    def sides(self, cells: Sequence[Cell]) -> list[Side]:
        return [(f"{a} and {b}", of(cells, [a]), of(cells, [b])) for a, b in pairwise(self.methods)]


@dataclass(frozen=True, kw_only=True)
class Monotone(Directed):
    """The metric at each value of `along` against the next smaller one, for each of the methods."""

    methods: tuple[str, ...]
    along: str

    @property
    def chained(self) -> bool:
        return True

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
                both = {seed: (after[seed], before[seed]) for seed in sorted(before.keys() & after.keys())}
                pairs = {seed: (self.value(a), self.value(b)) for seed, (a, b) in both.items()}
                label = f"{method}, {words(self.match, larger)} (from {shown(smaller[at])})"
                yield comparison(label, pairs, both, "no seed with both values")


@dataclass(frozen=True, kw_only=True)
class Peak(Directed):
    """For each of the methods, its best value where `along` is one of `at`, against its value everywhere else.

    The best is the highest or lowest mean over seeds, as `expect` says.
    """

    methods: tuple[str, ...]
    along: str
    at: tuple[float, ...]

    @property
    def chained(self) -> bool:
        return True

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        return [one for method in self.methods for one in self._series(method, of(cells, [method]))]

    def _series(self, method: str, cells: Sequence[Cell]) -> Iterable[Comparison]:
        rest = tuple(key for key in self.match if key != self.along)
        series: dict[Setting, list[Cell]] = defaultdict(list)
        for cell in cells:
            if cell.get(self.along) is not None and self.value(cell) is not None:
                series[tuple(cell.get(key) for key in rest)].append(cell)
        for setting, group in series.items():
            groups = by_setting(group, (*rest, self.along))
            inside = {key[-1]: by_seed for key, by_seed in groups.items() if key[-1] in self.at}
            others = {key[-1]: by_seed for key, by_seed in groups.items() if key[-1] not in self.at}
            label = ", ".join(part for part in (method, words(rest, setting)) if part)
            if not inside or not others:
                where = " or ".join(shown(value) for value in self.at)
                yield comparison(label, {}, {}, f"not measured at {where} and elsewhere")
                continue
            best = max(inside, key=lambda value: self._mean(inside[value]))
            for value, by_seed in others.items():
                both = {
                    seed: (inside[best][seed], by_seed[seed]) for seed in sorted(inside[best].keys() & by_seed.keys())
                }
                pairs = {seed: (self.value(a), self.value(b)) for seed, (a, b) in both.items()}
                what = f"{label}, at {shown(best)} and {shown(value)}"
                yield comparison(what, pairs, both, "no seed with both values")

    def _mean(self, by_seed: Mapping[int, Cell]) -> float:
        sign = 1 if self.expect == "higher" else -1
        return sign * float(np.mean([cell.metrics[self.metric] for cell in by_seed.values()]))


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
    def averaged(self) -> bool:
        return True

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
        cells = {seed: (cell, *curve) for seed, (cell, curve) in by_seed.items()}
        return comparison(f"{words(self.match, setting)} at L0 {np.mean(measured):.3g}", pairs, cells, note)

    def _read(self, curve: Sequence[Cell], l0: float) -> float | None:
        points = {cell.metrics[self.l0]: self.value(cell) for cell in curve}
        known = {x: y for x, y in points.items() if x > 0 and y is not None}
        return value_at_l0(list(known), list(known.values()), l0) if known else None
