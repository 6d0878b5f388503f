"""Curves along training or inference: `curves.parquet` beside a cell's results, a row for each run and step."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from reports.collect import Cell, one_per_folder
from reports.side_files import Kind, SideTable

RUN = ("seed", "coder.name", "coder.l1", "coder.k")  # keys of the runs of a cell
SETTINGS = (
    "part", "task", "profile", "objective", "coder.bias",
    "source.N", "source.M", "source.K", "source.zipf_alpha", "source.per_run",
)  # fmt: skip
FLOPS: dict[str, Kind] = dict.fromkeys(
    ("train_flops_paper", "test_flops_paper", "train_flops_corrected", "test_flops_corrected"), "number"
)
MEASURED: dict[str, Kind] = dict.fromkeys(("latent_mcc", "dict_mcc", "lost"), "number")
CURVES = SideTable(
    "curves.parquet",
    {"seed": "filled", "step": "filled", "coder.name": "text", **FLOPS},
    {"coder.l1": "number", "coder.k": "number", **MEASURED},
)


def read_curves(cells: Iterable[Cell]) -> pd.DataFrame:
    """The curves of all runs in the cells' folders, with the settings that are the same for a whole cell.

    Columns: `RUN`, `SETTINGS`, step, FLOPs and the measurements. Empty if no folder has curves.
    """
    tables = []
    for cell in one_per_folder(cells):
        table = CURVES.beside(cell)
        if table is not None:
            for key in SETTINGS:
                table[key] = pd.Series([cell.get(key)] * len(table), dtype=object)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*RUN, *SETTINGS, "step"])


def curve_of(cell: Cell) -> pd.DataFrame | None:
    """One run's curve in the order of steps; None if it has none."""
    table = CURVES.beside(cell)
    if table is None:
        return None
    for key in set(RUN) & set(table):
        value = cell.get(key)
        table = table[table[key].isna() if value is None else table[key] == value]
    return table.sort_values("step") if len(table) else None


def total_flops(table: pd.DataFrame, mode: str) -> pd.Series:
    """FLOPs of the training so far and of one inference on the test set."""
    return table[f"train_flops_{mode}"] + table[f"test_flops_{mode}"]
