"""Where a cell's results go: its folder is named after the settings in which it differs from the experiment's YAML.

Names are as different as the settings. A setting is written as it was given where it is made of plain characters. Any
other (a path, a name on the hub, quotes, spaces) is written with the last part of its value, what a folder's name may
not hold replaced, and 12 digits of a hash of all of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from omegaconf import OmegaConf

from core.errors import UserError

CHANGES_NO_NUMBER = (
    "force", "output_dir", "artifacts_dir", "logging", "cache",
    "trainer.processes", "trainer.cell_processes", "trainer.checkpoint_every_seconds",
)  # fmt: skip
UNNAMED_KEYS = ("experiment", "scale", *CHANGES_NO_NUMBER)
NAMES_IN_WORDS = ("coder.name",)  # a space in their values becomes `_`, so a `_` of their own calls for a hash
MAX_NAME_BYTES = 180  # file systems allow 255 for one folder
MAX_VALUE_CHARS = 60  # of a value beside its hash

PLAIN_KEY = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+@-]*")
PLAIN_VALUE = re.compile(r"[A-Za-z0-9_.+-]+|\[[A-Za-z0-9_.+,-]*\]")  # a word or a number, or a list of these
WORDS = re.compile(r"[A-Za-z0-9.+-]+(\\ [A-Za-z0-9.+-]+)*")  # Hydra writes a space with a backslash
LOOKS_HASHED = re.compile(r".*_[0-9a-f]{12}")
NOT_A_LEAF = re.compile(r"""[\[{"'$]|null$|$""")  # how the value of a whole node begins


def cell_name(overrides: Sequence[str]) -> str:
    """A folder's name for Hydra's overrides: one for each setting that is not in the path and can change a result.

    `base` if there is none. A name that is too long for a folder is cut and ends in a hash of all of it.
    """
    given = [override for override in overrides if not _is_unnamed(_key(override))]
    parts = [_part(override) for override in sorted(given)]
    if _order_matters(given):
        parts.append(f"order_{_hash(*given)}")
    name = ",".join(parts) or "base"
    return name if len(name) <= MAX_NAME_BYTES else f"{name[:MAX_NAME_BYTES]}_{_hash(*given)}"


def results_folder(output_dir: str | None, artifacts_dir: str | None, name: str) -> str:
    """`<output_dir>/<name>`. Raises UserError where one of the folders cannot be, before anything is made."""
    for key, value in (("output_dir", output_dir), ("artifacts_dir", artifacts_dir)):
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise UserError(f"{key}={value!r} names no folder. Give the name of one: {key}={key.removesuffix('_dir')}")
        path = Path(value).absolute()
        blocked = next((folder for folder in (path, *path.parents) if folder.exists() and not folder.is_dir()), None)
        if blocked:
            raise UserError(f"{key}={value}: {blocked} is a file, not a folder. Choose another folder.")
    if not PLAIN_KEY.fullmatch(str(name)):
        raise UserError(f"name={name!r}: an experiment's name is a folder's name, made of letters, digits and _ . -")
    return f"{output_dir}/{name}"


def register_resolvers() -> None:
    """Let the configuration name folders by `${cell:...}` and `${results_folder:...}`."""
    OmegaConf.register_new_resolver("cell", cell_name, replace=True)
    OmegaConf.register_new_resolver("results_folder", results_folder, replace=True)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _is_unnamed(key: str) -> bool:
    return key in UNNAMED_KEYS or key.split(".")[0] in UNNAMED_KEYS


def _part(override: str) -> str:
    """One setting in a folder's name. No other setting is written in the same way."""
    key, equals, value = override.partition("=")
    in_words = key in NAMES_IN_WORDS
    is_plain = (WORDS if in_words else PLAIN_VALUE).fullmatch(value) and PLAIN_KEY.fullmatch(key)
    if equals and is_plain and not LOOKS_HASHED.fullmatch(override):
        return override.replace("\\ ", "_")
    last = re.split("/", value.rstrip("/'\" ]})"))[-1]
    readable = re.sub("[^A-Za-z0-9.+-]+", "_", last)[:MAX_VALUE_CHARS].strip("_.-")
    named = re.sub("[^A-Za-z0-9_.+@-]+", "_", key)[:MAX_VALUE_CHARS].lstrip(".-")
    return f"{named}{equals}{readable}_{_hash(override)}"


def _order_matters(overrides: Sequence[str]) -> bool:
    """Whether two of the settings are of the same place, so that the later one decides."""
    for one, other in combinations(overrides, 2):
        outer, inner = sorted((_key(one), _key(other)), key=len)
        if outer == inner:
            return True
        value = next(override for override in (one, other) if _key(override) == outer).partition("=")[2]
        if inner.startswith(f"{outer}.") and NOT_A_LEAF.match(value):
            return True
    return False


def _hash(*overrides: str) -> str:
    return hashlib.sha256("\0".join(overrides).encode("utf-8", "surrogatepass")).hexdigest()[:12]
