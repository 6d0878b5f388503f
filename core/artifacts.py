"""The store of everything that is expensive to make and worth keeping: corpora, tokens, dictionaries.

An artifact is a folder `<root>/<kind>/<key>/`, keyed by the content of its specification. It is written under a
temporary name and renamed when all of it is on the disk, so a folder with its final name is complete. Its
`artifact.json` holds the size and the sha256 of every other file. They are checked when a process first asks for the
artifact; a damaged one is made again. A lock per key ensures that two processes do not make the same artifact twice.

The locks use `flock`, so the operating system frees those of a dead process. On a network filesystem they work across
nodes only if its `flock` does (NFS 4, and Lustre mounted with `flock`). Without any `flock`, taking a lock raises
OSError.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core.interrupts import remove_folder

MANIFEST = "artifact.json"
PATIENCE_SECONDS = 1.0  # time to wait for a lock before reporting it

Signature = tuple[tuple[str, int, int], ...]  # names, sizes and times of modification
_checked_here: dict[Path, tuple[Signature, bool]] = {}  # folders this process has checked, and whether each is intact


def content_key(spec: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that depend only on the specification, not on the order of its keys."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that `path` always holds either the old content or all of the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Artifacts below one folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, kind: str, spec: Mapping[str, Any]) -> Path:
        """The artifact's folder, whether or not it exists yet."""
        return self.root / kind / content_key(spec)

    def has(self, kind: str, spec: Mapping[str, Any]) -> bool:
        """Whether the artifact exists and is intact. The first call in a process reads all of it (about 1 GB/s).

        A damaged one is reported on standard error, and `put` sets it aside.
        """
        folder = self.path(kind, spec)
        if not (folder / MANIFEST).is_file():
            return False
        known, intact = _checked_here.get(folder, (None, False))
        try:
            signature = _signature(folder)
            problem = damage(folder) if known != signature else None
        except FileNotFoundError:  # another process is setting it aside
            return False
        if known != signature:
            if problem:
                print(f"{folder} is not used and will be made again: {problem}", file=sys.stderr)
            intact = problem is None
            _checked_here[folder] = signature, intact
        return intact

    @contextmanager
    def lock(self, kind: str, spec: Mapping[str, Any]) -> Iterator[None]:
        """Hold this artifact's lock. Reports who holds it while waiting; removes what a dead process left behind."""
        path = self.path(kind, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock")  # holds the name of its last holder
        lock = FileLock(file, fallback_to_soft=False)
        try:
            lock.acquire(timeout=PATIENCE_SECONDS)
        except Timeout:
            print(f"waiting for {file.read_text() or 'another process'}, which makes {path}", file=sys.stderr)
            lock.acquire()
        try:
            with suppress(OSError):  # on a full disk the lock still works
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            for abandoned in path.parent.glob(f".{path.name}.*"):
                remove_folder(abandoned)
            yield
        finally:
            lock.release()

    def put(self, kind: str, spec: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Make the artifact in a temporary folder, then give it its name. `make` fills the folder that it receives.

        Call it under `lock`, after `has` returned False: a folder that already has the name is set aside.
        """
        path = self.path(kind, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            make(temporary)
            manifest = {"kind": kind, "spec": spec, "files": _synced_files(temporary)}
            write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
            temporary.chmod(0o755)
            if path.exists():
                _set_aside(path)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            remove_folder(temporary)
            raise
        return path

    def get_or_make(self, kind: str, spec: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The artifact's folder. If it is missing, makes it while other processes that need it wait."""
        if not self.has(kind, spec):
            with self.lock(kind, spec):
                if not self.has(kind, spec):
                    self.put(kind, spec, make)
        return self.path(kind, spec)


def damage(folder: Path) -> str | None:
    """What is wrong with an artifact, in a few words; None if it is intact. Reads all of it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
        if content_key(manifest["spec"]) != folder.name:
            return f"its {MANIFEST} belongs to another artifact"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read, or has no hashes"
    for name, (n_bytes, digest) in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != n_bytes:
            return f"{name} has {(folder / name).stat().st_size:,} bytes instead of {n_bytes:,}"
        if sha256(folder / name) != digest:
            return f"{name} has changed since it was written (its sha256 differs)"
    return None


def _synced_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file below a folder, by relative name. Everything is on the disk when this returns."""
    paths = sorted(folder.rglob("*"))
    for path in [*paths, folder]:
        sync(path)
    files = [path for path in paths if path.is_file()]
    return {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}


def _signature(folder: Path) -> Signature:
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


def _set_aside(path: Path) -> None:
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    print(f"{path} is set aside as {aside.name}", file=sys.stderr)
