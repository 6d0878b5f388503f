"""Read files of weights: only plain dense tensors, and no code from a file is ever run.

Headers are checked before anything is allocated: a file that declares more numbers than it holds is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from math import isfinite, prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.archives import archive, entry_bytes
from core.errors import UserError, shown
from core.reading import POINTER, kind_of, parse_json
from core.torch_files import tensors_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as in the format
MAX_AXES = 8
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
WRAPPERS = ("_orig_mod.", "module.")  # what torch.compile and DataParallel put before the names


class Declared(NamedTuple):
    """A tensor as the header of a safetensors file declares it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # of its bytes, counted from the end of the header
    end: int


class Weights:
    """The tensors of one file, taken out by name. Every error names the file."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self._remaining = path, dict(tensors)
        self._held = sorted(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._remaining

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """The same tensors under other names. Raises UserError if two get one name."""
        tensors = {rename(name): tensor for name, tensor in self._remaining.items()}
        if len(tensors) < len(self._remaining):
            raise UserError(f"{self.path} has one tensor under two names: it contains {_listed(self._remaining)}.")
        return Weights(self.path, tensors)

    def unwrapped(self) -> Weights:
        """Without what compiled and wrapped modules put into the names: `_orig_mod.` and `module.`."""
        return self.renamed(_unwrapped)

    def all(self) -> dict[str, Tensor]:
        """All remaining tensors as they are stored, by name."""
        taken, self._remaining = self._remaining, {}
        return taken

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError if there is no such tensor."""
        if name not in self._remaining:
            raise UserError(f"{self.path} has no {name}; it contains {_listed(self._held)}.")
        return tuple(self._remaining[name].shape)

    def take(self, name: str, *shape: int, or_nan: bool = False) -> Tensor:
        """The tensor in fp32. Raises UserError if it is missing, has another shape, is not finite, or holds no floating
        point numbers of at least 16 bits (quantised weights mean nothing without their scales). `or_nan`: NaN will do.
        """
        actual = self.shape(name)
        if actual != shape:
            raise UserError(f"{self.path}: {name} has the shape {list(actual)}, not {list(shape)}.")
        stored = self._remaining.pop(name)
        if stored.dtype not in FLOATS:
            kind = str(stored.dtype).removeprefix("torch.")
            raise UserError(
                f"{self.path}: {name} holds numbers of the kind {kind}; only floats of 16 to 64 bits are read."
            )
        tensor = stored.float()
        if not is_finite(tensor.nan_to_num(0, torch.inf, -torch.inf) if or_nan else tensor):
            why = " in float32" if stored.dtype == torch.float64 else ""
            raise UserError(f"{self.path}: {name} contains numbers that are NaN or infinite{why}.")
        return tensor.contiguous()

    def take_number(self, name: str) -> float:
        """A tensor of one element, as a finite number."""
        if prod(self.shape(name)) != 1:
            raise UserError(f"{self.path}: {name} has the shape {list(self.shape(name))}, not that of one number.")
        stored = self._remaining.pop(name)
        if stored.is_complex() or not isfinite(value := float(stored)):
            raise UserError(f"{self.path}: {name} is {stored.item()!r}, not a finite number.")
        return value

    def take_whole(self, name: str, at_least: int = 0) -> int:
        """A tensor of one element, as a whole number."""
        value = self.take_number(name)
        if value != int(value) or value < at_least:
            raise UserError(f"{self.path}: {name} is {value:g}, not a whole number of {at_least} or more.")
        return int(value)

    def drop(self, *names: str) -> None:
        """Discard tensors that inference does not need, if they exist."""
        for name in names:
            self._remaining.pop(name, None)

    def done(self) -> None:
        """Raises UserError if tensors remain, since the reader then has not understood the file."""
        if self._remaining:
            raise UserError(f"{self.path} contains unknown tensors: {_listed(self._remaining)}.")


def read_safetensors(path: Path) -> Weights:
    """Raises UserError if the file is missing, incomplete, in another format, or declares more than it holds."""

    def tensors() -> dict[str, Tensor]:
        declared = declared_in(path)
        loaded = load_file(path)
        if {name: tuple(tensor.shape) for name, tensor in loaded.items()} != {n: d.shape for n, d in declared.items()}:
            raise UserError(f"{path} declares a tensor twice: it is damaged.")
        return loaded

    return _read(path, tensors, "a complete safetensors file")


def declared_in(path: Path) -> dict[str, Declared]:
    """What the header of a safetensors file declares, checked against the file's size; its numbers are not read.

    Raises UserError if the header is damaged, or if the tensors do not fill the file exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (n_header,) = struct.unpack("<Q", file.read(8)) if size >= 8 else (0,)
        if not 2 <= n_header <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path} is not a complete safetensors file: a header of {n_header:,} bytes in {size:,}.")
        header = parse_json(file.read(n_header), f"{path}, header")
    if not isinstance(header, dict):
        raise UserError(f"{path}, header: {kind_of(header)}, not an object with keys.")
    header.pop("__metadata__", None)
    declared = {name: _declared(entry, f"{path}: {shown(name)}") for name, entry in header.items()}
    at = 0
    for tensor in sorted(declared.values(), key=lambda d: (d.begin, d.end)):
        if tensor.begin != at:
            raise UserError(f"{path} is damaged: its tensors overlap or leave gaps.")
        at = tensor.end
    if at != size - 8 - n_header:
        held = f"its tensors need {at:,} bytes, it has {size - 8 - n_header:,}"
        raise UserError(f"{path} is not a complete safetensors file: {held}.")
    return declared


def _declared(entry: object, where: str) -> Declared:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            is_shape = len(shape) <= MAX_AXES and all(type(n) is int and 0 <= n < 2**62 for n in shape)
            if dtype not in ITEM_BYTES:
                raise UserError(f"{where} holds numbers of the kind {shown(dtype)}, which are not read.")
            if is_shape and prod(shape) * ITEM_BYTES[dtype] == end - begin:
                return Declared(dtype, tuple(shape), begin, end)
    raise UserError(f"{where} has a damaged entry in the header: its shape does not fit its bytes.")


def read_pt(path: Path) -> Weights:
    """A dictionary of tensors that `torch.save` wrote. Raises UserError for any other content: pickled objects are not
    read, since they can run code."""
    what = "a complete file of tensors only (pickled objects are not read, since they can run code)"
    return _read(path, lambda: tensors_of(path), what)


def read_npz(path: Path) -> Weights:
    """Raises UserError if the file is not a complete .npz, has arrays of objects, which are pickles, or declares more
    numbers than it holds."""

    def arrays() -> dict[str, Tensor]:
        with archive(path) as content:
            return {
                name.removesuffix(".npy"): _array(entry_bytes(content, name), f"{path}: {shown(name)}")
                for name in content.namelist()
            }

    what = "a complete .npz of numbers (arrays of objects are not read, since they can run code)"
    return _read(path, arrays, what)


def _array(data: Tensor, where: str) -> Tensor:
    """The array of a `.npy`, given its bytes."""
    head = BytesIO(data[: 2**16].numpy().tobytes())
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(head)
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise UserError(f"{where} holds {shown(dtype)}, not numbers of at most 64 bits.")
    n_bytes = len(data) - head.tell()
    if any(n < 0 for n in shape) or prod(shape) * dtype.itemsize != n_bytes:
        raise UserError(f"{where} declares the shape {list(shape)}, which does not fit its {n_bytes:,} bytes.")
    body = data[head.tell() :].numpy()
    flat = (body.copy() if head.tell() % dtype.itemsize else body).view(dtype)
    array = flat.reshape(shape[::-1]).T if in_columns else flat.reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


def _read(path: Path, read: Callable[[], dict[str, Tensor]], expected: str) -> Weights:
    if not path.is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}.")
    try:
        with path.open("rb") as file:
            start = file.read(256)
        if start.startswith(POINTER):
            raise UserError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it: git lfs pull")
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise UserError(f"{path} is a web page, not the file itself. Download it again.")
        return Weights(path, read())
    except UserError:
        raise
    except Exception as error:  # the parsers of three formats raise whatever damaged bytes lead to
        cause = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is not {expected} ({type(error).__name__}: {cause:.160}).") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, without another tensor of this size."""
    return not tensor.numel() or all(isfinite(bound) for bound in tensor.aminmax())


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        parts = name.split(f".{wrapper}")
        name = ".".join(parts).removeprefix(wrapper)
    return name


def _listed(names: Iterable[str]) -> str:
    """The names of tensors, fit for a message."""
    some = [shown(name) for name in sorted(names)]
    return ", ".join(some[:12]) + (f" and {len(some) - 12} more" if len(some) > 12 else "") or "nothing"
