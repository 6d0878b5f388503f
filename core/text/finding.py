"""The text files that `data.path` names: a file, a folder, a pattern, or a list of these."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import UserError

FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4")  # of all formats but Parquet, which compresses itself
KNOWN = f"{', '.join(FORMATS)}, or one of the first four with {', '.join(COMPRESSIONS)} behind it"
OTHERWISE = "Or choose data=bundled, which needs no file."


@dataclass
class Found:
    """The files to read, sorted, and what was passed over: a description for each, with how many there were."""

    files: list[Path] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """What was passed over, in a line for the user; empty if nothing was."""
        n = len(self.files)
        read = f"{n:,} file{' is' if n == 1 else 's are'} read"
        return f"data.path: {read}, and passed over are: {self.listed()}." if self.passed_over else ""

    def listed(self) -> str:
        return ", ".join(f"{n:,} {what}" for what, n in sorted(self.passed_over.items()))


def ending_of(path: Path) -> str:
    """The ending in small letters, with that of the format before that of a compression: `.jsonl.gz`."""
    endings = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(endings) == 2 and endings[1] in COMPRESSIONS:
        return "".join(endings)
    return endings[-1] if endings else ""


def format_of(path: Path) -> str | None:
    """One of `FORMATS`; None for a file that is not read as text."""
    inner, dot, _ = ending_of(path).removeprefix(".").partition(".")
    ending = f".{inner}"
    return ending if ending in FORMATS and not (dot and ending == ".parquet") else None


def find_files(path: Any) -> Found:
    """All files that `path` names. A file that is reached by several names is read once.

    Folders are searched with what is below them, and with the folders that links lead to; hidden ones are left out. In
    a folder, and among what a pattern matches, files of other kinds are passed over.
    Raises UserError if there is nothing to read, and for a file named by itself that is of another kind or empty.
    """
    found = Found()
    paths = path if isinstance(path, Sequence) and not isinstance(path, str) else [path]
    if not paths:
        raise UserError("data.path is an empty list: name a file, a folder, a pattern, or a list of these.")
    for one in paths:
        if not isinstance(one, str | Path) or not str(one).strip():
            raise UserError(f"data.path: {one!r} is no path: name a file, a folder, a pattern, or a list of these.")
        try:
            _add(found, str(one))
        except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, an unknown user after ~
            if isinstance(error, UserError):
                raise
            raise UserError(f"data.path: {str(one)!r:.200} cannot be looked up: {error!s:.200}.") from error
    found.files = _once_each(found)
    for file in found.files:
        if file.stat().st_size == 0:
            raise UserError(f"data.path: {file} is empty. Remove it, or name another file.")
    return found


def _add(found: Found, path: str) -> None:
    root = Path(path).expanduser()
    if root.is_file():
        if format_of(root) is None:
            raise UserError(f"data.path: {root} ends in {ending_of(root) or 'nothing'}, not in {KNOWN}.")
        found.files.append(root)
        return
    if root.is_dir():
        files = _in_folder(root, found)
    elif _is_pattern(path):
        files = _matching(str(root), found)
    else:
        hint = "Several are written as a list: data.path=[a.jsonl,b.jsonl]. " if set(path) & set(",;{") else ""
        raise UserError(f"data.path: there is no file {path} (seen from {Path.cwd()}). {hint}{OTHERWISE}")
    before, matched = len(found.files), False
    for file in files:
        matched = True
        if format_of(file) is None:
            found.passed_over[ending_of(file) or "without an ending"] += 1
        elif file.is_file():
            found.files.append(file)
        else:
            found.passed_over["links that lead nowhere, or no files"] += 1
    if len(found.files) == before:
        missing = f"there is no file {path}"
        if root.is_dir() or matched:
            missing = f"{'the folder ' * root.is_dir()}{path} has no file that ends in {KNOWN}"
        others = f"There are: {found.listed()}. " if found.passed_over else ""
        raise UserError(f"data.path: {missing} (seen from {Path.cwd()}). {others}{OTHERWISE}")


def _in_folder(root: Path, found: Found) -> Iterator[Path]:
    """The files below a folder, but not hidden ones. Each folder is searched once, so that links in a circle end."""

    def unreadable(_: OSError) -> None:
        found.passed_over["folders that cannot be opened"] += 1

    known = {_identity(root)}
    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        here = Path(folder)
        chosen = []
        for name in sorted(folders):
            if name.startswith("."):
                found.passed_over["hidden folders"] += 1
            elif (identity := _identity(here / name)) not in known:
                known.add(identity)
                chosen.append(name)
        folders[:] = chosen
        for name in sorted(files):
            if name.startswith("."):
                found.passed_over["hidden files"] += format_of(Path(name)) is not None
            else:
                yield here / name
    found.passed_over += Counter()  # drops those of which there are none


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _matching(pattern: str, found: Found) -> Iterator[Path]:
    """The files that a pattern matches, and those in the folders that it matches."""
    before, stars, after = pattern.partition("**")
    alone = (not before or before.endswith("/")) and (not after or after.startswith("/"))
    if stars and not alone:
        raise UserError(f"data.path: in the pattern {pattern}, ** must stand alone between two slashes.")
    if not stars:
        for path in _glob(pattern):
            yield from _in_folder(path, found) if path.is_dir() else [path]
        return
    parts = [part for part in after.split("/") if part] or ["*"]
    for root in _glob(before) if _is_pattern(before) else [Path(before or ".")]:
        if root.is_dir():
            ignored = Found()
            for path in _in_folder(root, ignored):
                if _matches(path.relative_to(root).parts, parts):
                    yield path
            for what in ("hidden folders", "folders that cannot be opened"):
                found.passed_over[what] += ignored.passed_over[what]
    found.passed_over += Counter()


def _is_pattern(path: str) -> bool:
    return bool(set(path) & set("*?["))


def _glob(pattern: str) -> list[Path]:
    path = Path(pattern)
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the last of the names match the parts of a pattern, in which ** stands for any number of names."""
    if not parts:
        return not names
    return any(_matches_here(names[start:], parts) for start in range(len(names)))


def _matches_here(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        return _matches_here(names, parts[1:]) or _matches_here(names[1:], parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _matches_here(names[1:], parts[1:])


def _once_each(found: Found) -> list[Path]:
    """The files, sorted; of several names of one file the first."""
    by_identity: dict[tuple[int, int], Path] = {}
    for file in sorted(set(found.files)):
        if by_identity.setdefault(_identity(file), file) != file:
            found.passed_over["further names of files that are read"] += 1
    return list(by_identity.values())
