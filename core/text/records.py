"""Records of text files: JSON objects, rows of Parquet, and the documents of plain text. A UserError names the place.

No reader holds more than one record of a file that is read in pieces (.txt, .jsonl, .parquet), or than the text of one
that must be read whole (.json).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import UserError
from core.reading import kind_of, parse_items, parse_json
from core.text.unpacking import (
    HEAD_BYTES,
    check_encoding,
    check_head,
    chunks,
    decoded,
    limit_of,
    reporting,
    too_long,
    unpacked,
)

Located = tuple[str, Mapping[str, Any]]  # the place of a record, for messages, and the record
ROWS_PER_BATCH = 256
LEAST_UNPACKED = 2**28  # bytes that a row group may always declare, however small the file is
UNPACKED_PER_BYTE = 100  # and for each byte of the file
ROWS_PER_BYTE = 1000  # that a file may declare
DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError)
JSON_FORMS = "A .jsonl file has one JSON object per line, a .json file is a list of objects."


def read_jsonl(path: Path) -> Iterator[Located]:
    """The objects of a file with one JSON object per line; blank lines are skipped."""
    limit = limit_of(path)
    offset, number = 0, 0
    with unpacked(path) as file:
        while line := file.readline(-1 if limit is None else limit + 1):
            number += 1
            where = f"{path}, line {number}"
            if limit is not None and len(line) > limit:
                raise too_long(path, where)
            if not offset:
                check_encoding(line[:HEAD_BYTES], path)
            text, n_bytes = decoded(line, path, offset, number).rstrip("\r\n"), len(line)
            del line  # it may be as long as the file
            offset += n_bytes
            if text.strip():
                yield _object(_parsed(text, path, number), where)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return parse_json(text, f"data.path: {path}", line)
    except UserError as error:
        raise UserError(f"{error} {JSON_FORMS}") from error.__cause__


def read_json(path: Path) -> Iterator[Located]:
    """The objects of a file that is a JSON list of objects, or a single object."""
    limit = limit_of(path)
    with unpacked(path) as file:
        content = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(content) > limit:
        raise too_long(path, str(path))
    check_encoding(content[:HEAD_BYTES], path)
    text = decoded(content, path)
    del content
    items = parse_items(text, f"data.path: {path}")
    index = 0
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except UserError as error:
            raise UserError(f"{error} {JSON_FORMS}") from error.__cause__
        yield _object(item, f"{path}, item {index}")
        index += 1


def _object(item: Any, where: str) -> Located:
    if not isinstance(item, Mapping):
        raise UserError(f"data.path: {where} is {kind_of(item)}, not a JSON object that contains a text.")
    return where, item


def read_txt(path: Path, separator: str | None) -> Iterator[tuple[str, str]]:
    """The place and the text of each document of a plain text: what stands between separators, or all of it."""
    limit = limit_of(path)
    pending: list[str] = []  # text without a separator
    rest = ""  # the end of the text so far, in which a separator may begin
    n_chars, number = 0, 1
    for chunk in chunks(path):
        *whole, last = (rest + chunk).split(separator) if separator else [rest + chunk]
        for piece in whole:
            pending.append(piece)
            document = "".join(pending)
            pending.clear()
            yield f"{path}, document {number}", document
            number, n_chars = number + 1, 0
        rest = last[1 - len(separator) :] if separator and len(separator) > 1 else ""
        pending.append(last.removesuffix(rest))
        n_chars += len(pending[-1])
        if limit is not None and n_chars > limit:
            raise too_long(path, f"{path}, document {number}")
    pending.append(rest)
    document = "".join(pending)
    pending.clear()
    yield f"{path}, document {number}" if number > 1 else str(path), document


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Located]:
    """The rows of a Parquet file, of some of its columns, one row group after another."""
    n_rows = 0
    with reporting(path), path.open("rb") as raw:
        check_head(path, raw.read(HEAD_BYTES))
    place = str(path)
    try:
        with pq.ParquetFile(path, read_dictionary=_texts(path, columns), page_checksum_verification=True) as file:
            _check_declared(path, file)
            for group in range(file.num_row_groups):
                place = f"{path}, row group {group}"
                for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=list(columns)):
                    for row in zip(*batch.columns, strict=True):
                        n_rows += 1
                        values = (value.as_py() for value in row)
                        yield f"{path}, row {n_rows}", dict(zip(batch.schema.names, values, strict=True))
    except UserError:
        raise
    except DAMAGE as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"data.path: {place} cannot be read as Parquet: {cause:.200}. Is the file damaged, or cut?"
        ) from error


def parquet_columns(path: Path) -> list[str]:
    """The names of its columns. Raises UserError for a file that is not Parquet."""
    with reporting(path), path.open("rb") as raw:
        check_head(path, raw.read(HEAD_BYTES))
    try:
        return list(pq.read_schema(path).names)
    except DAMAGE as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"data.path: {path} cannot be read as Parquet: {cause:.200}") from error


def _texts(path: Path, columns: Sequence[str]) -> list[str]:
    """The columns of text: equal values are kept once, as the file may hold them once for any number of rows."""
    schema = pq.read_schema(path)
    return [name for name in columns if pa.types.is_string(schema.field(name).type)]


def _check_declared(path: Path, file: pq.ParquetFile) -> None:
    """Raises UserError for a file that declares more than it can hold. Metadata of single columns are not looked at:
    where they are damaged, the library ends the process."""
    metadata, n_bytes = file.metadata, path.stat().st_size
    if metadata.num_rows > ROWS_PER_BYTE * n_bytes:
        raise UserError(f"data.path: {path} declares {metadata.num_rows:,} rows in {n_bytes:,} bytes. Is it damaged?")
    for group in range(metadata.num_row_groups):
        declared = metadata.row_group(group).total_byte_size
        if declared > max(LEAST_UNPACKED, UNPACKED_PER_BYTE * n_bytes):
            raise UserError(
                f"data.path: {path}, row group {group} declares {declared:,} bytes in a file of {n_bytes:,}. "
                "Is it damaged? If not, write it in smaller row groups."
            )
