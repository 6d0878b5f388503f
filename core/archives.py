"""Zip archives of numbers (`.pt`, `.npz`): no entry is unpacked before its size is known to be honest."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError, shown

PACKED = 4  # entries may declare this many times the file's size: numbers of weights shrink by less
SMALL_BYTES = 2**20  # or this much: a small file of zeros shrinks by more
CHUNK_BYTES = 2**20


@contextmanager
def archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive. Raises UserError if it would unpack to more than `PACKED` times its size, or names an entry twice;
    otherwise as `zipfile` does."""
    with zipfile.ZipFile(path) as content:
        entries, size = content.infolist(), path.stat().st_size
        declared = sum(entry.file_size for entry in entries)
        if declared > max(PACKED * size, SMALL_BYTES):
            raise UserError(
                f"{path} has {size:,} bytes and declares {declared:,} in its entries. No more than {PACKED} times a "
                "file's size is unpacked."
            )
        if len({entry.filename for entry in entries}) < len(entries):
            raise UserError(f"{path} has two entries of one name.")
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{path}: {shown(entry.filename)} is packed in a way that is not read.")
        yield content


def entry_bytes(content: zipfile.ZipFile, name: str) -> Tensor:
    """The bytes of an entry, uint8 `[n]`, checked against its CRC. Raises as `zipfile` does."""
    data = torch.empty(content.getinfo(name).file_size, dtype=torch.uint8)
    view, at = data.numpy().data, 0
    with content.open(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            view[at : at + len(chunk)] = chunk
            at += len(chunk)
    if at != len(data):
        raise zipfile.BadZipFile(f"{shown(name)} has {at:,} bytes instead of {len(data):,}")
    return data
