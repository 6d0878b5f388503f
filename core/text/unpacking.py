"""Text files as streams of bytes and of characters, unpacked where they are compressed. A UserError names the file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from core.errors import UserError
from core.reading import POINTER
from core.text.finding import COMPRESSIONS, format_of

HEAD_BYTES = 512
CHUNK_BYTES = 2**20
LEAST_LIMIT = 2**24  # bytes that a document of a compressed file may always have when it is unpacked
LIMIT_PER_BYTE = 4  # and as many more for each byte of the file
FAILURES = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
ARROW_NAMES = {".zst": "zstd", ".lz4": "lz4"}
MAGICS = {
    b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst",
    b"\x04\x22\x4d\x18": ".lz4", b"PK\x03\x04": ".zip", b"PAR1": ".parquet",
}  # fmt: skip
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def compression_of(path: Path) -> str | None:
    ending = path.suffix.lower()
    return ending if ending in COMPRESSIONS else None


def limit_of(path: Path) -> int | None:
    """How many bytes one document of a file may have when it is unpacked; None: the file holds no more than it shows.

    A small file can unpack to more than any memory."""
    return None if compression_of(path) is None else LEAST_LIMIT + LIMIT_PER_BYTE * path.stat().st_size


def too_long(path: Path, where: str) -> UserError:
    return UserError(
        f"data.path: {where} is a document of more than {limit_of(path) or 0:,} bytes, in a file of "
        f"{path.stat().st_size:,}. Unpack the file if that is right."
    )


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into a UserError that names it."""
    try:
        yield
    except FAILURES as error:
        raise UserError(
            f"data.path: {path} cannot be read: {error!s:.200}. Is it damaged, or not copied to its end?"
        ) from error


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file's content as bytes. Raises UserError for one that is damaged or of another kind than its ending says."""
    with reporting(path):
        with path.open("rb") as raw:
            check_head(path, raw.read(HEAD_BYTES))
        with _opened(path) as file:
            yield file


def _opened(path: Path) -> BinaryIO:
    compression = compression_of(path)
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if compression in (".xz", ".lzma"):
        return cast(BinaryIO, lzma.open(path))
    if compression in ARROW_NAMES:
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression=ARROW_NAMES[compression])))
    return path.open("rb")


def check_head(path: Path, head: bytes) -> None:
    """Raises UserError for a file whose first bytes are those of another kind than its name says."""
    if head.startswith(POINTER):
        raise UserError(f"data.path: {path} is a pointer of Git LFS, not the file itself. Fetch it: git lfs pull")
    compression = compression_of(path)
    real = next((ending for magic, ending in MAGICS.items() if head.startswith(magic)), None)
    if real == ".bz2" and head[4:10] != b"1AY&SY":
        real = None
    if real in (None, compression, format_of(path)):
        return
    what = "Parquet" if real == ".parquet" else f"packed as {real}"
    name = path.with_suffix(real).name if compression or real == ".parquet" else f"{path.name}{real}"
    advice = f"Name it {name}." if format_of(Path(name)) else "Unpack it."
    raise UserError(f"data.path: {path} is {what}, which its name does not say. {advice}")


def check_encoding(head: bytes, path: Path) -> None:
    """Raises UserError for text in two or four bytes per character; much of it would pass for UTF-8 with zeros."""
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    n_zeros = head.count(0)
    if marked or (n_zeros > 1 and 4 * n_zeros > len(head)):
        name = marked or "UTF-16"
        looks = f"is {name}" if marked else f"looks like {name}: every other byte of its beginning is zero"
        raise UserError(
            f"data.path: {path} {looks}, not UTF-8. Convert it, for instance with: "
            f"iconv -f {name.lower()} -t utf-8 {path.name}"
        )


def decoded(content: bytes, path: Path, offset: int = 0, line: int | None = None) -> str:
    """UTF-8 (with or without a byte-order mark) -> text. `offset` is the position of the bytes in the unpacked file."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start, content[error.start], line) from error


def not_utf8(path: Path, place: int, byte: int, line: int | None = None) -> UserError:
    where = "" if line is None else f" in line {line}"
    return UserError(
        f"data.path: {path} is not UTF-8: byte {place} (0x{byte:02x}){where} cannot be decoded. Convert it, for "
        f"instance with: iconv -f <its encoding> -t utf-8 {path.name}"
    )


def chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces, with `\\n` for `\\r\\n`. Raises UserError for what is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_read, held = 0, ""  # held: a carriage return at the end of a chunk
    with unpacked(path) as file:
        while True:
            raw = file.read(CHUNK_BYTES)
            if n_read == 0:
                check_encoding(raw[:HEAD_BYTES], path)
            try:
                text = held + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                begin = n_read + len(raw) - len(error.object)  # the decoder keeps the bytes of a cut character
                raise not_utf8(path, begin + error.start, error.object[error.start]) from error
            if n_read == 0:
                text = text.removeprefix("\ufeff")
            n_read += len(raw)
            held = "\r" if text.endswith("\r") and raw else ""
            yield text.removesuffix(held).replace("\r\n", "\n")
            if not raw:
                return
