"""The kinds of checks that a claim can have (`check:` in reports/papers/<paper>/claims/*.yaml).

A check turns cells into comparisons: at one setting, the value measured on each seed and the value to compare it with.
Seeds are paired: a comparison keeps only the seeds that both sides have. Settings are paired too, except those that one
of the methods does not have at all (the k of an L0 oracle, the penalty of a TopK).

Directions (reports/checks/directions.py), judged at every scale:
  paired        one method against another, at equal settings
  ordered       several methods, each against the next
  monotone      a method against itself, at neighbouring values of one setting
  peak          a method at some values of a setting against each of its other values
  interpolated  a method against another one's curve over L0, at the same measured L0; nothing is extrapolated
Sizes (reports/checks/sizes.py), judged at paper scale; at demo scale `margin` and `change` are judged as directions:
  within        a metric over a reference (a setting, another metric or a number), which must lie in an interval
  margin        the difference of two methods, or of two metrics, which must lie in an interval
  change        the difference between two values of one setting, which must lie in an interval
  near          a metric's mean over seeds beside published numbers, each with a margin

`reports/checks/outcomes.py` has what one comparison shows, `reports/verdicts.py` the rule and what a claim gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from reports.checks.base import Check, Comparison
from reports.checks.directions import Interpolated, Monotone, Ordered, Paired, Peak
from reports.checks.sizes import Change, Margin, Near, Within
from reports.collect import Cell
from reports.matching import refined

KINDS: Mapping[str, Callable[..., Check]] = {
    "paired": Paired,
    "ordered": Ordered,
    "monotone": Monotone,
    "peak": Peak,
    "interpolated": Interpolated,
    "within": Within,
    "margin": Margin,
    "change": Change,
    "near": Near,
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
    _has_lists(check)
    along = lists.get("along")
    if along is not None and along not in check.match:
        raise ValueError(f"along: {along} is not among the settings that cells are matched on: {', '.join(match)}")
    return check


def _has_lists(check: Check) -> None:
    """Raises ValueError for one name, or none, where a list of names belongs."""
    for key in ("methods", "over", "points", "knobs", "at"):
        value = getattr(check, key, ("",))
        if not isinstance(value, tuple) or not value:
            raise ValueError(f"{key}: {value!r} is not a list with something in it")


def compare(check: Check, cells: Sequence[Cell]) -> list[Comparison]:
    """The check's comparisons.

    Where cells agree on all settings of `match`, the other settings in which they differ are matched as well.
    """
    return replace(check, match=refined(cells, check.match)).compare(cells)
