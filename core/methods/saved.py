"""A trained dictionary as a folder: `weights.safetensors`, and `manifest.json` with what rebuilds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from core.atomic import atomically, write_atomically
from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.methods.settings import rebuilt

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"


def save_dictionary(method: Dictionary, training: Mapping[str, Any], folder: Path) -> None:
    """Write all parameters and buffers (fp32, on the CPU), the class, its arguments and how it was trained.

    Raises OSError where the disk refuses."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state_dict().items()}
    with atomically(folder / WEIGHTS) as temporary:
        save_file(state, temporary)
    write_atomically(folder / MANIFEST, json.dumps({**method.description(), "training": dict(training)}, indent=1))


def load_dictionary(folder: str | Path) -> Dictionary:
    """The dictionary of a folder, in evaluation mode.

    Raises UserError if the folder holds no dictionary, or names a class that is not one of `core.methods`.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        state = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no trained dictionary: {error.filename or error} is missing.") from error
    method = rebuilt(manifest)
    method.load_state_dict(state)
    return method.eval()
