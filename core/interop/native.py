"""Dictionaries trained here: a folder of the artifact store, or a cell's folder, whose `dictionary.json` names one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError, shown
from core.interop.hooks import SITES
from core.methods.dictionary import Dictionary
from core.methods.saved import MANIFEST, WEIGHTS, load_dictionary
from core.reading import optional_field, read_object

POINTER, ARTIFACT = "dictionary.json", "artifact.json"
__all__ = ["MANIFEST", "POINTER", "WEIGHTS", "read", "site", "stored"]


def stored(folder: Path) -> Path:
    """The folder in the store that a cell's folder points to, or the folder itself."""
    pointer = folder / POINTER
    if not pointer.is_file():
        return folder
    target = optional_field(read_object(pointer), "folder", str, pointer)
    if target is None:
        raise UserError(f"{pointer}: this cell used a dictionary that was loaded as well. Load that one.")
    try:
        if Path(target).is_dir():
            return Path(target)
    except (OSError, ValueError):  # such as a name that is too long
        pass
    raise UserError(
        f"{pointer} names {target!r:.200}, which is no folder here. Set artifacts_dir as the cell had it, or give the "
        "dictionary's own folder as method.repo."
    )


def read(folder: Path) -> Dictionary:
    """The dictionary as it was trained. Raises UserError if it is missing or damaged, or was never finished."""
    method = load_dictionary(stored(folder))
    if any(buffer.isnan().any() for name, buffer in method.named_buffers() if name.rpartition(".")[2] == "threshold"):
        raise UserError(f"{stored(folder)}: the threshold that inference needs was never measured in training.")
    return method


def site(folder: Path) -> str | None:
    """Our name of the site where it was trained; None if the store does not have it, or its source has no site."""
    path = stored(folder) / ARTIFACT
    name = optional_field(optional_field(_batches(folder), "stream", dict, path) or {}, "site", str, path)
    if name is not None and name.partition(".")[0] not in SITES:
        raise UserError(f"{path}: stream.site is {shown(name)}, which is none of {', '.join(SITES)}.")
    return name


def model(folder: Path) -> Mapping[str, Any]:
    """The identity of the language model that it was trained on (`core.models.identity`); empty where there is none."""
    return optional_field(_batches(folder), "model", dict, stored(folder) / ARTIFACT) or {}


def _batches(folder: Path) -> Mapping[str, Any]:
    """What decided the batches that it was trained on; empty if the store does not have it."""
    path = stored(folder) / ARTIFACT
    if not path.is_file():
        return {}
    node: dict[str, Any] = optional_field(read_object(path), "spec", dict, path) or {}
    if source := optional_field(node, "source", dict, path):
        node = optional_field(source, "batches", dict, path) or node
    return node  # at the top in stores of version 0.1
