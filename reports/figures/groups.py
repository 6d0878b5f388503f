"""Which cells may stand in one figure: those of one language model at one site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from reports.collect import Cell


class Group(NamedTuple):
    """`title` and `name`, for titles and for files: model, site, values of the further keys, and scale."""

    title: str
    name: str
    cells: list[Cell]


def by_model(cells: Sequence[Cell], *keys: str) -> list[Group]:
    """The cells of every model and site, and of every value of further keys (as in `Cell.get`).

    A model is what was loaded: `model=local` and `model=hub` are names of many. Where several have one name, titles say
    source and revision, and files have a number.
    """
    models: dict[str, set[tuple[str, str]]] = defaultdict(set)
    groups: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        name, source, revision = (str(cell.get(f"model.{key}")) for key in ("name", "source", "revision"))
        models[name].add((source, revision))
        rest = [str(cell.get(key)) for key in ("stream.site", *keys)]
        groups[name, source, revision, *rest].append(cell)
    found = []
    for (name, source, revision, *rest), group in sorted(groups.items()):
        scale, same_name = group[0].scale, sorted(models[name])
        title, file = name, name
        if len(same_name) > 1:
            title = f"{name} {source}" + (f" at {revision}" if revision != "None" else "")
            file = f"{name}-{same_name.index((source, revision)) + 1}"
        found.append(Group(", ".join([title, *rest, f"{scale} scale"]), "_".join([scale, file, *rest]), group))
    return found
