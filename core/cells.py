"""What a cell's folder is called: the settings in which it differs from the experiment's YAML."""

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
    """Hydra's `override_dirname` without what the path says already (experiment, scale) or what changes no number.

    `base` if nothing is left. A name too long for a folder ends in a hash of the whole.
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
