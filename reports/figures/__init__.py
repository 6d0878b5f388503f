"""Figures: `draw(cells, folder)` of a module with the experiment's name, here or in reports/papers/<paper>/figures.

`cells` are the finished cells of one experiment at one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from reports import looks
from reports.claims import PAPERS
from reports.collect import Cell


def draw(experiment: str, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Draw the experiment's figures and return their paths, PNG and SVG.

    Empty for an experiment without a figure module, or with too few cells.
    """
    here = Path(__file__).parent
    modules = [f"reports.figures.{path.stem}" for path in here.glob(f"{experiment}.py")]
    modules += [
        f"reports.papers.{path.parts[-3]}.figures.{path.stem}" for path in PAPERS.glob(f"*/figures/{experiment}.py")
    ]
    if not cells or not modules:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with looks.styled():
        for module in modules:
            written += import_module(module).draw(cells, folder)
    return written
