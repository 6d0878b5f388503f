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
import re
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core import atomic
from core.atomic import NOT_A_LIST, sync, temporary_name, write_atomically
from core.errors import UserError
from core.interrupts import remove_folder
from core.reading import read_object

MANIFEST = "artifact.json"
KEY, TOKEN = re.compile("[0-9a-f]{16}"), re.compile("[0-9a-z_]{8}")  # the parts of an unfinished folder's name
PATIENCE_SECONDS = 1.0  # time to wait for a lock before reporting it

Signature = tuple[tuple[str, int, int], ...]  # names, sizes and times of modification
_checked_here: dict[
    tuple[Path, str | None], tuple[Signature, str | None]
] = {}  # by `problem`'s arguments: what is wrong


def content_key(spec: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that depend only on the specification, not on the order of its keys."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        known = _checked_here.get((folder, folder.name))
        try:
            found = problem(folder, folder.name)
        except FileNotFoundError:  # another process is setting it aside
            return False
        if found and _checked_here[folder, folder.name] != known:
            print(f"{folder} is not used and will be made again: {found}", file=sys.stderr)
        return found is None

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
            print(f"waiting for {_holder(file)}, which makes {path}", file=sys.stderr)
            lock.acquire()
        except OSError as error:
            raise UserError(
                f"artifacts_dir: {file} cannot be locked ({error.strerror or error}). Choose a folder on a disk that "
                "can be written to and whose file system has locks (flock)."
            ) from error
        try:
            with suppress(OSError):  # on a full disk the lock still works
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            for abandoned in path.parent.glob(f".{path.name}.*"):
                remove_folder(abandoned)
            yield
        finally:
            lock.release()

    def remove_leftovers(self) -> None:
        """Remove the unfinished folders of killed processes, whatever their keys: those whose lock is free."""
        for abandoned in list(self.root.glob("*/.*.*")):
            name, _, token = abandoned.name[1:].rpartition(".")
            if not (KEY.fullmatch(name) and TOKEN.fullmatch(token)):
                continue
            try:
                with FileLock(abandoned.with_name(f"{name}.lock"), timeout=0, fallback_to_soft=False):
                    remove_folder(abandoned)
            except (Timeout, OSError):  # its process is alive, or nothing can be written here
                continue

    def put(self, kind: str, spec: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Make the artifact in a temporary folder, then give it its name. `make` fills the folder that it receives.

        Call it under `lock`, after `has` returned False: a folder that already has the name is set aside.
        """
        path = self.path(kind, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            temporary.mkdir()
            make(temporary)
            manifest = {"kind": kind, "spec": spec, "files": _synced_files(temporary)}
            write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
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


def damage(folder: Path, name: str | None = None) -> str | None:
    """What is wrong with an artifact, in a few words; None if it is intact. Reads all of it.

    name  the key that its spec must have; None for a folder that may have been copied under another name
    """
    try:
        manifest = read_object(folder / MANIFEST)
        expected = manifest["files"]
        if name is not None and content_key(manifest["spec"]) != name:
            return f"its {MANIFEST} belongs to another artifact"
        return atomic.damage(folder, expected)
    except NOT_A_LIST:
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(folder / MANIFEST) from None
        return f"its {MANIFEST} cannot be read, or has no hashes"


def problem(folder: Path, name: str | None = None) -> str | None:
    """As `damage`, but an artifact whose files have kept their sizes and times since is not read again."""
    signature = _signature(folder)
    known, found = _checked_here.get((folder, name), (None, None))
    if known != signature:
        found = damage(folder, name)
        _checked_here[folder, name] = signature, found
    return found


def _synced_files(folder: Path) -> atomic.Files:
    """Size and hash of every file below a folder, by relative name. Everything is on the disk when this returns, and
    every file has the mode that the umask asks for: libraries make theirs readable for their owner alone."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o666 != mode:
            path.chmod(mode)
    for path in [*paths, folder]:
        sync(path)
    return atomic.listed(folder)


def _holder(lock_file: Path) -> str:
    """Who holds a lock, in words."""
    try:
        return lock_file.read_text(errors="replace")[:200] or "another process"
    except OSError:
        return "another process"


def _signature(folder: Path) -> Signature:
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


def _set_aside(path: Path) -> None:
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    print(f"{path} is set aside as {aside.name}", file=sys.stderr)
