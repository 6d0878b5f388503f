"""Do something with cells, and where it raises, with those that can bear it.

A cell that is readable may still hold a setting or a metric that a figure or a check cannot take: a text where all
others have a number, a size of 0. Then the cell is found, named and left out, and the rest is reported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reports.collect import Cell
from reports.left_out import described, note

MOST = 3  # folders that are left out before all of it is
T = TypeVar("T")


def on_the_rest(do: Callable[[Sequence[Cell]], T], cells: Sequence[Cell], what: str) -> tuple[T | None, list[Cell]]:
    """What `do` makes of the cells, and the cells of which it made it. `what` names it where cells are left out.

    If `do` raises, the folders are ordered from ordinary to odd ones, the first with which it raises is left out, and
    `do` is tried again. If that does not help, nothing is made: None and no cells.
    """
    left, found = list(cells), dict[Path, str]()
    first: Exception | None = None
    while left and len(found) <= MOST:
        try:
            made = do(left)
        except Exception as error:
            first = first or error
            folder, cause = _culprit(do, left, error)
            found[folder] = described(cause)
            left = [cell for cell in left if cell.folder != folder]
        else:
            for folder, why in found.items():
                note(f"{folder}, in {what}", why)
            return made, left
    if first is not None:
        note(what, described(first))
    return None, []


def _culprit(do: Callable[[Sequence[Cell]], object], cells: Sequence[Cell], error: Exception) -> tuple[Path, Exception]:
    """The last of the fewest folders with which `do` raises, and its error. It raises `error` with all of them."""
    folders = ordinary_first(cells)
    most, fewest = len(folders), 0  # it raises with `most` of them, and is not known to raise with `fewest`
    while most - fewest > 1:
        middle = (most + fewest) // 2
        chosen = set(folders[:middle])
        try:
            do([cell for cell in cells if cell.folder in chosen])
            fewest = middle
        except Exception as raised:
            most, error = middle, raised
    return folders[most - 1], error


def ordinary_first(cells: Sequence[Cell]) -> list[Path]:
    """The cells' folders by the number of settings and metrics whose kind of value is not that of most cells."""
    kinds = [_kinds(cell) for cell in cells]
    votes: dict[str, Counter[str]] = {key: Counter() for key in dict.fromkeys(key for own in kinds for key in own)}
    for key, counter in votes.items():
        counter.update(own.get(key, "missing") for own in kinds)
    usual = {key: counter.most_common(1)[0][0] for key, counter in votes.items()}
    oddness: dict[Path, int] = {}
    for cell, own in zip(cells, kinds, strict=True):
        n_odd = sum(own.get(key, "missing") != kind for key, kind in usual.items())
        oddness[cell.folder] = max(n_odd, oddness.get(cell.folder, 0))
    return sorted(oddness, key=lambda folder: oddness[folder])


def _kinds(cell: Cell) -> dict[str, str]:
    values: Mapping[str, Any] = {**cell.settings, **{f"metrics.{name}": value for name, value in cell.metrics.items()}}
    return {key: _kind(value) for key, value in values.items()}


def _kind(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number" if _finite(value) and value > 0 else "number not above 0"
    return type(value).__name__


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
