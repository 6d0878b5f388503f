"""Checks of sizes: a ratio, a difference or a value that must lie in an interval, or near a published number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from core.metrics.statistics import Interval
from reports.checks.base import Check, Comparison, Side, TwoSides, comparison, of, spelled
from reports.collect import METRIC, Cell
from reports.matching import by_setting, shown, words

LISTED = 6  # the most published numbers that are listed one by one


@dataclass(frozen=True, kw_only=True)
class Bounded(Check):
    """A check of a number that must lie in [at_least, at_most], by its mean over seeds."""

    at_least: float = -np.inf
    at_most: float = np.inf

    def holds(self, comparison: Comparison) -> bool:
        return bool(self.at_least <= np.mean(list(self.effects(comparison).values())) <= self.at_most)


@dataclass(frozen=True, kw_only=True)
class Within(Bounded):
    """metric / reference lies in [at_least, at_most]. `reference` is a setting, `metrics.<name>` or a number. Seeds
    where it is 0 are left out."""

    methods: tuple[str, ...]
    reference: str | float = 1.0

    @property
    def metrics(self) -> set[str]:
        names = [self.metric] + ([self.reference] if str(self.reference).startswith(METRIC) else [])
        return {str(name).removeprefix(METRIC) for name in names}

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        comparisons = []
        for method in self.methods:
            for setting, by_seed in by_setting(of(cells, [method]), self.match).items():
                pairs = {seed: (self.value(cell), self._reference(cell) or None) for seed, cell in by_seed.items()}
                label = f"{method}, {words(self.match, setting)}"
                comparisons.append(comparison(label, pairs, f"no {self.metric}, or {self.reference} is missing or 0"))
        return comparisons

    def effects(self, comparison: Comparison) -> dict[int, float]:
        """a / b"""
        return {seed: a / b for seed, (a, b) in comparison.pairs.items()}

    def say(self, effect: Interval) -> str:
        return spelled(effect, ".3g")

    def _reference(self, cell: Cell) -> float | None:
        return cell.get(self.reference) if isinstance(self.reference, str) else self.reference


@dataclass(frozen=True, kw_only=True)
class Difference(TwoSides, Bounded):
    """a - b, or (a - b) / |b| if `relative`, lies in [at_least, at_most].

    direction_only: only its sign is judged. The interval must have one sign.
    """

    relative: bool = False
    direction_only: bool = False

    def __post_init__(self) -> None:
        if self.at_least == -np.inf and self.at_most == np.inf:
            raise ValueError("at_least or at_most is needed")
        if self.direction_only and self._sign == 0:
            raise ValueError("direction_only: the interval has both signs")

    @property
    def directed(self) -> bool:
        return self.direction_only

    @property
    def _sign(self) -> int:
        return 1 if self.at_least >= 0 else -1 if self.at_most <= 0 else 0

    def at_demo(self) -> Check | None:
        return replace(self, direction_only=True) if self._sign else None

    def holds(self, comparison: Comparison) -> bool:
        a, b = comparison.values
        return self._sign * (a - b) > 0 if self.direction_only else super().holds(comparison)

    def effects(self, comparison: Comparison) -> dict[int, float]:
        return {seed: (a - b) / (abs(b) or 1.0 if self.relative else 1.0) for seed, (a, b) in comparison.pairs.items()}

    def say(self, effect: Interval) -> str:
        return spelled(effect, "+.1%" if self.relative else "+.3g")


@dataclass(frozen=True, kw_only=True)
class Margin(Difference):
    """Method `a` minus method `b`. The same method twice, with a `b_metric`, gives a difference of two metrics."""

    a: str
    b: str

    def sides(self, cells: Sequence[Cell]) -> list[Side]:
        return [("", of(cells, [self.a]), of(cells, [self.b]))]

    def _note(self, what: str) -> str:
        return f"no seed with both {self.a} and {self.b}"


@dataclass(frozen=True, kw_only=True)
class Change(Difference):
    """Each of the methods where the setting `along` is `after`, minus the same method where it is `before`."""

    methods: tuple[str, ...]
    before: Any
    after: Any

    @property
    def beside(self) -> tuple[str, ...]:
        return tuple(key for key in self.match if key != self.along)

    @property
    def _series(self) -> str | None:
        return None

    def sides(self, cells: Sequence[Cell]) -> list[Side]:
        def at(method: str, value: Any) -> list[Cell]:
            return [c for c in of(cells, [method]) if self.along and c.has(self.along) and c.get(self.along) == value]

        return [(method, at(method, self.after), at(method, self.before)) for method in self.methods]

    def _note(self, what: str) -> str:
        return f"no seed with {self.along} at both {shown(self.before)} and {shown(self.after)}"


@dataclass(frozen=True, kw_only=True)
class Near(Check):
    """The mean over seeds is near published numbers. Never judged at demo scale.

    over       the keys of a number: `method`, settings
    points     for each number: the values of those keys, the number, and its tolerance if it is not the check's
    tolerance  the largest allowed distance of the mean from the number
    """

    over: tuple[str, ...]
    points: tuple[Sequence[Any], ...]
    tolerance: float = np.nan

    def __post_init__(self) -> None:
        for point in self.points:
            if len(point) not in (len(self.over) + 1, len(self.over) + 2):
                raise ValueError(f"points: {point} is not {', '.join(self.over)}, the number[, its tolerance]")
            if not self._number(point)[1] > 0:
                raise ValueError(f"points: {point} has no tolerance, and the check has none")

    @property
    def published(self) -> str:
        if len(self.points) > LISTED:
            return f"{len(self.points)} numbers, setting by setting"
        return ", ".join(f"{self._name(p)} {self._number(p)[0]:g}".strip() for p in self.points)

    def at_demo(self) -> None:
        return None

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        return [comparison for point in self.points for comparison in self._at(point, cells)]

    def _at(self, point: Sequence[Any], cells: Sequence[Cell]) -> list[Comparison]:
        at = dict(zip(self.over, point, strict=False))
        number, tolerance = self._number(point)
        chosen = by_setting([cell for cell in cells if all(cell.get(k) == v for k, v in at.items())], self.match)
        beside = tuple(key for key in self.match if key not in at)
        comparisons = []
        for setting, by_seed in chosen.items():
            others = words(beside, [v for key, v in zip(self.match, setting, strict=True) if key not in at])
            pairs = {seed: (self.value(cell), number) for seed, cell in by_seed.items()}
            label = ", ".join(part for part in (self._name(point), others) if part)
            comparisons.append(comparison(label, pairs, f"no {self.metric}", tolerance))
        return comparisons or [Comparison(self._name(point), {}, "no such cell", tolerance)]

    def holds(self, comparison: Comparison) -> bool:
        a, b = comparison.values
        return abs(a - b) <= comparison.tolerance

    def effects(self, comparison: Comparison) -> dict[int, float]:
        return {seed: a - b for seed, (a, b) in comparison.pairs.items()}

    def say(self, effect: Interval) -> str:
        return spelled(effect, "+.3g")

    def summary(self, comparisons: Sequence[Comparison]) -> str:
        """Each measured mean, or, of many, their distances from the numbers."""
        if len(comparisons) <= LISTED:
            return ", ".join(f"{self._short(one)} {spelled(one.measured, '.3g')}".strip() for one in comparisons)
        apart = [a - b for a, b in (one.values for one in comparisons)]
        farthest = comparisons[int(np.argmax(np.abs(apart)))].label
        return (
            f"{np.mean(apart):+.3f} from the numbers on average, {np.mean(np.abs(apart)):.3f} without signs, "
            f"farthest {max(apart, key=abs):+.3f} ({farthest})"
        )

    def _short(self, comparison: Comparison) -> str:
        names = [name for name in map(self._name, self.points) if comparison.label.startswith(name)]
        return max(names, key=len, default="")

    def _name(self, point: Sequence[Any]) -> str:
        at: Mapping[str, Any] = dict(zip(self.over, point, strict=False))
        settings = {key: value for key, value in at.items() if key != "method"}
        return ", ".join(
            part for part in (str(at.get("method", "")), words(tuple(settings), [*settings.values()])) if part
        )

    def _number(self, point: Sequence[Any]) -> tuple[float, float]:
        number, *own = point[len(self.over) :]
        return float(number), float(own[0] if own else self.tolerance)
