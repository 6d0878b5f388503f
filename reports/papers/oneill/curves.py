"""Curves along training or inference: `curves.parquet` beside a cell's results, a row for each run and step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import pandas as pd

from reports.collect import Cell, one_per_folder

CURVES = "curves.parquet"
RUN = ("seed", "coder.name", "coder.l1", "coder.k")  # what tells the runs of a cell apart
SETTINGS = (
    "part", "task", "profile", "objective", "coder.bias",
    "source.N", "source.M", "source.K", "source.zipf_alpha", "source.per_run",
)  # fmt: skip


def read_curves(cells: Iterable[Cell]) -> pd.DataFrame:
    """The curves of all runs in the cells' folders, with the settings that are the same for a whole cell.

    Columns: `RUN`, `SETTINGS`, step, and what was measured. Empty if no folder has curves.
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
    """One run's curve, ordered by step; None where it has none."""
    path = cell.folder / CURVES
    if not path.is_file():
        return None
    table = _read(path, _stamp(path))
    for key in set(RUN) & set(table):
        value = cell.get(key)
        table = table[table[key].isna() if value is None else table[key] == value]
    return table.sort_values("step") if len(table) else None


def total_flops(table: pd.DataFrame, mode: str) -> pd.Series:
    """Training so far and one inference of the test set."""
    return table[f"train_flops_{mode}"] + table[f"test_flops_{mode}"]


@lru_cache(maxsize=128)
def _read(path: Path, stamp: tuple[int, int]) -> pd.DataFrame:
    return pd.read_parquet(path)


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
