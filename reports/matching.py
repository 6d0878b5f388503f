"""Which cells belong together: cells are matched on settings, and told apart by method and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reports.collect import Cell

Setting = tuple[Any, ...]  # the values of the keys that cells are matched on
NEUTRAL_KEYS = ("trainer.", "seed")  # settings that never tell two cells apart
BARE_KEYS = ("model.name", "stream.site")  # labels give their values without their names


class AmbiguousCellsError(ValueError):
    """Two cells that a check cannot tell apart."""


def by_setting(cells: Iterable[Cell], match: Sequence[str]) -> dict[Setting, dict[int, Cell]]:
    """setting -> seed -> cell, in the order of the settings."""
    found: dict[Setting, dict[int, Cell]] = defaultdict(dict)
    for cell in cells:
        by_seed = found[tuple(cell.get(key) for key in match)]
        if cell.seed in by_seed:
            raise AmbiguousCellsError(f"{_both(by_seed[cell.seed], cell)} differ in nothing that cells are matched on.")
        by_seed[cell.seed] = cell
    return {setting: found[setting] for setting in sorted(found, key=order)}


def _both(first: Cell, second: Cell) -> str:
    if first.folder == second.folder:
        return f"Two runs of {first.method} with seed {first.seed} in {first.folder}"
    return f"{first.folder} and {second.folder}"


def order(setting: Sequence[Any]) -> list[tuple[bool, float, str]]:
    """A key for sorting: numbers by size, then texts; what a cell does not have comes first."""
    numbers = [value if isinstance(value, int | float) else np.inf for value in setting]
    return [(value is not None, number, str(value)) for value, number in zip(setting, numbers, strict=True)]


def in_series(settings: Iterable[Setting], match: Sequence[str], along: str | None) -> list[Setting]:
    """The settings, or only those that have a neighbour along one key."""
    settings = list(settings)
    if along is None:
        return settings
    at = match.index(along)
    values = defaultdict(set)
    for setting in settings:
        if setting[at] is not None:
            values[setting[:at] + setting[at + 1 :]].add(setting[at])
    return [s for s in settings if s[at] is not None and len(values[s[:at] + s[at + 1 :]]) > 1]


def refined(cells: Sequence[Cell], match: tuple[str, ...]) -> tuple[str, ...]:
    """`match` and the settings, known to all cells, in which cells differ that agree on `match`, method and seed."""
    groups = defaultdict(list)
    for cell in cells:
        groups[(cell.method, cell.seed, *(cell.get(key) for key in match))].append(cell)
    shared = set.intersection(*(set(cell.settings) for cell in cells)) if cells else set()
    told_apart = {
        key
        for group in groups.values()
        for key in shared
        if not key.startswith(NEUTRAL_KEYS) and len({cell.get(key) for cell in group}) > 1
    }
    return (*match, *sorted(told_apart - set(match)))


def words(match: Sequence[str], setting: Sequence[Any]) -> str:
    """`bundled, resid_pre.4, dict_size 512, k 16`"""
    parts = [
        shown(value) if key in BARE_KEYS else f"{key.rpartition('.')[2]} {shown(value)}"
        for key, value in zip(match, setting, strict=True)
        if value is not None
    ]
    return ", ".join(parts)


def shown(value: object) -> str:
    """A setting's value: nothing for None, floats without their trailing zeros."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
