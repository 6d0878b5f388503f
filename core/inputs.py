"""What a cell reads besides its configuration and the store. If that changes, the cell's results are stale.

A file is identified by its SHA-256, a branch on the hub by its commit, a method or a source by its version. Whether a
branch has moved is judged by what this machine last fetched, so no network is needed to skip a finished cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Protocol

from core.artifacts import sha256

HUB, VERSION = "hub:", "version:"
DATASETS = "datasets/"  # before the name of a data set, after `hub:`
Inputs = dict[str, str]  # by name (a path, `hub:<repo>@<revision>` or `version:<class>`): its hash, commit or version


class Versioned(Protocol):
    """A class whose `version` is raised when the same settings give other results."""

    version: ClassVar[int]


_noted: ContextVar[Inputs | None] = ContextVar("inputs", default=None)
_hashes: dict[tuple[str, int, int], str] = {}  # this process's, by path, size and time of modification


@contextmanager
def noting() -> Iterator[Inputs]:
    """Collect what is noted inside the block, for instance while a cell runs."""
    noted: Inputs = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_file(path: Path) -> None:
    """Record that the running cell's results depend on this file."""
    if (noted := _noted.get()) is not None:
        noted[str(path.absolute())] = file_hash(path)


def note_commit(repo: str, revision: str, commit: str, kind: str = "model") -> None:
    """Record that the running cell's results depend on a hub repository (`model` or `dataset`), read at this commit."""
    if (noted := _noted.get()) is not None:
        noted[f"{HUB}{DATASETS if kind == 'dataset' else ''}{repo}@{revision}"] = commit


def note_all(inputs: Inputs) -> None:
    """Record what was noted while something was made that the running cell uses again."""
    if (noted := _noted.get()) is not None:
        noted.update(inputs)


def note_version(kind: type[Versioned]) -> None:
    """Record that the running cell's results depend on this class, at its version."""
    if (noted := _noted.get()) is not None:
        noted[f"{VERSION}{kind.__module__}.{kind.__qualname__}"] = str(kind.version)


def cached_commit(repo: str, revision: str, kind: str = "model") -> str | None:
    """The commit of a revision when this machine last fetched it; None if it never did. Needs no network."""
    from huggingface_hub import HfApi  # slow to import, rarely needed
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        return HfApi().resolve_revision(repo, revision=revision, repo_type=kind, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None


def changed(inputs: Mapping[str, str]) -> list[str]:
    """The names of the inputs that have changed. A deleted input does not count as changed."""
    return [name for name, before in inputs.items() if _current(name) not in (before, None)]


def _current(name: str) -> str | None:
    if name.startswith(HUB):
        repo, _, revision = name.removeprefix(HUB).partition("@")
        kind = "dataset" if repo.startswith(DATASETS) else "model"
        return cached_commit(repo.removeprefix(DATASETS), revision, kind)
    if name.startswith(VERSION):
        module, _, kind = name.removeprefix(VERSION).rpartition(".")
        try:
            return str(getattr(import_module(module), kind).version)
        except (ImportError, AttributeError):
            return None
    return file_hash(Path(name)) if Path(name).is_file() else None


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, computed once in a process unless its size or time of modification changes."""
    stat = path.stat()
    key = str(path.absolute()), stat.st_size, stat.st_mtime_ns
    if key not in _hashes:
        _hashes[key] = sha256(path)
    return _hashes[key]
