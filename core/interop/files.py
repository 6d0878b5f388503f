"""Read files of weights: only tensors, and no code from a file is ever run."""

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

UNREADABLE = (  # errors that the readers of the three formats raise
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
    """The tensors of one file, taken out by name. Every error names the file."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self._remaining = path, dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._remaining

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """The same tensors under other names."""
        return Weights(self.path, {rename(name): tensor for name, tensor in self._remaining.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError if there is no such tensor."""
        if name not in self._remaining:
            held = ", ".join(sorted(self._remaining)) or "nothing else"
            raise UserError(f"{self.path} has no {name}; it contains {held}.")
        return tuple(self._remaining[name].shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor in fp32. Raises UserError if it is missing, has another shape, or is not finite."""
        actual = self.shape(name)
        if actual != shape:
            raise UserError(f"{self.path}: {name} has the shape {list(actual)}, not {list(shape)}.")
        tensor = self._remaining.pop(name).float()
        if not tensor.isfinite().all():
            raise UserError(f"{self.path}: {name} contains numbers that are NaN or infinite.")
        return tensor.contiguous()

    def take_number(self, name: str) -> float:
        """A tensor of one element, as a number."""
        if torch.Size(self.shape(name)).numel() != 1:
            raise UserError(f"{self.path}: {name} has the shape {list(self.shape(name))}, not that of one number.")
        return float(self._remaining.pop(name))

    def drop(self, *names: str) -> None:
        """Discard tensors that inference does not need, if they exist."""
        for name in names:
            self._remaining.pop(name, None)

    def done(self) -> None:
        """Raises UserError if tensors remain, since the reader then has not understood the file."""
        if self._remaining:
            raise UserError(f"{self.path} contains unknown tensors: {', '.join(sorted(self._remaining))}.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} contains {type(content).__name__}, not an object with keys.")
    return content


def read_safetensors(path: Path) -> Weights:
    """Raises UserError if the file is missing, incomplete or in another format."""
    return _read(path, lambda: load_file(path), "a complete safetensors file")


def read_pt(path: Path) -> Weights:
    """A dictionary of tensors that `torch.save` wrote. Raises UserError for any other content: pickled objects are not
    read, since they can run code."""

    def tensors() -> dict[str, Tensor]:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise UserError(f"{path} contains {type(content).__name__}, not a dictionary of tensors.")
        numbers = {name: torch.tensor(value) for name, value in content.items() if isinstance(value, int | float)}
        content = {**content, **numbers}
        wrong = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
        if wrong:
            raise UserError(f"{path} contains more than tensors: {', '.join(wrong[:5])}. Only tensors are read.")
        return {str(name): value for name, value in content.items()}

    what = "a complete file of tensors only (pickled objects are not read, since they can run code)"
    return _read(path, tensors, what)


def read_npz(path: Path) -> Weights:
    """Raises UserError if the file is not a complete .npz, or has arrays of objects, which are pickles."""

    def arrays() -> dict[str, Tensor]:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    what = "a complete .npz of numbers (arrays of objects are not read, since they can run code)"
    return _read(path, arrays, what)


def _read(path: Path, read: Callable[[], dict[str, Tensor]], expected: str) -> Weights:
    try:
        return Weights(path, read())
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing.") from error
    except UNREADABLE as error:
        cause = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is not {expected} ({type(error).__name__}: {cause:.160}).") from error
