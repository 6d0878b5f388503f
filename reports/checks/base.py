"""The base of every check: comparisons, and the pairing of two sides by setting and seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.metrics.statistics import Interval, t_interval
from reports.collect import Cell
from reports.matching import Setting, by_setting, in_series, words

BySeed = Mapping[int, Cell]
Side = tuple[str, Sequence[Cell], Sequence[Cell]]  # what is compared, in words; the cells; those they are compared with


@dataclass(frozen=True)
class Comparison:
    """One setting: seed -> (measured value, value to compare it with).

    Without pairs it is not judged, and `note` says why. `tolerance` is the largest allowed difference, where a check
    has one for each comparison.
    """

    label: str
    pairs: Mapping[int, tuple[float, float]]
    note: str = ""
    tolerance: float = np.nan

    @property
    def values(self) -> tuple[float, float]:
        """Both sides' means over the seeds."""
        a, b = np.array(list(self.pairs.values())).mean(0)
        return float(a), float(b)

    @property
    def measured(self) -> Interval:
        """The measured values' mean and t interval over the seeds."""
        return interval([a for a, _ in self.pairs.values()])


@dataclass(frozen=True, kw_only=True)
class Check(ABC):
    """match   the settings at which cells are compared, beside method and seed
    metric  what is compared
    """

    match: tuple[str, ...]
    metric: str

    @abstractmethod
    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        """Every comparison that the cells allow, and those for which one side is missing (without pairs)."""

    @abstractmethod
    def holds(self, comparison: Comparison) -> bool:
        """Whether a comparison with pairs is as claimed."""

    @abstractmethod
    def effects(self, comparison: Comparison) -> dict[int, float]:
        """seed -> one number for the comparison, such as a difference or a ratio."""

    @abstractmethod
    def say(self, effect: Interval) -> str:
        """The number in words, with its interval if it has one."""

    @property
    def metrics(self) -> set[str]:
        """Every metric that the check reads."""
        return {self.metric}

    @property
    def directed(self) -> bool:
        """Whether the check is of a direction, not of a size."""
        return False

    @property
    def published(self) -> str:
        """The published numbers of the check, in words; empty if it has none."""
        return ""

    def at_demo(self) -> Check | None:
        """The check at demo scale; None if there is none."""
        return self

    def summary(self, comparisons: Sequence[Comparison]) -> str:
        """All comparisons that have pairs, in words: the mean of their effects."""
        return self.say(effect_over_seeds([self.effects(comparison) for comparison in comparisons]))

    def value(self, cell: Cell) -> float | None:
        return cell.get(f"metrics.{self.metric}")


@dataclass(frozen=True, kw_only=True)
class TwoSides(Check):
    """A check of cells against other cells.

    b_metric  the metric of the other side, if it is another one
    along     compare only settings in a series with at least two values of this key
    """

    b_metric: str | None = None
    along: str | None = None

    @property
    def metrics(self) -> set[str]:
        return {self.metric, self.b_metric or self.metric}

    @abstractmethod
    def sides(self, cells: Sequence[Cell]) -> Iterable[Side]:
        """The pairs of sides to compare."""

    @property
    def beside(self) -> tuple[str, ...]:
        """The settings that both sides share."""
        return self.match

    def compare(self, cells: Sequence[Cell]) -> list[Comparison]:
        return [comparison for side in self.sides(cells) for comparison in self._settings(*side)]

    def _settings(self, what: str, a: Sequence[Cell], b: Sequence[Cell]) -> list[Comparison]:
        entries = side_by_side(a, b, self.beside)
        kept = set(in_series([setting for setting, _, _ in entries], self.beside, self._series))
        return [self._at(what, *entry) for entry in entries if entry[0] in kept]

    @property
    def _series(self) -> str | None:
        return self.along

    def _at(self, what: str, setting: Setting, ours: BySeed, theirs: BySeed) -> Comparison:
        other = f"metrics.{self.b_metric or self.metric}"
        pairs = {
            seed: (self.value(ours[seed]), theirs[seed].get(other)) for seed in sorted(ours.keys() & theirs.keys())
        }
        label = ", ".join(part for part in (what, words(self.beside, setting)) if part)
        return comparison(label, pairs, self._note(what))

    def _note(self, what: str) -> str:
        return f"no seed with both sides of {what}"


def side_by_side(a: Sequence[Cell], b: Sequence[Cell], match: tuple[str, ...]) -> list[tuple[Setting, BySeed, BySeed]]:
    """Every setting of either side, with the cells of both by seed.

    A key that no cell of one side has is not matched: each of the other side's values of it gives an entry.
    """
    ours, theirs = by_setting(a, match), by_setting(b, match)
    shared = [i for i, key in enumerate(match) if any(c.has(key) for c in a) and any(c.has(key) for c in b)]

    def on_both(setting: Setting) -> Setting:
        return tuple(setting[i] for i in shared)

    entries: list[tuple[Setting, BySeed, BySeed]] = []
    for setting, by_seed in ours.items():
        partners = [(other, cells) for other, cells in theirs.items() if on_both(other) == on_both(setting)]
        entries += [(_joined(setting, other), by_seed, cells) for other, cells in partners] or [(setting, by_seed, {})]
    reached = {on_both(setting) for setting in ours}
    return entries + [(setting, {}, cells) for setting, cells in theirs.items() if on_both(setting) not in reached]


def comparison(
    label: str, pairs: Mapping[int, tuple[float | None, float | None]], note: str, tolerance: float = np.nan
) -> Comparison:
    """Keep the seeds that have both values."""
    known = {seed: (a, b) for seed, (a, b) in pairs.items() if a is not None and b is not None}
    return Comparison(label, known, "" if known else note, tolerance)


def effect_over_seeds(effects: Sequence[Mapping[int, float]]) -> Interval:
    """Mean of comparisons, with a t interval over the seeds that all of them have (one mean for each seed)."""
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in effects)))
    per_seed = [float(np.mean([by_seed[seed] for by_seed in effects])) for seed in seeds]
    if len(per_seed) > 1:
        return t_interval(per_seed)
    return Interval(float(np.mean(per_seed or [v for by_seed in effects for v in by_seed.values()])), np.nan, np.nan, 1)


def interval(values: Sequence[float]) -> Interval:
    """Mean and t interval; one value has no interval."""
    return t_interval(values) if len(values) > 1 else Interval(values[0], np.nan, np.nan, 1)


def spelled(value: Interval, form: str) -> str:
    """`0.873 [0.860, 0.886]`, every number in the given form; without an interval where there is one value."""
    ends = f" [{format(value.low, form)}, {format(value.high, form)}]" if value.n > 1 else ""
    return format(value.mean, form) + ends


def of(cells: Iterable[Cell], methods: Sequence[str]) -> list[Cell]:
    return [cell for cell in cells if cell.method in methods]


def _joined(setting: Setting, other: Setting) -> Setting:
    return tuple(theirs if ours is None else ours for ours, theirs in zip(setting, other, strict=True))
