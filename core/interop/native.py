"""Dictionaries trained here: a folder of the artifact store, or a cell's folder, whose `dictionary.json` names one."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.methods.saved import MANIFEST, WEIGHTS, load_dictionary
from core.reading import read_object

POINTER = "dictionary.json"
__all__ = ["MANIFEST", "POINTER", "WEIGHTS", "read", "site", "stored"]


def stored(folder: Path) -> Path:
    """The folder in the store that a cell's folder points to, or the folder itself."""
    if not (folder / POINTER).is_file():
        return folder
    target = read_object(folder / POINTER).get("folder")
    if target is None:
        raise UserError(f"{folder / POINTER}: this cell used a dictionary that was loaded as well. Load that one.")
    return Path(target)


def read(folder: Path) -> Dictionary:
    """The dictionary as it was trained. Raises UserError if it is missing or damaged."""
    try:
        return load_dictionary(stored(folder))
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        cause = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{stored(folder)} contains no readable dictionary: it is damaged, or from an earlier version of this code "
            f"({type(error).__name__}: {cause})."
        ) from error


def site(folder: Path) -> str | None:
    """Our name of the site where it was trained; None if the store does not have it, or its source has no site."""
    artifact = stored(folder) / "artifact.json"
    spec = read_object(artifact).get("spec", {}) if artifact.is_file() else {}
    batches = spec.get("source", {}).get("batches", spec)  # `stream` stood at the top in stores of version 0.1
    return batches.get("stream", {}).get("site")
