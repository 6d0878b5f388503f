"""Statistics of few runs: intervals over seeds, the sign test, and values of curves at a common L0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from core.seeding import derived_seed


@dataclass(frozen=True)
class Interval:
    """A mean (or another statistic) of `n` values and the ends of its confidence interval."""

    mean: float
    low: float
    high: float
    n: int


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and Student's t interval, for a handful of seeds. Needs two values to estimate their spread."""
    array = _finite(values, at_least=2)
    mean = float(array.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, len(array) - 1)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(mean, mean - half, mean + half, len(array))


def equivalence_interval(
    values: Sequence[float], sd: float | None = None, n: int | None = None, level: float = 0.05
) -> Interval:
    """The interval for two one-sided t tests at `level` that a mean lies within a margin around 0 (Schuirmann 1987).

    The mean is equivalent to 0 if the interval, with confidence 1 - 2 level, lies inside the margin. `values` are
    differences from a number. If the number is itself the mean of `n` runs of standard deviation `sd`, both spreads
    count, with Welch's degrees of freedom; else it is taken as exact.
    """
    if sd is None or n is None:
        return t_interval(values, 1 - 2 * level)
    if n < 2 or not sd >= 0:
        raise ValueError(f"A mean of {n} runs with a standard deviation of {sd} has no spread that can be used.")
    array = _finite(values, at_least=2)
    mean, ours, theirs = float(array.mean()), float(array.var(ddof=1)) / len(array), sd**2 / n
    if ours + theirs == 0:
        return Interval(mean, mean, mean, len(array))
    degrees = (ours + theirs) ** 2 / (ours**2 / (len(array) - 1) + theirs**2 / (n - 1))
    half = float(stats.t.ppf(1 - level, degrees)) * math.sqrt(ours + theirs)
    return Interval(mean, mean - half, mean + half, len(array))


def bootstrap_interval(
    values: Sequence[float],
    seed: int,
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = 0.95,
    n_resamples: int = 2000,
) -> Interval:
    """A statistic and its percentile bootstrap interval, for many values (tokens, latents, documents).

    `statistic` takes an `axis` argument as `numpy.mean` does. The same seed gives the same interval.
    """
    array = _finite(values, at_least=2)
    result = stats.bootstrap(
        (array,),
        statistic,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(derived_seed(seed, "bootstrap")),
        batch=max(1, 10_000_000 // len(array)),
    )
    low, high = result.confidence_interval
    return Interval(float(statistic(array, axis=0)), float(low), float(high), len(array))


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[n]`: for each column of scores `[N, n]` the chance that a row with label True has a higher score than one with
    label False; ties count one half. NaN where one of the two is missing."""
    positive = labels.astype(bool)
    n, others = int(positive.sum()), int((~positive).sum())
    if not n or not others:
        return np.full(scores.shape[1], np.nan)
    ranks = stats.rankdata(scores, axis=0)[positive].sum(0)
    return np.asarray((ranks - n * (n + 1) / 2) / (n * others))


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of the exact sign test of "positive and negative differences are equally likely".

    Zeros do not count; 1.0 if all are zero.
    """
    array = _finite(differences, at_least=1)
    positive, negative = int((array > 0).sum()), int((array < 0).sum())
    return float(stats.binomtest(positive, positive + negative, 0.5).pvalue) if positive + negative else 1.0


def least_p(n: int) -> float:
    """The smallest p-value that the sign test of n differences can have."""
    return min(1.0, 2 / 2**n)


def value_at_l0(l0: Sequence[float], values: Sequence[float], at: float) -> float | None:
    """A metric's curve over L0 at one L0, interpolated linearly in log L0 between the measured points.

    The points may come in any order. None if `at` is outside the measured L0: there is no extrapolation.
    """
    if len(l0) != len(values):
        raise ValueError(f"A curve needs one value per L0, not {len(values)} values for {len(l0)}.")
    x, y = _finite(l0, at_least=1), _finite(values, at_least=1)
    if (x <= 0).any() or len(np.unique(x)) < len(x):
        raise ValueError(f"The measured L0 must be positive and different from one another: {sorted(l0)}.")
    if not x.min() <= at <= x.max():
        return None
    order = np.argsort(x)
    return float(np.interp(math.log(at), np.log(x[order]), y[order]))


def _finite(values: Sequence[float], at_least: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"Needs at least {at_least} values in one list, not an array of shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError("NaN or infinity among the values: failed runs are counted, not averaged in.")
    return array
