"""Files that appear whole: written beside their place, brought to the disk, then given their name.

This is the one way in which results, tables, figures and pages are written. A process that is killed leaves a file
`.<name>.<8 digits>`; `remove_leftovers` removes those of processes that are gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Files = dict[str, dict[str, Any]]  # by relative name: `bytes` and `sha256`
MAX_NAME_BYTES = 200  # of a name that a temporary name repeats; file systems allow 255
LEFTOVER = re.compile(r"\..+\.[0-9a-z_]{8}")
NOT_A_LIST = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
OS_ERROR_IN_WORDS = re.compile(r"\(os error (\d+)\)")  # how libraries written in Rust name the error of a write

_written: ContextVar[tuple[Path, Files] | None] = ContextVar("written", default=None)


@contextmanager
def noting_files(folder: Path) -> Iterator[Files]:
    """Collect size and sha256 of every file that is written below `folder` inside the block."""
    files: Files = {}
    token = _written.set((folder.resolve(), files))
    try:
        yield files
    finally:
        _written.reset(token)


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yields a new file beside `path` to write to. When the block ends without an error, it takes the place of `path`.

    So `path` always holds either the old content or all of the new one. Its mode follows the umask. Raises OSError that
    names `path` where the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE(temporary.stat().st_mode)
        with _marked_alive(temporary):
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:  # a library has put its own file there
                temporary.chmod(mode)
            sync(temporary)
            with _noting(path, temporary):
                temporary.replace(path)
                sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, Exception) and (named := naming(error, path, temporary)):
            raise named from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that `path` always holds either the old content or all of the new content."""
    with atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def files_atomically(folder: Path) -> Iterator[Path]:
    """Yields a new folder to fill, for libraries that write several files at once. When the block ends without an
    error, each file takes its place in `folder`, as in `atomically`; other files there stay."""
    scratch = temporary_name(folder / "files")
    try:
        scratch.mkdir(parents=True)
        with _marked_alive(scratch):
            yield scratch
            for file in [file for file in sorted(scratch.rglob("*")) if file.is_file()]:
                with atomically(folder / file.relative_to(scratch)) as temporary:
                    file.replace(temporary)
    except Exception as error:
        if named := naming(error, file_of(error) or folder):
            raise named from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _marked_alive(path: Path) -> Iterator[None]:
    """Hold a lock on an unfinished file or folder, so that other processes know that it is in use."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet, as `write_atomically`."""
    with atomically(path) as temporary:
        table.to_parquet(temporary)


def naming(error: Exception, path: Path, temporary: Path | None = None) -> OSError | None:
    """The error of a write as an OSError that names `path`; None if it does so already, or is no such error."""
    if isinstance(error, OSError):
        if error.filename is not None and error.filename != str(temporary):
            return None
        return OSError(error.errno or errno.EIO, error.strerror or str(error), str(path))
    found = OS_ERROR_IN_WORDS.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None


def file_of(error: BaseException) -> Path | None:
    """The file that was open for writing where an error came from, if a function that it passed through has one."""
    trace, found = error.__traceback__, None
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str):
                found = Path(name)
        trace = trace.tb_next
    return found


def temporary_name(path: Path) -> Path:
    """A new hidden name beside `path`, which `remove_leftovers` knows."""
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:MAX_NAME_BYTES])}.{secrets.token_hex(4)}")


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files and folders that killed processes left below a folder, as far as possible."""
    for path in [path for path in folder.rglob(".*") if LEFTOVER.fullmatch(path.name)]:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                kind = os.fstat(descriptor).st_mode
                if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process is alive
                    shutil.rmtree(path) if stat.S_ISDIR(kind) else path.unlink()
            finally:
                os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError that names it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # a file system that cannot do that
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(folder: Path) -> Files:
    """Size and sha256 of every file below a folder."""
    return {path.relative_to(folder).as_posix(): _entry(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def damage(folder: Path, files: Files) -> str | None:
    """What is wrong with the listed files, in a few words; None if they are intact. Reads all of them.

    Raises one of `NOT_A_LIST` for a list that is none.
    """
    for name, entry in files.items():
        path, n_bytes, digest = folder / name, int(entry["bytes"]), str(entry["sha256"])
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != n_bytes:
            return f"{name} has {path.stat().st_size:,} bytes instead of {n_bytes:,}"
        if sha256(path) != digest:
            return f"{name} has changed since it was written (its sha256 differs)"
    return None


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@contextmanager
def _noting(path: Path, temporary: Path) -> Iterator[None]:
    """Add a file to what `noting_files` collects once the block has given it its name, if it lies below the folder."""
    folder, files = _written.get() or (None, {})
    place = path.parent.resolve() / path.name
    entry = _entry(temporary) if folder and place.is_relative_to(folder) else None
    yield
    if folder and entry:
        files[place.relative_to(folder).as_posix()] = entry


def note_outside(paths: Iterable[Path]) -> None:
    """Add files that a user wanted elsewhere to what `noting_files` collects, by their absolute names."""
    if noted := _written.get():
        folder, files = noted
        files.update({str(p.resolve()): _entry(p) for p in paths if not p.resolve().is_relative_to(folder)})
