"""Curves along training or inference: `curves.parquet` beside a cell's results, a row for each run and step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import pandas as pd

from reports.collect import Cell, one_per_folder

CURVES = "curves.parquet"
RUN = ("seed", "coder.name", "coder.l1", "coder.k")  # keys of the runs of a cell
SETTINGS = (
    "part", "task", "profile", "objective", "coder.bias",
    "source.N", "source.M", "source.K", "source.zipf_alpha", "source.per_run",
)  # fmt: skip


def read_curves(cells: Iterable[Cell]) -> pd.DataFrame:
    """The curves of all runs in the cells' folders, with the settings that are the same for a whole cell.

    Columns: `RUN`, `SETTINGS`, step and the measurements. Empty if no folder has curves.
    """
    tables = []
    for cell in one_per_folder(cells):
        if (cell.folder / CURVES).is_file():
            table = _read(cell.folder / CURVES, _stamp(cell.folder / CURVES)).copy()
            for key in SETTINGS:
                if key not in table:
                    table[key] = pd.Series([cell.get(key)] * len(table), dtype=object)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*RUN, *SETTINGS, "step"])


def curve_of(cell: Cell) -> pd.DataFrame | None:
    """One run's curve in the order of steps; None if it has none."""
    path = cell.folder / CURVES
    if not path.is_file():
        return None
    table = _read(path, _stamp(path))
    for key in set(RUN) & set(table):
        value = cell.get(key)
        table = table[table[key].isna() if value is None else table[key] == value]
    return table.sort_values("step") if len(table) else None


def total_flops(table: pd.DataFrame, mode: str) -> pd.Series:
    """FLOPs of the training so far and of one inference on the test set."""
    return table[f"train_flops_{mode}"] + table[f"test_flops_{mode}"]


@lru_cache(maxsize=128)
def _read(path: Path, stamp: tuple[int, int]) -> pd.DataFrame:
    return pd.read_parquet(path)


def _stamp(path: Path) -> tuple[int, int]:
    """Changes when the file is written again."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
