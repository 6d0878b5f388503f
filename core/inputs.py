"""What a cell reads besides its configuration and the store. If that changes, the cell's results are stale.

A file is identified by its SHA-256, what a folder or a pattern names by the list of these files, a branch on the hub by
its commit, a method or a source by its version. Whether a branch has moved is judged by what this machine last fetched,
so no network is needed to skip a finished cell.

An input that is gone (a deleted file, an emptied cache of the hub) does not make results stale: they cannot be measured
again without it, and are still those of what was read. It is reported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

from core.atomic import sha256
from core.reading import parse_json

HUB, VERSION, FILES = "hub:", "version:", "files:"
OWN, ROOT = "code:", Path(__file__).parents[1]  # before the place of a file that comes with the code
DATASETS = "datasets/"  # before the name of a data set, after `hub:`
FINDER = ("core.text.finding", "find_files")  # the function that finds the files of `data.path`
OURS = re.compile(r"(core|experiments)(\.\w+)+")  # modules that a results.json may have imported
Inputs = dict[str, str]  # by name: a path, `hub:<repo>@<revision>`, `version:<class>`, `files:<path>` (which there are)


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


def note_all(inputs: Inputs) -> None:
    """Record that the running cell's results depend on all of these."""
    if (noted := _noted.get()) is not None:
        noted.update(inputs)


def note_file(path: Path) -> None:
    """Record that the running cell's results depend on this file."""
    if (noted := _noted.get()) is not None:
        noted[_name_of(path)] = file_hash(path)


def note_listing(path: Any) -> None:
    """Record that the running cell's results depend on which text files a path or pattern names (`find_files`)."""
    if (noted := _noted.get()) is not None:
        paths = [path] if isinstance(path, str | Path) else path
        name = f"{FILES}{json.dumps([str(Path(one).expanduser().absolute()) for one in paths])}"
        noted[name] = _listing(name) or ""


def note_commit(repo: str, revision: str, commit: str, kind: str = "model") -> None:
    """Record that the running cell's results depend on a hub repository (`model` or `dataset`), read at this commit."""
    if (noted := _noted.get()) is not None:
        noted[f"{HUB}{DATASETS if kind == 'dataset' else ''}{repo}@{revision}"] = commit


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


def changed(inputs: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The names of the inputs that have changed, and of the files that are gone."""
    now = {name: _current(name) for name in inputs}
    return (
        [name for name, before in inputs.items() if now[name] not in (before, None)],
        [name for name in inputs if now[name] is None and not name.startswith((HUB, VERSION))],
    )


def _current(name: str) -> str | None:
    if name.startswith(HUB):
        repo, _, revision = name.removeprefix(HUB).partition("@")
        kind = "dataset" if repo.startswith(DATASETS) else "model"
        return cached_commit(repo.removeprefix(DATASETS), revision, kind)
    if name.startswith(VERSION):
        module, _, kind = name.removeprefix(VERSION).rpartition(".")
        version = getattr(_ours(module, kind), "version", None)
        return None if version is None else str(version)
    if name.startswith(FILES):
        return _listing(name)
    path = ROOT / name.removeprefix(OWN) if name.startswith(OWN) else Path(name)
    try:
        return file_hash(path) if path.is_file() else None
    except (ValueError, OSError):  # no path at all, or not readable
        return None


def _name_of(path: Path) -> str:
    """Of a file that comes with the code, the place in the repository: results are compared on other machines, too."""
    path = path.absolute()
    return f"{OWN}{path.relative_to(ROOT)}" if path.is_relative_to(ROOT / "core") else str(path)


def _ours(module: str, name: str) -> Any:
    """What one of our modules calls by this name; None if there is none. No other module is imported."""
    if not OURS.fullmatch(module):
        return None
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _listing(name: str) -> str | None:
    """A hash of the names of the text files; None if there are none."""
    try:
        found = _ours(*FINDER)(parse_json(name.removeprefix(FILES), "inputs"))
    except (ValueError, OSError):  # there is nothing any more
        return None
    return hashlib.sha256("\n".join(str(file) for file in found.files).encode("utf-8", "surrogateescape")).hexdigest()


def file_hash(path: Path) -> str:
    """The file's SHA-256, computed once in a process while size and time of modification stay the same."""
    stat = path.stat()
    key = str(path.absolute()), stat.st_size, stat.st_mtime_ns
    if key not in _hashes:
        _hashes[key] = sha256(path)
    return _hashes[key]
