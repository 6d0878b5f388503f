"""What a user should know about a cell's results, in sentences: said on standard error, and kept in results.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from core.notices import say_once

_remarks: ContextVar[list[str] | None] = ContextVar("remarks", default=None)


@contextmanager
def remarking() -> Iterator[list[str]]:
    """Collect what is remarked inside the block, for instance while a cell runs."""
    remarks: list[str] = []
    token = _remarks.set(remarks)
    try:
        yield remarks
    finally:
        _remarks.reset(token)


def remark(sentence: str) -> None:
    """Say a sentence, once in a process, and keep it for the running cell."""
    say_once(sentence)
    remarks = _remarks.get()
    if remarks is not None and sentence not in remarks:
        remarks.append(sentence)
