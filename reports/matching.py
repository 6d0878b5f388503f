"""Match cells on settings, and tell them apart by method and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reports.collect import Cell

Setting = tuple[Any, ...]  # values of the keys on which cells are matched
NEUTRAL_KEYS = ("trainer.", "seed")  # prefixes of settings that never make two cells different
BARE_KEYS = ("model.name", "stream.site")  # labels give their values without the name of the key


class AmbiguousCellsError(ValueError):
    """Two cells that a check cannot tell apart."""


def by_setting(cells: Iterable[Cell], match: Sequence[str]) -> dict[Setting, dict[int, Cell]]:
    """setting -> seed -> cell, in the order of the settings."""
    groups: dict[Setting, dict[int, Cell]] = defaultdict(dict)
    for cell in cells:
        by_seed = groups[tuple(cell.get(key) for key in match)]
        if cell.seed in by_seed:
            raise AmbiguousCellsError(
                f"{_both(by_seed[cell.seed], cell)} have the same values of all settings on which cells are matched."
            )
        by_seed[cell.seed] = cell
    return {setting: groups[setting] for setting in sorted(groups, key=order)}


def _both(first: Cell, second: Cell) -> str:
    if first.folder == second.folder:
        return f"Two runs of {first.method} with seed {first.seed} in {first.folder}"
    return f"{first.folder} and {second.folder}"


def order(setting: Sequence[Any]) -> list[tuple[bool, float, str]]:
    """A key for sorting: missing values first, then numbers by size, then texts."""
    numbers = [value if isinstance(value, int | float) else np.inf for value in setting]
    return [(value is not None, number, str(value)) for value, number in zip(setting, numbers, strict=True)]


def in_series(settings: Iterable[Setting], match: Sequence[str], along: str | None) -> list[Setting]:
    """The settings. With `along`, only those that have a neighbour along this key."""
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
    """`match`, and all further settings in which cells differ that agree on `match`, method and seed.

    Only settings that all cells have are added.
    """
    groups = defaultdict(list)
    for cell in cells:
        groups[(cell.method, cell.seed, *(cell.get(key) for key in match))].append(cell)
    shared = set.intersection(*(set(cell.settings) for cell in cells)) if cells else set()
    differing = {
        key
        for group in groups.values()
        for key in shared
        if not key.startswith(NEUTRAL_KEYS) and len({cell.get(key) for cell in group}) > 1
    }
    return (*match, *sorted(differing - set(match)))


def words(match: Sequence[str], setting: Sequence[Any]) -> str:
    """`bundled, resid_pre.4, dict_size 512, k 16`"""
    parts = [
        shown(value) if key in BARE_KEYS else f"{key.rpartition('.')[2]} {shown(value)}"
        for key, value in zip(match, setting, strict=True)
        if value is not None
    ]
    return ", ".join(parts)


def shown(value: object) -> str:
    """A setting's value in words: empty for None, floats without trailing zeros."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
