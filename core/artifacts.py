"""The store of everything that is expensive to make and worth keeping: corpora, tokens, dictionaries.

An artifact is a folder `<root>/<kind>/<key>/`, keyed by the content of its specification. It is written under a
temporary name and renamed when complete, so a folder that has its final name is whole. A lock per key makes two
processes that want the same artifact share one making of it; the operating system frees the lock of a dead process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "artifact.json"


def content_key(spec: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that depend on the specification alone, not on the order of its keys."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that under `path` there is either the old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Store:
    """Artifacts below one folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, kind: str, spec: Mapping[str, Any]) -> Path:
        """Where the artifact lies, or would lie."""
        return self.root / kind / content_key(spec)

    def has(self, kind: str, spec: Mapping[str, Any]) -> bool:
        return (self.path(kind, spec) / MANIFEST).is_file()

    def lock(self, kind: str, spec: Mapping[str, Any]) -> FileLock:
        """The lock that whoever makes this artifact holds."""
        path = self.path(kind, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_suffix(".lock"))

    def put(self, kind: str, spec: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Make the artifact in a temporary folder, then give it its name. `make` fills the folder it is handed."""
        path = self.path(kind, spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            make(temporary)
            write_atomically(temporary / MANIFEST, json.dumps({"kind": kind, "spec": spec}, indent=1, sort_keys=True))
            temporary.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return path

    def get_or_make(self, kind: str, spec: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The artifact's folder; makes it first if it is not there, while others who want it wait."""
        if not self.has(kind, spec):
            with self.lock(kind, spec):
                if not self.has(kind, spec):
                    self.put(kind, spec, make)
        return self.path(kind, spec)
