"""How many draws of data, and of initialisation, stand behind a result.

A claims file says for its experiment what a seed draws anew (`draws: {data: ..., initialisation: ...}`):
  seed       every seed draws its own
  none       nothing is drawn
  <setting>  a setting decides: if it is true, every seed draws its own, else there is a draw for each of its values
`<one of these> unless <setting>` makes an exception where the setting has a value: a solver starts from nothing random.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from reports.collect import Cell

RULE = re.compile(r"([\w.]+)(?: unless ([\w.]+))?")
SEED, NONE = "seed", "none"

Draw = tuple[Hashable, ...]  # what was drawn for the cells of one seed


@dataclass(frozen=True)
class Draws:
    """The two rules of an experiment. Raises ValueError for a rule that is none."""

    data: str
    initialisation: str

    def __post_init__(self) -> None:
        for name, rule in (("data", self.data), ("initialisation", self.initialisation)):
            if not isinstance(rule, str) or not RULE.fullmatch(rule):
                raise ValueError(f"draws: {name}: {rule!r} is not `seed`, `none`, or the name of a setting")

    @property
    def settings(self) -> set[str]:
        """The settings that the rules read."""
        matches = [RULE.fullmatch(rule) for rule in (self.data, self.initialisation)]
        return {name for match in matches if match for name in match.groups() if name} - {SEED, NONE}

    def of(self, cells: Sequence[Cell]) -> tuple[Draw, Draw]:
        """What was drawn for these cells: data, initialisation. Equal draws are equal; None stands for no draw."""
        return tuple(_drawn(self.data, c) for c in cells), tuple(_drawn(self.initialisation, c) for c in cells)


def n_different(draws: Sequence[Draw]) -> int:
    """How many different ones; 0 if nothing was drawn."""
    return len({draw for draw in draws if any(one is not None for one in draw)})


def _drawn(rule: str, cell: Cell) -> Hashable:
    match = RULE.fullmatch(rule)
    assert match is not None  # __post_init__
    what, exception = match.groups()
    if what == NONE or (exception is not None and cell.get(exception) is not None):
        return None
    value: Any = True if what == SEED else cell.get(what)
    return ("seed", cell.seed) if value is True else ("value", str(value))
