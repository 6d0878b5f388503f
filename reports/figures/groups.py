"""Groups of cells for one figure each: those of one language model at one site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from reports.collect import Cell
from reports.looks import named


class Group(NamedTuple):
    """Cells of one figure. Its `title` and the `name` of its file have model, site, further keys and scale."""

    title: str
    name: str
    cells: list[Cell]


def by_model(cells: Sequence[Cell], *keys: str) -> list[Group]:
    """One group for every model and site, and for every value of further keys (as in `Cell.get`).

    Models are told apart by name, source and revision, since `model=local` and `model=hub` may be any. Where several
    models have one name, titles give source and revision, and files have a number.
    """
    models: dict[str, set[tuple[str, str]]] = defaultdict(set)
    groups: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        name, source, revision = (str(cell.get(f"model.{key}")) for key in ("name", "source", "revision"))
        models[name].add((source, revision))
        rest = [str(cell.get(key)) for key in ("stream.site", *keys)]
        groups[name, source, revision, *rest].append(cell)
    numbered = []
    for (name, source, revision, *rest), group in sorted(groups.items()):
        scale, same_name = group[0].scale, sorted(models[name])
        title, file = name, name
        if len(same_name) > 1:
            title = f"{name} {source}" + (f" at {revision}" if revision != "None" else "")
            file = f"{name}-{same_name.index((source, revision)) + 1}"
        title = ", ".join([*map(named, (title, *rest)), f"{scale} scale"])
        numbered.append(Group(title, "_".join([scale, file, *rest]), group))
    return numbered
