"""The files beside a cell's results, as figures and tables read them. A damaged one is named and left out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa

from core.bench import TABLE
from core.errors import UserError
from core.reading import field as field_of
from core.reading import kind_of, read_object, read_table
from reports.left_out import note

Kind = Literal["number", "filled", "text"]  # numbers, some of which may be missing; numbers without gaps; texts
MAX_ROWS = 2_000_000
MAX_LISTED = 2000  # rows of a table.json
MAX_BYTES = 2**29  # of a table in memory
ALTERED = "altered files"  # in a cell's record: the names of those that are not what the run wrote
SCALARS = (str, int, float, bool, type(None))


class InFolder(Protocol):
    """A cell, as far as it is needed here."""

    @property
    def folder(self) -> Path: ...

    @property
    def record(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class SideTable:
    """A Parquet file beside results.json.

    columns  what it must have
    further  what it may have
    others   the kind of all its other columns; None: they are not read
    """

    name: str
    columns: Mapping[str, Kind]
    further: Mapping[str, Kind] = field(default_factory=dict)
    others: Kind | None = None

    def beside(self, cell: InFolder) -> pd.DataFrame | None:
        """The table of one cell; None if it has none, or one that cannot be used. That one is noted."""
        return None if self.name in cell.record.get(ALTERED, ()) else self.at(cell.folder)

    def at(self, folder: Path) -> pd.DataFrame | None:
        """As `beside`, in a folder."""
        path = folder / self.name
        if not os.path.lexists(path):
            return None
        try:
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size
            return _read(path, stamp, tuple(self.columns.items()), tuple(self.further.items()), self.others).copy()
        except OSError as error:
            note(path, error.strerror or error)
        except UserError as error:
            note(path, error)
        return None

    def has(self, cell: InFolder) -> bool:
        """Whether the cell has a table that can be used."""
        return self.beside(cell) is not None


@lru_cache(maxsize=256)
def _read(
    path: Path,
    stamp: tuple[int, int],
    columns: tuple[tuple[str, Kind], ...],
    further: tuple[tuple[str, Kind], ...],
    others: Kind | None,
) -> pd.DataFrame:
    """`stamp` changes when the file is written again. Raises UserError."""
    table = read_table(path, most_bytes=MAX_BYTES)
    if table.num_rows > MAX_ROWS:
        raise UserError(f"{path} has {table.num_rows:,} rows; the report reads up to {MAX_ROWS:,}.")
    if missing := [name for name, _ in columns if name not in table.column_names]:
        raise UserError(f"{path} has no column {', '.join(missing)}.")
    known = dict((*columns, *further))
    kinds = {name: known.get(name, others) for name in table.column_names}
    read = {name: _column(table, name, kind, path) for name, kind in kinds.items() if kind is not None}
    return pd.DataFrame(read)


def _column(table: pa.Table, name: str, kind: Kind, path: Path) -> pd.Series:
    """One column as numbers or texts. Raises UserError if it holds something else."""
    if table.column_names.count(name) > 1:
        raise UserError(f"{path} has more than one column {name}.")
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string() if kind == "text" else pa.float64())
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not (is_text if kind == "text" else is_number):
        raise UserError(
            f"{path}: the column {name} holds {column.type}, not {'texts' if kind == 'text' else 'numbers'}."
        )
    try:
        values = column.to_pandas()
    except (pa.ArrowException, ValueError, TypeError) as error:  # such as bytes that are not UTF-8
        raise UserError(f"{path}: the column {name} cannot be read ({str(error)[:120]}).") from error
    if kind != "text" and np.isinf(values.to_numpy(dtype=float, na_value=np.nan)).any():
        raise UserError(f"{path}: the column {name} holds an infinite number.")
    if kind == "filled" and values.isna().any():
        raise UserError(f"{path}: the column {name} has rows without a number.")
    return values


class Listing(NamedTuple):
    """The table and the notes that an experiment wrote for the report."""

    rows: list[dict[str, Any]]  # column -> text, number or None
    notes: list[str]


def listing(cell: InFolder) -> Listing | None:
    """What `table.json` beside a cell's results holds; None if it has none, or one that cannot be used (noted)."""
    path = cell.folder / TABLE
    if TABLE in cell.record.get(ALTERED, ()) or not os.path.lexists(path):
        return None
    try:
        return _listing(path)
    except UserError as error:
        note(path, error)
        return None


def _listing(path: Path) -> Listing:
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    content = read_object(path)
    rows, notes = field_of(content, "rows", list, path), field_of(content, "notes", list, path)
    if len(rows) > MAX_LISTED:
        raise UserError(f"{path} has {len(rows):,} rows; the report shows up to {MAX_LISTED:,}.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is {kind_of(row)}, not an object with keys.")
        if wrong := [key for key, value in row.items() if not isinstance(value, SCALARS)]:
            raise UserError(f"{path}: {wrong[0]} of row {number} is {kind_of(row[wrong[0]])}, not a text or a number.")
    if wrong_notes := [note for note in notes if not isinstance(note, str)]:
        raise UserError(f"{path}: a note is {kind_of(wrong_notes[0])}, not a text.")
    return Listing(rows, notes)
