"""A trained dictionary as a folder: `weights.safetensors`, and `manifest.json` with what rebuilds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.artifacts import MANIFEST as ARTIFACT
from core.artifacts import problem
from core.atomic import atomically, write_atomically
from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.methods.settings import rebuilt
from core.reading import field, read_object
from core.tensor_files import FLOATS, is_finite, read_safetensors

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
MAX_DEPTH = 8  # of dictionaries that are parts of others


def save_dictionary(method: Dictionary, training: Mapping[str, Any], folder: Path) -> None:
    """Write all parameters and buffers (fp32, on the CPU), the class, its arguments and how it was trained.

    Raises OSError where the disk refuses."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state_dict().items()}
    with atomically(folder / WEIGHTS) as temporary:
        save_file(state, temporary)
    write_atomically(folder / MANIFEST, json.dumps({**method.description(), "training": dict(training)}, indent=1))


def load_dictionary(folder: str | Path) -> Dictionary:
    """The dictionary of a folder, in evaluation mode.

    Raises UserError if the folder holds no dictionary; if its files are damaged, changed since the store wrote them, or
    do not fit together; if a number is not finite; and for a class that is not one of `core.methods`.
    """
    folder = Path(folder)
    missing = [name for name in (MANIFEST, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} holds no trained dictionary: {' and '.join(missing)} is missing.")
    require_unchanged(folder)
    description = read_object(folder / MANIFEST)
    state = read_safetensors(folder / WEIGHTS).all()
    try:
        _require_sizes(description, state, "", folder / MANIFEST)
        with torch.device("meta"):  # takes no memory
            shapes = {name: tensor.shape for name, tensor in rebuilt(description).state_dict().items()}
        _require_shapes(state, shapes, folder / WEIGHTS)
        method = rebuilt(description)
        _require_numbers(state, method.state_dict(), folder / WEIGHTS)
        method.load_state_dict(state)
        method.require_sound()
    except UserError as error:
        raise UserError(f"{folder} contains no readable dictionary: {error}") from error
    except Exception as error:  # constructors raise whatever a damaged description leads to
        cause = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{folder} contains no readable dictionary: it is damaged, or from an earlier version of this code "
            f"({type(error).__name__}: {cause:.160})."
        ) from error
    return method.eval()


def require_unchanged(folder: Path) -> None:
    """Raises UserError if the dictionary's files are not those that the store wrote, by the hashes in its
    `artifact.json`; a folder without one is not checked."""
    if (folder / ARTIFACT).is_file() and (what := problem(folder)):
        raise UserError(
            f"{folder}: {what}. Delete the folder, so that the dictionary is trained again; or remove {ARTIFACT} if "
            "the change is wanted."
        )


def _require_sizes(description: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    """Raises UserError unless the sizes in the description are those of the decoder, part by part."""
    if prefix.count("parts.") > MAX_DEPTH:
        raise UserError(f"{path} has parts within parts more than {MAX_DEPTH} times.")
    settings = field(description, "hyperparameters", dict, path)
    W_dec = state.get(f"{prefix}W_dec")
    if W_dec is None or W_dec.ndim < 2:
        raise UserError(f"{path.with_name(WEIGHTS)} has no matrix {prefix}W_dec.")
    for name, size in (("dict_size", W_dec.shape[0]), ("d_model", W_dec.shape[-1])):
        if name in settings and field(settings, name, int, path) != size:
            raise UserError(f"{path}: {name} is {settings[name]}, but the weights have {size}.")
    if "parts" in settings:
        kept = field(settings, "n_kept", list, path)
        if not all(type(n) is int and n >= 0 for n in kept) or sum(kept) != W_dec.shape[0]:
            raise UserError(f"{path}: n_kept does not fit the {W_dec.shape[0]} latents.")
        for number, part in enumerate(field(settings, "parts", list, path)):
            if not isinstance(part, dict):
                raise UserError(f"{path}: a part is no description of a dictionary.")
            _require_sizes(part, state, f"{prefix}parts.{number}.", path)


def _require_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: Path) -> None:
    """Raises UserError unless the file has exactly the tensors that the class has."""
    for name in sorted(state.keys() | shapes.keys()):
        if name not in state:
            raise UserError(f"{path} has no {name}.")
        if name not in shapes:
            raise UserError(f"{path} contains an unknown tensor, {name:.80}.")
        if state[name].shape != shapes[name]:
            raise UserError(f"{path}: {name} has the shape {list(state[name].shape)}, not {list(shapes[name])}.")


def _require_numbers(state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError for numbers of another kind, and for some that are not finite. What is NaN before training, such
    as a threshold, may be so afterwards."""
    for name, tensor in state.items():
        fits = tensor.dtype in FLOATS if fresh[name].is_floating_point() else tensor.dtype == fresh[name].dtype
        if not fits:
            raise UserError(f"{path}: {name} holds numbers of the kind {tensor.dtype}, not {fresh[name].dtype}.")
        if is_finite(fresh[name]) and not is_finite(tensor.to(fresh[name].dtype)):
            raise UserError(f"{path}: {name} contains numbers that are NaN or infinite.")
