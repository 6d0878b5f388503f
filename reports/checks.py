"""The kinds of checks that claims are made of (`check:` in reports/paper/*.yaml).

A check turns cells into comparisons: at one setting, what was measured on each seed beside what it is compared with.
Seeds are paired, never mixed: a comparison keeps only the seeds that both sides have.

  paired        one method against another, at equal settings
  monotone      a method against itself, at neighbouring values of one setting
  interpolated  a method against another one's curve over L0, read at the same measured L0; nothing is extrapolated
  within        a metric over a reference (a setting, another metric or a number), which must lie in an interval
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from core.metrics.statistics import Interval, t_interval, value_at_l0
from reports.collect import Cell
from reports.matching import Setting, by_setting, in_series, refined, words


@dataclass(frozen=True)
class Comparison:
    """One setting: seed -> (measured value, what it is compared with).

    Without pairs it is not judged, and `note` says why.
    """

    label: str
    pairs: Mapping[int, tuple[float, float]]
    note: str = ""

    @property
    def values(self) -> tuple[float, float]:
        """Both sides' means over the seeds."""
        a, b = np.array(list(self.pairs.values())).mean(0)
        return float(a), float(b)


@dataclass(frozen=True, kw_only=True)
class Check(ABC):
    """match   the settings at which cells are compared, beside method and seed
    metric  what is compared
    """

    match: tuple[str, ...]
    metric: str

    @abstractmethod
    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        """Every comparison that the cells allow, and those which one side alone is there for."""

    @abstractmethod
    def holds(self, comparison: Comparison) -> bool:
        """Whether a comparison that has pairs goes as claimed."""

    @abstractmethod
    def effects(self, comparison: Comparison) -> dict[int, float]:
        """seed -> the one number that sums the comparison up."""

    @abstractmethod
    def say(self, effect: Interval) -> str:
        """The number in words; its interval where it has one."""

    def value(self, cell: Cell) -> float | None:
        return cell.get(f"metrics.{self.metric}")


@dataclass(frozen=True, kw_only=True)
class Directed(Check):
    """A check of a direction: the measured value is `lower` or `higher` than what it is compared with."""

    expect: Literal["lower", "higher"]

    def __post_init__(self) -> None:
        if self.expect not in ("lower", "higher"):
            raise ValueError(f"expect: {self.expect!r} is neither lower nor higher")

    def holds(self, comparison: Comparison) -> bool:
        a, b = comparison.values
        return a < b if self.expect == "lower" else a > b

    def effects(self, comparison: Comparison) -> dict[int, float]:
        """(a - b) / |b|"""
        return {seed: (a - b) / abs(b) if b else float(np.sign(a - b)) for seed, (a, b) in comparison.pairs.items()}

    def say(self, effect: Interval) -> str:
        word, sign = ("lower", -1) if effect.mean < 0 else ("higher", 1)
        low, high = sorted((sign * effect.low, sign * effect.high))
        return f"{abs(effect.mean):.1%} {word}" + (f" [{low:.1%}, {high:.1%}]" if effect.n > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Paired(Directed):
    """Method `a` against method `b`. `along`: only settings in a series that has at least two values of this key."""

    a: str
    b: str
    along: str | None = None

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        ours, theirs = (by_setting(_of(cells, [method]), self.match) for method in (self.a, self.b))
        settings = in_series({**ours, **theirs}, self.match, self.along)
        return [self._at(setting, ours.get(setting, {}), theirs.get(setting, {})) for setting in settings]

    def _at(self, setting: Setting, ours: Mapping[int, Cell], theirs: Mapping[int, Cell]) -> Comparison:
        pairs = {
            seed: (self.value(ours[seed]), self.value(theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())
        }
        return _comparison(words(self.match, setting), pairs, f"no seed with both {self.a} and {self.b}")


@dataclass(frozen=True, kw_only=True)
class Monotone(Directed):
    """The metric at each value of `along` against the next smaller one, for each of the methods."""

    methods: tuple[str, ...]
    along: str

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        return [step for method in self.methods for step in self._steps(method, _of(cells, [method]))]

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
                label = f"{method}, {words(self.match, larger)} (from {smaller[at]:g})"
                yield _comparison(label, pairs, "no seed with both values")


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

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        ours = by_setting(_of(cells, [self.a]), self.match)
        curves = defaultdict(list)
        for setting, by_seed in by_setting(_of(cells, [self.b]), self.match).items():
            for seed, cell in by_seed.items():
                curves[self._curve_of(setting), seed].append(cell)
        return [
            self._at(
                setting, {seed: (cell, curves[self._curve_of(setting), seed]) for seed, cell in ours[setting].items()}
            )
            for setting in in_series(ours, self.match, self.along)
        ]

    def _curve_of(self, setting: Setting) -> Setting:
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
        return _comparison(f"{words(self.match, setting)} at L0 {np.mean(measured):.3g}", pairs, note)

    def _read(self, curve: Sequence[Cell], l0: float) -> float | None:
        points = {cell.metrics[self.l0]: self.value(cell) for cell in curve}
        known = {x: y for x, y in points.items() if x > 0 and y is not None}
        return value_at_l0(list(known), list(known.values()), l0) if known else None


@dataclass(frozen=True, kw_only=True)
class Within(Check):
    """metric / reference lies in [at_least, at_most]. `reference`: a setting, `metrics.<name>`, or a number."""

    methods: tuple[str, ...]
    reference: str | float = 1.0
    at_least: float = -np.inf
    at_most: float = np.inf

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        found = []
        for method in self.methods:
            for setting, by_seed in by_setting(_of(cells, [method]), self.match).items():
                pairs = {seed: (self.value(cell), self._reference(cell)) for seed, cell in by_seed.items()}
                label = f"{method}, {words(self.match, setting)}"
                found.append(_comparison(label, pairs, f"no {self.metric} or no {self.reference}"))
        return found

    def holds(self, comparison: Comparison) -> bool:
        return bool(self.at_least <= np.mean(list(self.effects(comparison).values())) <= self.at_most)

    def effects(self, comparison: Comparison) -> dict[int, float]:
        """a / b"""
        return {seed: a / b for seed, (a, b) in comparison.pairs.items()}

    def say(self, effect: Interval) -> str:
        return f"{effect.mean:.3g}" + (f" [{effect.low:.3g}, {effect.high:.3g}]" if effect.n > 1 else "")

    def _reference(self, cell: Cell) -> float | None:
        return cell.get(self.reference) if isinstance(self.reference, str) else self.reference


KINDS: Mapping[str, Callable[..., Check]] = {
    "paired": Paired,
    "monotone": Monotone,
    "interpolated": Interpolated,
    "within": Within,
}


def make_check(match: Sequence[str], kind: str, **arguments: Any) -> Check:
    """The check that a claim's `check:` describes. Raises ValueError for an unknown kind or argument."""
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        check = KINDS[kind](match=tuple(match), **lists)
    except TypeError as error:
        raise ValueError(f"check {kind}: {error}") from error
    along = lists.get("along")
    if along is not None and along not in check.match:
        raise ValueError(f"along: {along} is not among the settings that cells are matched on: {', '.join(match)}")
    return check


def compare(check: Check, cells: Sequence[Cell]) -> list[Comparison]:
    """The check's comparisons.

    Where cells agree on all that they are matched on, what they differ in is matched as well.
    """
    return replace(check, match=refined(cells, check.match)).compare(cells)


def effect_over_seeds(effects: Sequence[Mapping[int, float]]) -> Interval:
    """Mean of comparisons, with a t interval over the seeds that all of them have (each seed's mean is one value)."""
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in effects)))
    per_seed = [float(np.mean([by_seed[seed] for by_seed in effects])) for seed in seeds]
    if len(per_seed) > 1:
        return t_interval(per_seed)
    everything = per_seed or [value for by_seed in effects for value in by_seed.values()]
    return Interval(float(np.mean(everything)), np.nan, np.nan, 1)


def _of(cells: Iterable[Cell], methods: Sequence[str]) -> list[Cell]:
    return [cell for cell in cells if cell.method in methods]


def _comparison(label: str, pairs: Mapping[int, tuple[float | None, float | None]], note: str) -> Comparison:
    """Keep the seeds of which both values are known."""
    known = {seed: (a, b) for seed, (a, b) in pairs.items() if a is not None and b is not None}
    return Comparison(label, known, "" if known else note)
