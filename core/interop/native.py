"""Dictionaries trained here: a folder of the artifact store, or that of a cell, whose `dictionary.json` names one."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from core.errors import UserError
from core.interop.files import read_json
from core.methods.base import DictionaryMethod
from core.methods.saved import MANIFEST, WEIGHTS, load_dictionary

POINTER = "dictionary.json"
__all__ = ["MANIFEST", "POINTER", "WEIGHTS", "read", "site", "stored"]


def stored(folder: Path) -> Path:
    """The store's folder behind a cell's, or the folder itself."""
    if not (folder / POINTER).is_file():
        return folder
    told = read_json(folder / POINTER).get("folder")
    if told is None:
        raise UserError(f"{folder / POINTER}: this cell used a dictionary that was loaded, too; load that one.")
    return Path(told)


def read(folder: Path) -> DictionaryMethod:
    """The dictionary as it was trained. Raises UserError if there is none or its weights are not whole."""
    try:
        return load_dictionary(stored(folder))
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        said = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{stored(folder)} holds no dictionary that can be read: it is damaged, or of an earlier version of "
            f"this code ({type(error).__name__}: {said})."
        ) from error


def site(folder: Path) -> str | None:
    """Our name of the site that it was trained on; None where that is not told."""
    artifact = stored(folder) / "artifact.json"
    spec = read_json(artifact).get("spec", {}) if artifact.is_file() else {}
    return spec.get("stream", {}).get("site")
