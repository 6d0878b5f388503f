"""Read the files that weights come in: tensors only, and nothing of a file is ever run."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.errors import UserError

UNREADABLE = (  # what the readers of the three formats raise
    OSError,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)


class Weights:
    """The tensors of one file, taken by name; every error names the file."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self._left = path, dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """The same tensors under other names."""
        return Weights(self.path, {rename(name): tensor for name, tensor in self._left.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError if there is no such tensor."""
        if name not in self._left:
            held = ", ".join(sorted(self._left)) or "nothing else"
            raise UserError(f"{self.path} has no {name}; it holds {held}.")
        return tuple(self._left[name].shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor in fp32; raises UserError if it is not there, of another shape, or not finite."""
        found = self.shape(name)
        if found != shape:
            raise UserError(f"{self.path}: {name} has the shape {list(found)}, not {list(shape)}.")
        tensor = self._left.pop(name).float()
        if not tensor.isfinite().all():
            raise UserError(f"{self.path}: {name} holds numbers that are NaN or infinite.")
        return tensor.contiguous()

    def take_number(self, name: str) -> float:
        """A tensor of one element, as a number."""
        if torch.Size(self.shape(name)).numel() != 1:
            raise UserError(f"{self.path}: {name} has the shape {list(self.shape(name))}, not that of one number.")
        return float(self._left.pop(name))

    def drop(self, *names: str) -> None:
        """Leave tensors that inference does not need, where they are there."""
        for name in names:
            self._left.pop(name, None)

    def done(self) -> None:
        """Raises UserError if tensors were not taken: then the file means more than was understood."""
        if self._left:
            raise UserError(f"{self.path} holds tensors that are not known here: {', '.join(sorted(self._left))}.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, not an object with keys.")
    return found


def read_safetensors(path: Path) -> Weights:
    """Raises UserError if the file is missing, cut short or something else."""
    return _read(path, lambda: load_file(path), "safetensors that are whole")


def read_pt(path: Path) -> Weights:
    """A dictionary of tensors that `torch.save` wrote. Raises UserError for anything else in it: other pickled objects
    could run code, and are not unpickled."""

    def tensors() -> dict[str, Tensor]:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise UserError(f"{path} holds {type(found).__name__}, not a dictionary of tensors.")
        numbers = {name: torch.tensor(value) for name, value in found.items() if isinstance(value, int | float)}
        found = {**found, **numbers}
        wrong = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
        if wrong:
            raise UserError(f"{path} holds more than tensors: {', '.join(wrong[:5])}. Only tensors are read.")
        return {str(name): value for name, value in found.items()}

    what = "a file of tensors alone, whole (pickled objects are not read, since they can run code)"
    return _read(path, tensors, what)


def read_npz(path: Path) -> Weights:
    """Raises UserError for object arrays, which are pickles, and for what is no whole .npz."""

    def arrays() -> dict[str, Tensor]:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    what = "a whole .npz of numbers (arrays of objects are not read, since they can run code)"
    return _read(path, arrays, what)


def _read(path: Path, read: Callable[[], dict[str, Tensor]], expected: str) -> Weights:
    try:
        return Weights(path, read())
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing.") from error
    except UNREADABLE as error:
        said = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is not {expected} ({type(error).__name__}: {said:.160}).") from error
