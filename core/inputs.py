"""What a cell reads besides its configuration and the store. Its results are stale once that has changed.

Files are known by their SHA-256, branches of the hub by the commit that they stood for. Whether a branch has moved is
told by what was last fetched to this machine: a finished cell needs no network to be skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from core.artifacts import sha256

HUB = "hub:"
Inputs = dict[str, str]  # by name, a path or `hub:<repo>@<revision>`: its hash or commit

_noted: ContextVar[Inputs | None] = ContextVar("inputs", default=None)
_hashes: dict[tuple[str, int, int], str] = {}  # by path, size and time of modification: of this process


@contextmanager
def noting() -> Iterator[Inputs]:
    """Collects what is noted in the block, for instance while a cell runs."""
    noted: Inputs = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_file(path: Path) -> None:
    """The running cell's results depend on this file."""
    if (noted := _noted.get()) is not None:
        noted[str(path.absolute())] = _hash(path)


def note_commit(repo: str, revision: str, commit: str) -> None:
    """The running cell's results depend on a repository of the hub, read at this commit."""
    if (noted := _noted.get()) is not None and not re.fullmatch("[0-9a-f]{40}", revision):
        noted[f"{HUB}{repo}@{revision}"] = commit


def changed(inputs: Mapping[str, str]) -> list[str]:
    """The names of those that are not what they were. One that is not there any more is not among them: the results
    are all that is left of it."""
    return [name for name, before in inputs.items() if _now(name) not in (before, None)]


def _now(name: str) -> str | None:
    if name.startswith(HUB):
        from core.interop.hub import cached_commit  # slow to import, and seldom needed

        repo, _, revision = name.removeprefix(HUB).rpartition("@")
        return cached_commit(repo, revision)
    return _hash(Path(name)) if Path(name).is_file() else None


def _hash(path: Path) -> str:
    stat = path.stat()
    key = str(path.absolute()), stat.st_size, stat.st_mtime_ns
    if key not in _hashes:
        _hashes[key] = sha256(path)
    return _hashes[key]
