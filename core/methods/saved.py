"""A trained dictionary as a folder: `weights.safetensors`, and `manifest.json` with what rebuilds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.errors import UserError
from core.methods.base import DictionaryMethod

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"


def save_dictionary(method: DictionaryMethod, training: Mapping[str, Any], folder: Path) -> None:
    """Write all parameters and buffers (fp32, on the CPU), the class, its arguments and how it was trained.

    Raises OSError where the disk refuses."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(state, folder / WEIGHTS)
    except SafetensorError as error:  # its word for a disk that is full
        raise OSError(f"{folder / WEIGHTS} could not be written: {error}") from error
    manifest = {
        "class": f"{type(method).__module__}.{type(method).__qualname__}",
        "hyperparameters": method.hyperparameters(),
        "training": dict(training),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def load_dictionary(folder: str | Path) -> DictionaryMethod:
    """The dictionary of a folder, in evaluation mode.

    Raises UserError if the folder holds no dictionary, or names a class that is not one of `core.methods`.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        state = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no trained dictionary: {error.filename or error} is missing.") from error
    method = method_class(manifest["class"])(**manifest["hyperparameters"])
    method.load_state_dict(state)
    return method.eval()


def method_class(name: str) -> type[DictionaryMethod]:
    module, _, attribute = name.rpartition(".")
    if not module.startswith("core.methods."):
        raise UserError(f"The manifest names the class {name}; only classes below core.methods are loaded.")
    found = getattr(import_module(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, DictionaryMethod)):
        raise UserError(f"The manifest names {name}, which is no dictionary-learning method.")
    return found
