"""Figures: `drawings(cells)` of a module with the experiment's name, here or in reports/papers/<paper>/figures.

`cells` are the finished cells of one experiment at one scale. A module says which figures there are, each with its
name, its cells, and how it is made. Here they are drawn. A cell with which a figure cannot be drawn is left out of it,
and a figure that cannot be drawn at all is left out of the report; both are named (`reports.left_out`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from core.atomic import write_atomically
from reports import looks
from reports.claims import PAPERS
from reports.collect import Cell
from reports.culprits import on_the_rest
from reports.safe_text import file_name


class Drawing(NamedTuple):
    """A figure to be drawn. `make` is given the cells, or some of them; it returns None where they are too few."""

    name: str  # of the file, without its ending
    cells: Sequence[Cell]
    make: Callable[[Sequence[Cell]], Figure | None]


def draw(experiment: str, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Draw the experiment's figures and return their paths, PNG and SVG.

    Empty for an experiment without a figure module, or with too few cells. Raises OSError if a file cannot be written.
    """
    written: list[Path] = []
    for name, content in drawn(experiment, cells):
        write_atomically(folder / name, content)
        written.append(folder / name)
    return written


def drawn(experiment: str, cells: Sequence[Cell]) -> Iterator[tuple[str, bytes]]:
    """File name and content of each figure, PNG and SVG."""
    names: set[str] = set()
    for module in modules(experiment) if cells else []:
        drawings, _ = on_the_rest(partial(_drawings, module), cells, f"the figures of {experiment}")
        for drawing in drawings or []:
            name = _new_name(file_name(drawing.name), names)
            files, _ = on_the_rest(partial(_files, drawing), drawing.cells, f"the figure {name}")
            for ending, content in (files or {}).items():
                yield f"{name}.{ending}", content


def modules(experiment: str) -> list[str]:
    """The dotted names of the experiment's figure modules."""
    own = [path for path in Path(__file__).parent.glob("*.py") if path.stem == experiment]
    papers = [path for path in PAPERS.glob("*/figures/*.py") if path.stem == experiment]
    names = [f"reports.figures.{path.stem}" for path in own]
    names += [f"reports.papers.{path.parts[-3]}.figures.{path.stem}" for path in papers]
    return [name for name in names if hasattr(import_module(name), "drawings")]


def _drawings(module: str, cells: Sequence[Cell]) -> list[Drawing]:
    return list(import_module(module).drawings(cells))


def _files(drawing: Drawing, cells: Sequence[Cell]) -> dict[str, bytes]:
    """Ending -> content; empty without a figure."""
    with looks.styled():
        figure = drawing.make(cells)
        return {} if figure is None else looks.rendered(figure)


def _new_name(name: str, names: set[str]) -> str:
    """The name, with a number if another figure already has it."""
    new = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(names) + 3))) if n not in names)
    names.add(new)
    return new
