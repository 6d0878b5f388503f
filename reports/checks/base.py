"""The base of every check: comparisons, and the pairing of two sides by setting and seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.metrics.statistics import Interval, t_interval
from reports.checks.outcomes import (
    UNLIMITED,
    Effect,
    Finding,
    Range,
    Region,
    limited,
    outcome_of,
    point,
    range_of,
    spread,
)
from reports.collect import Cell
from reports.draws import Draw, Draws, n_different
from reports.matching import Setting, by_setting, in_series, words

BySeed = Mapping[int, Cell]
Side = tuple[str, Sequence[Cell], Sequence[Cell]]  # what is compared, in words; the cells; those they are compared with
LEAST = 1e-12  # a difference relative to less is given relative to this
Ranges = Mapping[str, Range]  # metric, or a pattern of metrics -> the values that it can have


@dataclass(frozen=True)
class Published:
    """A published number. `margin`: the largest difference that counts as equal. `sd` and `n` of its runs, if known."""

    number: float
    margin: float
    sd: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Comparison:
    """One setting: seed -> (measured value, value to compare it with), and the cells that they were read from.

    Without pairs it is not judged, and `note` says why. `published` is what a measured value is compared with, where it
    is not another measured value.
    """

    label: str
    pairs: Mapping[int, tuple[float, float]]
    cells: Mapping[int, Sequence[Cell]]
    note: str = ""
    published: Published | None = None

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
        """Every comparison that the cells allow, and those for which one side is missing (without pairs)."""

    @abstractmethod
    def effects(self, comparison: Comparison) -> dict[int, float]:
        """seed -> one number for the comparison, such as a difference or a ratio."""

    @abstractmethod
    def region(self, comparison: Comparison) -> Region:
        """The effects that the check accepts."""

    @abstractmethod
    def say(self, effect: Interval) -> str:
        """The number in words, with its interval if it has one."""

    def limits(self, comparison: Comparison, ranges: Ranges) -> Range:
        """The effects that are possible, from the ranges of the metrics."""
        return UNLIMITED

    def interval(self, values: Sequence[float], comparison: Comparison) -> Interval:
        """The interval of the mean of different independent effects."""
        return t_interval(values)

    @property
    def metrics(self) -> set[str]:
        """Every metric that the check reads."""
        return {self.metric}

    @property
    def directed(self) -> bool:
        """Whether the check is of a direction, not of a size."""
        return False

    @property
    def chained(self) -> bool:
        """Whether its comparisons share a side with one another, so that their mean says nothing."""
        return False

    @property
    def averaged(self) -> bool:
        """Whether its comparisons are one comparison at several settings, so that their mean says something."""
        return False

    @property
    def on_each(self) -> bool:
        """Whether the claim is about every seed."""
        return False

    @property
    def published(self) -> str:
        """The published numbers of the check, in words; empty if it has none."""
        return ""

    def at_demo(self) -> Check | None:
        """The check at demo scale; None if there is none."""
        return self

    def value(self, cell: Cell) -> float | None:
        return cell.get(f"metrics.{self.metric}")

    def find(self, comparison: Comparison, draws: Draws, ranges: Ranges, clustered: bool) -> Finding:
        """What a comparison with pairs shows. Seeds that share all their draws are one independent value.

        clustered  outcomes come in clusters: runs are shown one by one, and each must agree with the interval
        """
        drawn = {seed: draws.of(comparison.cells[seed]) for seed in comparison.pairs}
        region, values = self.region(comparison), independent(self.effects(comparison), drawn)
        if spread(values):
            between = self.interval(values, comparison)
            effect = limited(between, values, self.limits(comparison, ranges), clustered)
        else:
            effect = point(values)
        return Finding(
            outcome=outcome_of(effect, values, region, "claimed" if self.on_each else "shown" if clustered else ""),
            effect=effect,
            region=region,
            values=tuple(values),
            n_seeds=len(comparison.pairs),
            n_data=n_different([data for data, _ in drawn.values()]),
            n_initialisations=n_different([initialisation for _, initialisation in drawn.values()]),
        )


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
        sides = {seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}
        pairs = {seed: (self.value(a), b.get(other)) for seed, (a, b) in sides.items()}
        label = ", ".join(part for part in (what, words(self.beside, setting)) if part)
        return comparison(label, pairs, sides, self._note(what))

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
    label: str,
    pairs: Mapping[int, tuple[float | None, float | None]],
    cells: Mapping[int, Sequence[Cell]],
    note: str,
    published: Published | None = None,
) -> Comparison:
    """Keep the seeds that have both values."""
    known = {seed: (a, b) for seed, (a, b) in pairs.items() if a is not None and b is not None}
    return Comparison(label, known, cells, "" if known else note, published)


def independent(effects: Mapping[int, float], drawn: Mapping[int, tuple[Draw, Draw]]) -> list[float]:
    """One value for each independent draw: the mean of the seeds that share it."""
    groups: dict[tuple[Draw, Draw], list[float]] = {}
    for seed, effect in effects.items():
        groups.setdefault(drawn[seed], []).append(effect)
    return [float(np.mean(group)) if spread(group) else group[0] for group in groups.values()]


def over_settings(
    check: Check, comparisons: Sequence[Comparison], draws: Draws, ranges: Ranges
) -> tuple[Effect, list[float]] | None:
    """The mean over settings of a check that may be averaged, and its independent values.

    First the mean over settings within each seed that all settings have, then the interval over independent draws. None
    if there is no such seed, or only one setting.
    """
    seeds = sorted(set.intersection(*(set(one.pairs) for one in comparisons))) if len(comparisons) > 1 else []
    if not seeds or not check.averaged:
        return None
    effects = [check.effects(one) for one in comparisons]
    drawn = {seed: draws.of([cell for one in comparisons for cell in one.cells[seed]]) for seed in seeds}
    values = independent({seed: float(np.mean([by_seed[seed] for by_seed in effects])) for seed in seeds}, drawn)
    if not spread(values):
        return point(values), values
    lows, highs = zip(*(check.limits(one, ranges) for one in comparisons), strict=True)
    return limited(t_interval(values), values, (float(np.mean(lows)), float(np.mean(highs))), False), values


def differences(metric: str, other: str, ranges: Ranges) -> Range:
    """The possible differences of two metrics."""
    (low, high), (other_low, other_high) = range_of(metric, ranges), range_of(other, ranges)
    return low - other_high, high - other_low


def of(cells: Iterable[Cell], methods: Sequence[str]) -> list[Cell]:
    return [cell for cell in cells if cell.method in methods]


def _joined(setting: Setting, other: Setting) -> Setting:
    return tuple(theirs if ours is None else ours for ours, theirs in zip(setting, other, strict=True))
