"""Counts of what a cell read, such as tokens of held-out text: they stand in its results beside its own metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

Counts = dict[str, float]

_counts: ContextVar[Counts | None] = ContextVar("counts", default=None)


@contextmanager
def counting() -> Iterator[Counts]:
    """Collect what is counted inside the block, for instance while a cell runs."""
    counts: Counts = {}
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def count(counts: Mapping[str, float]) -> None:
    """Record counts of the running cell by name. Of two values for one name the larger stays."""
    if (known := _counts.get()) is not None:
        for name, value in counts.items():
            known[name] = max(value, known.get(name, value))
