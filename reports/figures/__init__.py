"""Figures, one module for each experiment that has some: `draw(cells, folder)` gives the files it wrote.

`cells` are the finished cells of one experiment at one scale. A module is found by the experiment's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from reports.collect import Cell


def draw(experiment: str, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """The experiment's figures as PNG and SVG; an empty list if it has no figure module or too few cells."""
    name = f"{__name__}.{experiment}"
    if not cells or find_spec(name) is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = import_module(name).draw(cells, folder)
    return found
