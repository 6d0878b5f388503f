"""Checks of sizes: a ratio, a difference or a value that must lie in an interval, or near a published number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from core.metrics.statistics import Interval, equivalence_interval
from reports.checks.base import LEAST, Check, Comparison, Published, Ranges, Side, TwoSides, comparison, differences, of
from reports.checks.outcomes import UNLIMITED, Range, Region, range_of, spelled
from reports.collect import METRIC, Cell
from reports.matching import by_setting, shown, words

LISTED = 6  # the most published numbers that are listed one by one


@dataclass(frozen=True, kw_only=True)
class Bounded(Check):
    """A check of a number that must lie in [at_least, at_most]."""

    at_least: float = -np.inf
    at_most: float = np.inf

    def __post_init__(self) -> None:
        if not all(is_number(end) for end in (self.at_least, self.at_most)):
            raise ValueError(f"at_least, at_most: {self.at_least!r}, {self.at_most!r} are not two numbers")
        if self.at_least == -np.inf and self.at_most == np.inf:
            raise ValueError("at_least or at_most is needed")
        if self.at_least > self.at_most:
            raise ValueError(f"at_least: {self.at_least} is above at_most: {self.at_most}")

    def region(self, comparison: Comparison) -> Region:
        return Region(self.at_least, self.at_most)


@dataclass(frozen=True, kw_only=True)
class Within(Bounded):
    """metric / reference lies in [at_least, at_most]. `reference` is a setting, `metrics.<name>` or a number. Seeds
    where it is 0 are left out."""

    methods: tuple[str, ...]
    reference: str | float = 1.0

    @property
    def averaged(self) -> bool:
        return len(self.methods) == 1

    @property
    def metrics(self) -> set[str]:
        names = [self.metric] + ([self.reference] if str(self.reference).startswith(METRIC) else [])
        return {str(name).removeprefix(METRIC) for name in names}

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        comparisons = []
        for method in self.methods:
            for setting, by_seed in by_setting(of(cells, [method]), self.match).items():
                pairs = {seed: (self.value(cell), self._reference(cell) or None) for seed, cell in by_seed.items()}
                cells_of = {seed: (cell,) for seed, cell in by_seed.items()}
                label = ", ".join(part for part in (method, words(self.match, setting)) if part)
                note = f"no {self.metric}, or {self.reference} is missing or 0"
                comparisons.append(comparison(label, pairs, cells_of, note))
        return comparisons

    def effects(self, comparison: Comparison) -> dict[int, float]:
        """a / b"""
        return {seed: a / b for seed, (a, b) in comparison.pairs.items()}

    def limits(self, comparison: Comparison, ranges: Ranges) -> Range:
        low, high = range_of(self.metric, ranges)
        if isinstance(self.reference, str):
            return (0.0 if low >= 0 else -np.inf), np.inf
        return low / self.reference, high / self.reference

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
        super().__post_init__()
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

    def region(self, comparison: Comparison) -> Region:
        if not self.direction_only:
            return super().region(comparison)
        return Region(low=0.0, strict=True) if self._sign > 0 else Region(high=0.0, strict=True)

    def limits(self, comparison: Comparison, ranges: Ranges) -> Range:
        low, high = differences(self.metric, self.b_metric or self.metric, ranges)
        if not self.relative:
            return low, high
        return (-1.0 if range_of(self.metric, ranges)[0] == 0 else -np.inf), np.inf

    def effects(self, comparison: Comparison) -> dict[int, float]:
        return {
            seed: (a - b) / (max(abs(b), LEAST) if self.relative else 1.0) for seed, (a, b) in comparison.pairs.items()
        }

    def say(self, effect: Interval) -> str:
        return spelled(effect, "+.1%" if self.relative else "+.3g")


@dataclass(frozen=True, kw_only=True)
class Margin(Difference):
    """Method `a` minus method `b`. The same method twice, with a `b_metric`, gives a difference of two metrics."""

    a: str
    b: str

    @property
    def averaged(self) -> bool:
        return True

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
    def averaged(self) -> bool:
        return len(self.methods) == 1

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
    """The mean is equal to published numbers within a margin, by a test of equivalence. Never judged at demo scale.

    over     the keys of a number: `method`, settings
    points   for each number: the values of those keys, the number, its margin if it is not the check's, and the
             standard deviation of the published runs if it is known
    margin   the largest difference that counts as equal
    because  where the margin comes from
    runs     how many published runs there are, where their standard deviation is known
    chance   a metric, the level that a method without knowledge reaches
    """

    over: tuple[str, ...]
    points: tuple[Sequence[Any], ...]
    because: str
    margin: float = np.nan
    runs: int | None = None
    chance: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.because, str) or not self.because.strip():
            raise ValueError("because: says where the margin comes from")
        keys = len(self.over)
        for at in self.points:
            if not isinstance(at, Sequence) or isinstance(at, str) or not keys < len(at) <= keys + 3:
                raise ValueError(f"points: {at} is not {', '.join(self.over)}, the number[, its margin[, its sd]]")
            if not all(is_number(value) for value in at[keys:]):
                raise ValueError(f"points: {at}: {at[keys:]} are not numbers")
            if not self._number(at).margin > 0:
                raise ValueError(f"points: {at} has no margin, and the check has none")
            if self._number(at).sd is not None and (not is_number(self.runs) or int(self.runs or 0) < 2):
                raise ValueError(f"points: {at} has a standard deviation, so `runs` must say of how many runs")

    @property
    def metrics(self) -> set[str]:
        return {self.metric, self.chance or self.metric}

    @property
    def published(self) -> str:
        if len(self.points) > LISTED:
            margins = sorted({self._number(point).margin for point in self.points})
            span = f"{margins[0]:g}" + (f" to {margins[-1]:g}" if len(margins) > 1 else "")
            return f"{len(self.points)} numbers, setting by setting, within {span} ({self.because})"
        each = ", ".join(
            f"{self._name(p)} {self._number(p).number:g} ± {self._number(p).margin:g}" for p in self.points
        )
        return f"{each} (± {self.because})".strip()

    def at_demo(self) -> None:
        return None

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        return [comparison for point in self.points for comparison in self._at(point, cells)]

    def _at(self, point: Sequence[Any], cells: Sequence[Cell]) -> list[Comparison]:
        at = dict(zip(self.over, point, strict=False))
        published = self._number(point)
        chosen = by_setting([cell for cell in cells if all(cell.get(k) == v for k, v in at.items())], self.match)
        beside = tuple(key for key in self.match if key not in at)
        comparisons = []
        for setting, by_seed in chosen.items():
            others = words(beside, [v for key, v in zip(self.match, setting, strict=True) if key not in at])
            pairs = {seed: (self.value(cell), published.number) for seed, cell in by_seed.items()}
            label = ", ".join(part for part in (self._name(point), others) if part)
            cells_of = {seed: (cell,) for seed, cell in by_seed.items()}
            comparisons.append(comparison(label, pairs, cells_of, f"no {self.metric}", published))
        return comparisons or [Comparison(self._name(point), {}, {}, "no such cell", published)]

    def effects(self, comparison: Comparison) -> dict[int, float]:
        """measured - published"""
        return {seed: a - b for seed, (a, b) in comparison.pairs.items()}

    def region(self, comparison: Comparison) -> Region:
        margin = comparison.published.margin if comparison.published else np.nan
        return Region(-margin, margin)

    def interval(self, values: Sequence[float], comparison: Comparison) -> Interval:
        """The 90 % interval of the difference of the means, for two one-sided tests at 5 %."""
        published = comparison.published
        sd, n = (published.sd, published.n) if published else (None, None)
        return equivalence_interval(values, sd, n)

    def limits(self, comparison: Comparison, ranges: Ranges) -> Range:
        if comparison.published is None:
            return UNLIMITED
        low, high = range_of(self.metric, ranges)
        # a published mean with a spread of its own may be off by any amount
        known = comparison.published.sd is None
        return (low - comparison.published.number, high - comparison.published.number) if known else UNLIMITED

    def at_chance(self, comparison: Comparison) -> bool:
        """Whether the level by chance is as near to the published number as a measured one must be."""
        levels = [cell.get(f"{METRIC}{self.chance}") for cells in comparison.cells.values() for cell in cells]
        known = [level for level in levels if level is not None]
        if comparison.published is None or not known:
            return False
        return bool(abs(np.mean(known) - comparison.published.number) <= comparison.published.margin)

    def say(self, effect: Interval) -> str:
        return spelled(effect, "+.3g")

    def name_of(self, comparison: Comparison) -> str:
        """The keys of the comparison's number, without the settings beside them."""
        names = [name for name in map(self._name, self.points) if comparison.label.startswith(name)]
        return max(names, key=len, default="")

    def _name(self, point: Sequence[Any]) -> str:
        at: Mapping[str, Any] = dict(zip(self.over, point, strict=False))
        settings = {key: value for key, value in at.items() if key != "method"}
        return ", ".join(
            part for part in (str(at.get("method", "")), words(tuple(settings), [*settings.values()])) if part
        )

    def _number(self, point: Sequence[Any]) -> Published:
        number, *own = point[len(self.over) :]
        margin, sd = own[0] if own else self.margin, own[1] if len(own) > 1 else None
        return Published(float(number), float(margin), sd, None if sd is None else self.runs)


def is_number(value: object) -> bool:
    """Whether a value of a claims file is a number: YAML takes `1e9` for a text, and `yes` for true."""
    return isinstance(value, int | float) and not isinstance(value, bool)
