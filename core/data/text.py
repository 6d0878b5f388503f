"""One interface for text, wherever it comes from: a source yields documents, split by their content.

A source is anything with `name` and `documents(split, seed)`. The split of a document depends on its content alone
(`split_of`), so the same text never stands on both sides, whatever the source, its order or its revision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Split = Literal["train", "heldout"]
HELDOUT_FRACTION = 0.05


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `tag` names the subset it belongs to (`prose`, `code`, a subset of the Pile, ...), or is empty."""

    text: str
    tag: str = ""


@runtime_checkable
class TextSource(Protocol):
    """A place that documents come from.

    `documents` is deterministic in (split, seed): the same arguments give the same documents in the same order.
    It may end (a file) or go on for long (a streamed corpus); whoever needs more starts the next epoch with seed + 1.
    """

    name: str

    def documents(self, split: Split, seed: int) -> Iterator[Document]: ...


def split_of(content: str, heldout_fraction: float = HELDOUT_FRACTION) -> Split:
    """`heldout` for a fixed pseudo-random `heldout_fraction` of all contents, `train` for the rest."""
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout_fraction * 2**64 else "train"
