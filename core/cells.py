"""The name of a cell's folder: the settings in which the cell differs from the experiment's YAML."""

from __future__ import annotations

import hashlib
import re

CHANGES_NO_NUMBER = (
    "force", "output_dir", "artifacts_dir", "logging", "cache",
    "trainer.processes", "trainer.cell_processes", "trainer.checkpoint_every_seconds",
)  # fmt: skip
UNNAMED_KEYS = ("experiment", "scale", *CHANGES_NO_NUMBER)
MAX_NAME_BYTES = 180  # file systems allow 255 for one folder


def cell_name(override_dirname: str) -> str:
    """Hydra's `override_dirname` without the keys that the path already has or that cannot change a result.

    `base` if nothing is left. A name that is too long for a folder is cut and ends in a hash of all of it.
    """
    overrides = re.split(r",(?=[^,=]+=)", override_dirname) if override_dirname else []
    named = [override for override in overrides if not _is_unnamed(override.lstrip("+~").split("=")[0])]
    name = ",".join(named).replace("/", "_").replace("\\ ", "_") or "base"
    if len(name.encode()) > MAX_NAME_BYTES:
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = f"{name.encode()[:MAX_NAME_BYTES].decode(errors='ignore')}_{digest}"
    return name


def _is_unnamed(key: str) -> bool:
    return key in UNNAMED_KEYS or key.split(".")[0] in UNNAMED_KEYS
