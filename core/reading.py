"""The one reader of JSON and of Parquet tables. Whatever a file holds, it is read, or a UserError names it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import UserError

MAX_JSON_BYTES = 64 * 2**20  # descriptions and results are far smaller
MAX_TABLE_BYTES = 4 * 2**30  # in memory, as the file declares it
POINTER = b"version https://git-lfs.github.com/spec"  # how a pointer of Git LFS starts

_NO_SPACE = re.compile(r"[^ \t\n\r]")

T = TypeVar("T")
_KINDS: Mapping[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    list: "a list",
    dict: "an object with keys",
    type(None): "null",
}


def parse_json(text: str | bytes, where: str, first_line: int | None = None) -> Any:
    """The value of a JSON text. `where` names its origin in the error; with `first_line`, the error also says the line.

    Raises UserError, also for nesting that is too deep and for numbers of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {(first_line or 1) + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{where}, {line}: not JSON ({error.msg}).") from error
    except (ValueError, RecursionError, MemoryError) as error:
        line = f", line {first_line}" if first_line else ""
        raise UserError(f"{where}{line}: not JSON that can be read ({_cause(error)}).") from error


def parse_items(text: str, where: str) -> Iterator[Any]:
    """The items of a JSON list one after another, or the only value, if it is no list. Raises UserError.

    A whole list of small items would take many times the memory of its text."""
    decoder, at = json.JSONDecoder(), _space(text, 0)
    if text[at : at + 1] != "[":
        yield parse_json(text, where)
        return
    try:
        at = _space(text, at + 1)
        more = text[at : at + 1] != "]"
        while more:
            item, at = decoder.raw_decode(text, at)
            yield item
            at = _space(text, at)
            more = text[at : at + 1] == ","
            if more:
                at = _space(text, at + 1)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if (end := _space(text, at + 1)) != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from error
    except (ValueError, RecursionError, MemoryError) as error:
        line = text.count("\n", 0, at) + 1
        raise UserError(f"{where}, line {line}: not JSON that can be read ({_cause(error)}).") from error


def _space(text: str, at: int) -> int:
    """The place of the first character from `at` on that is no space."""
    found = _NO_SPACE.search(text, at)
    return found.start() if found else len(text)


def read_json(path: Path) -> Any:
    """The value in a JSON file of UTF-8. Raises UserError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; JSON is read up to {MAX_JSON_BYTES:,}.")
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON: byte {error.start} is not UTF-8.") from error
    if content.startswith(POINTER):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it: git lfs pull")
    return parse_json(text, str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is {kind_of(content)}, not an object with keys.")
    return content


def field(content: Mapping[str, Any], key: str, kind: type[T], where: object) -> T:
    """The value of a key as str, bool, int, float, list or dict. `where` names the file in the error.

    A whole float such as 4.0 is taken for an int, an int for a float. Raises UserError if the key is missing, if the
    value is of another kind, or if it is a number that is not finite.
    """
    if key not in content:
        raise UserError(f"{where} has no {key}.")
    value = content[key]
    number = not isinstance(value, bool) and isinstance(value, int | float)
    try:
        if kind is float and number and math.isfinite(value):
            return cast(T, float(value))
        if kind is int and number and math.isfinite(value) and value == int(value):
            return cast(T, int(value))
    except OverflowError:  # an integer beyond any float
        pass
    if kind in (int, float) or not isinstance(value, kind):
        raise UserError(f"{where}: {key} is {kind_of(value)}, not {_KINDS[kind]}.")
    return value


def optional_field(content: Mapping[str, Any], key: str, kind: type[T], where: object) -> T | None:
    """As `field`; None if the key is missing or null."""
    return None if content.get(key) is None else field(content, key, kind, where)


def kind_of(value: object) -> str:
    """What a JSON value is, in words; numbers and short texts themselves."""
    if isinstance(value, int | float | str) and not isinstance(value, bool) and len(shown := _shown(value)) <= 40:
        return shown
    if isinstance(value, bool):
        return str(value).lower()
    return _KINDS.get(type(value), type(value).__name__)


def read_table(path: Path, columns: Sequence[str] | None = None, most_bytes: int | None = None) -> pa.Table:
    """A Parquet table, or some of its columns. Raises UserError for a file that is missing, damaged or not Parquet, for
    a column that it lacks, and for a table that would need more memory than `most_bytes` (None: 4 GiB)."""
    if not path.is_file():
        raise UserError(f"{path} is missing.")
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}.")
            declared = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            n_columns = len(columns or file.schema_arrow.names)
            if max(declared, 8 * file.metadata.num_rows * n_columns) > (most_bytes or MAX_TABLE_BYTES):
                raise UserError(f"{path} declares {file.metadata.num_rows:,} rows of {declared:,} bytes: too many.")
            return file.read(columns=None if columns is None else list(columns))
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError) as error:
        raise UserError(f"{path} is not a whole Parquet table ({_cause(error)}).") from error


def read_rows(path: Path, columns: Sequence[str] | None = None, most_bytes: int | None = None) -> list[dict[str, Any]]:
    """The rows of a Parquet table, by column. Raises UserError as `read_table`, and for values that are no values."""
    table = read_table(path, columns, most_bytes)
    try:
        return cast(list[dict[str, Any]], table.to_pylist())
    except (pa.ArrowException, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} holds values that cannot be read ({_cause(error)}).") from error


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"


def _cause(error: BaseException) -> str:
    return f"{str(error).strip().partition(chr(10))[0]:.160}" or type(error).__name__
