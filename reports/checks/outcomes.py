"""What one comparison shows: it holds, it fails, or it is inconclusive. The rule is told in `reports/verdicts.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from core.metrics.statistics import Interval, t_interval

Outcome = Literal["holds", "fails", "inconclusive"]
HOLDS: Outcome = "holds"
FAILS: Outcome = "fails"
INCONCLUSIVE: Outcome = "inconclusive"

Range = tuple[float, float]
UNLIMITED: Range = (-np.inf, np.inf)
ROUNDING = 1e-6  # a measured value may leave its metric's range by this much
SAME = 1e-12  # values that differ by less, relative to their size, are the same but for rounding
FORM = re.compile(r"(\+?)\.(\d+)([g%])")
MOST_DIGITS = 12


@dataclass(frozen=True)
class Region:
    """The values that a check accepts, from `low` to `high`. `strict`: without its ends."""

    low: float = -np.inf
    high: float = np.inf
    strict: bool = False

    def contains(self, low: float, high: float) -> bool:
        """Whether the interval lies wholly inside."""
        return self.low < low and high < self.high if self.strict else self.low <= low and high <= self.high

    def excludes(self, low: float, high: float) -> bool:
        """Whether the interval lies wholly outside."""
        return high <= self.low or self.high <= low if self.strict else high < self.low or self.high < low


@dataclass(frozen=True)
class Effect(Interval):
    """A mean over `n` independent values, and its interval where n > 1.

    runs  the values one by one, where they are shown in the place of the interval
    """

    runs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a comparison shows, from one value for each independent draw of data and initialisation."""

    outcome: Outcome
    effect: Effect
    region: Region
    values: tuple[float, ...]
    n_seeds: int
    n_data: int  # different draws of data
    n_initialisations: int  # different draws of an initialisation; 0: nothing is drawn

    @property
    def single(self) -> bool:
        """Whether one value stands behind it, so that there is no spread and no interval."""
        return self.effect.n == 1

    def as_json(self) -> dict[str, Any]:
        """For programs to read. An end that is not there is null."""
        low, high = ends(self.effect) if not self.single else (None, None)
        return {
            "outcome": self.outcome,
            "n": self.effect.n,
            "draws_of_data": self.n_data,
            "draws_of_initialisation": self.n_initialisations,
            "effect": self.effect.mean,
            "interval": [low, high],
            "accepted": [end if np.isfinite(end) else None for end in (self.region.low, self.region.high)],
        }

    @property
    def relative_slack(self) -> float:
        """The distance of the interval (or the value) from the region's nearer end, negative where it is beyond; in
        widths of the region, if it has two ends."""
        low, high = ends(self.effect)
        distance = min(low - self.region.low, self.region.high - high)
        width = self.region.high - self.region.low
        return distance / width if np.isfinite(width) else distance


def effect_of(values: Sequence[float], limits: Range = UNLIMITED, runs: bool = False) -> Effect:
    """Mean and 95 % t interval of independent values, within the limits of what can be measured."""
    return limited(t_interval(values), values, limits, runs) if spread(values) else point(values)


def point(values: Sequence[float]) -> Effect:
    """Values that are all the same: no interval."""
    return Effect(float(np.mean(values)), np.nan, np.nan, 1)


def spread(values: Sequence[float]) -> bool:
    """Whether there are two values that differ by more than the last digits of a difference."""
    return max(values) - min(values) > SAME * max(map(abs, values))


def limited(interval: Interval, values: Sequence[float], limits: Range, runs: bool) -> Effect:
    """The interval without the part that no value can have: what is left covers the true mean as often.

    It never excludes what was measured, even if the limits do.
    """
    within = min(limits[0], *values), max(limits[1], *values)
    low, high = (float(np.clip(end, *within)) for end in (interval.low, interval.high))
    return Effect(interval.mean, low, high, interval.n, tuple(values) if runs else ())


def outcome_of(
    effect: Effect, values: Sequence[float], region: Region, each: Literal["", "shown", "claimed"]
) -> Outcome:
    """The outcome of one comparison.

    each  `shown`: values that come in clusters must each agree with the interval. `claimed`: the claim is about every
          seed, so that one value outside the region is enough to fail.
    """
    inside = [region.contains(value, value) for value in values]
    if effect.n == 1:
        return HOLDS if inside[0] else FAILS
    if each == "claimed" and not all(inside):
        return FAILS
    if region.contains(effect.low, effect.high) and (not each or all(inside)):
        return HOLDS
    if region.excludes(effect.low, effect.high) and (not each or not any(inside)):
        return FAILS
    return INCONCLUSIVE


def ends(effect: Interval) -> Range:
    return (effect.low, effect.high) if effect.n > 1 else (effect.mean, effect.mean)


def range_of(metric: str, ranges: Mapping[str, Range]) -> Range:
    """The values that a metric can have, from a table of names or patterns (`*_mcc`); the first that fits counts."""
    return next((limits for pattern, limits in ranges.items() if fnmatchcase(metric, pattern)), UNLIMITED)


def spelled(value: Interval, form: str) -> str:
    """`0.873 [0.860, 0.886]`, with more digits than the form has where the ends would look the same.

    One value has no interval. Runs that are shown one by one stand in its place.
    """
    if isinstance(value, Effect) and value.runs:
        return f"{format(value.mean, form)} (runs {', '.join(format(run, form) for run in value.runs)})"
    if value.n < 2:
        return format(value.mean, form)
    form = enough_digits(value, form)
    return f"{format(value.mean, form)} [{format(value.low, form)}, {format(value.high, form)}]"


def enough_digits(value: Interval, form: str) -> str:
    """The form, with as many digits as it takes to show how wide the interval is, to within a quarter."""
    match = FORM.fullmatch(form)
    if match is None:
        raise ValueError(f"{form!r} is not a form such as .3g or +.1%")
    sign, digits, kind = match.groups()
    width = value.high - value.low
    for precision in range(int(digits), MOST_DIGITS):
        finer = f"{sign}.{precision}{kind}"
        if abs(_read(value.high, finer) - _read(value.low, finer) - width) <= width / 4:
            return finer
    return form


def _read(number: float, form: str) -> float:
    """The number as it is read from its form."""
    text = format(number, form)
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
