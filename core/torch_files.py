"""Tensors of files that `torch.save` wrote. Their pickle is read as a description; nothing in it is ever called.

Facts, from PyTorch 2.13. A file is a zip archive with the pickle `<name>/data.pkl` and one entry `<name>/data/<key>`
for each storage; before 1.6 it was four pickles (a magic number, the protocol, the system, the object), a pickled list
of keys, and for each key the number of elements (int64) and the elements. In the object, `_rebuild_tensor_v2(storage,
offset, size, stride, ...)` stands for a tensor, and ("storage", type, key, device, n) for a storage.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from core.archives import archive, entry_bytes
from core.errors import UserError, shown

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number
MAX_OPERATIONS = 200_000  # of a pickle; a dictionary has some hundred
MAX_AXES = 8
SHARED = 2  # tensors may take up this many times the storages' bytes: a tied pair of matrices is stored once
DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
UNPLAIN = {  # what stands for a tensor that is not plain numbers in order
    "_get_layout": "a sparse tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor of the meta device, which has no numbers",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_from_type": "a tensor of a class of its own",
    "_rebuild_from_type_v2": "a tensor of a class of its own",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
}
PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
ONLY_TENSORS = "Only tensors are read; pickled objects are not read, since they can run code."
LITERALS = (  # operations that push their argument
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"),
)
TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype | None  # None: bytes
    n_bytes: int


@dataclass(frozen=True)
class _Placed:
    """A tensor as it lies in a storage; offset and strides in elements."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return 0 in self.size

    @property
    def n_bytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize

    def problem(self) -> str | None:
        """Why this is no plain dense tensor, in words; None if it is one."""
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or len(self.size) > MAX_AXES:
            return "axes that do not fit together"
        if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**62 for n in numbers):
            return "sizes or strides that are no whole numbers"
        reach = 0  # of the axes with smaller strides, in elements
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size > 1 and stride <= reach and not self.is_empty:
                return "elements that lie in one place (an expanded tensor; save tensor.contiguous())"
            reach += (size - 1) * stride if size else 0
        if not self.is_empty and (self.offset + reach + 1) * self.dtype.itemsize > self.storage.n_bytes:
            return f"more elements than its storage of {self.storage.n_bytes:,} bytes holds"
        return None


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors and numbers of a dictionary that was saved.

    Raises UserError for a file that holds anything else, for tensors that are not plain, and for a file that declares
    more than it holds; whatever the parsers raise where bytes are damaged.
    """
    with path.open("rb") as file:
        is_legacy = file.read(len(LEGACY)) == LEGACY
    return _legacy(path) if is_legacy else _zipped(path)


def _zipped(path: Path) -> dict[str, Tensor]:
    with archive(path) as content:
        names = content.namelist()
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl" and name.count("/") < 2]
        if len(pickles) != 1:
            kind = "a TorchScript program" if any("constants.pkl" in name for name in names) else "no saved object"
            raise UserError(f"{path} holds {kind}, not a dictionary of tensors.")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in names and bytes(entry_bytes(content, f"{prefix}byteorder").numpy()) != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not read.")
        with content.open(pickles[0]) as file:
            placed = _checked(_described(file, path), path)

        def stored(storage: _Storage) -> Tensor:
            data = entry_bytes(content, f"{prefix}data/{storage.key}")
            if len(data) != storage.n_bytes:
                raise UserError(f"{path}: {shown(storage.key)} has {len(data):,} bytes, not {storage.n_bytes:,}.")
            return data

        return _read(placed, stored)


def _legacy(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(2):
            _described(file, path)
        if _described(file, path).get("little_endian") is not True:
            raise UserError(f"{path} was written on a big-endian machine, which is not read.")
        placed = _checked(_described(file, path), path)
        wanted = {value.storage.key: value.storage for value in placed.values() if isinstance(value, _Placed)}
        places: dict[str, int] = {}
        for key in _described(file, path):
            if key not in wanted:
                raise UserError(f"{path} has storages that no tensor uses: it is damaged.")
            storage = wanted[key]
            n = int.from_bytes(file.read(8), "little")
            itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
            if n * itemsize != storage.n_bytes or file.tell() + storage.n_bytes > size:
                raise UserError(f"{path} declares {storage.n_bytes:,} bytes in one place that it does not hold.")
            places[key] = file.tell()
            file.seek(storage.n_bytes, 1)

        def stored(storage: _Storage) -> Tensor:
            data = torch.empty(storage.n_bytes, dtype=torch.uint8)
            file.seek(places[storage.key])
            if file.readinto(data.numpy().data) != storage.n_bytes:
                raise EOFError("the file ends early")
            return data

        return _read(placed, stored)


def _checked(content: Any, path: Path) -> dict[str, _Placed | int | float]:
    """The described object, if it is a dictionary of plain tensors and numbers."""
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, _Placed) else type(content).__name__.strip("_")
        raise UserError(f"{path} contains {kind}, not a dictionary of tensors.")
    wrong = [
        shown(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, _Placed | int | float))
    ]
    if wrong:
        raise UserError(f"{path} contains more than tensors: {', '.join(wrong[:5])}. Only tensors are read.")
    tensors = {name: value for name, value in content.items() if isinstance(value, _Placed)}
    for name, tensor in tensors.items():
        if problem := tensor.problem():
            raise UserError(f"{path}: {shown(name)} has {problem}. Only plain dense tensors are read.")
    storages: dict[str, _Storage] = {}
    for tensor in tensors.values():
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise UserError(f"{path} describes one storage in two ways: it is damaged.")
    held = sum(storage.n_bytes for storage in storages.values())
    declared = sum(tensor.n_bytes for tensor in tensors.values())
    if declared > SHARED * held:
        raise UserError(f"{path} declares tensors of {declared:,} bytes, but holds {held:,} bytes of numbers.")
    return content


def _read(placed: dict[str, _Placed | int | float], stored: Callable[[_Storage], Tensor]) -> dict[str, Tensor]:
    """The tensors, each storage read once."""
    storages: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in placed.items():
        if isinstance(value, _Placed):
            if value.storage.key not in storages:
                storages[value.storage.key] = stored(value.storage)
            flat = storages[value.storage.key]
            whole = flat[: len(flat) // value.dtype.itemsize * value.dtype.itemsize].view(value.dtype)
            tensors[name] = whole.as_strided(value.size, value.stride, 0 if value.is_empty else value.offset)
        else:
            tensors[name] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return tensors


def _described(file: IO[bytes], path: Path) -> Any:
    """The object of the pickle that starts here: plain values, with `_Name`, `_Storage` and `_Placed` in it."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    argument: Any
    for n, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if n > MAX_OPERATIONS:
            raise UserError(f"{path} has a description of more than {MAX_OPERATIONS:,} steps: it is no dictionary.")
        if name in PUSHED:
            stack.append(PUSHED[name])
        elif name in LITERALS:
            stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            marks.append(len(stack))
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set(stack[-1], items, path)
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            _plain_list(stack[-1]).extend(items)
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, named = stack[-2:]
            if not isinstance(module, str) or not isinstance(named, str):
                raise ValueError("a name that is no text")
            stack[-2:] = [_Name(module, named)]
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), path))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_made(called, arguments, path))
        elif name == "BUILD" and isinstance(stack[-2], dict):  # attributes of a state dict: versions of modules
            stack.pop()
        elif name == "STOP":
            return stack.pop()
        else:
            raise UserError(f"{path} contains a pickled object ({name}). {ONLY_TENSORS}")
    raise EOFError("the pickle ends early")


def _set(content: Any, items: list[Any], path: Path) -> None:
    if not isinstance(content, dict) or len(items) % 2:
        raise ValueError("items of no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):
            raise UserError(f"{path} has a key that is no name. {ONLY_TENSORS}")
        content[key] = value


def _plain_list(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError("items of no list")
    return content


def _storage(identity: Any, path: Path) -> _Storage:
    kind, name, key, _, n, *view = identity
    if kind != "storage" or not isinstance(key, str) or isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError("no storage")
    if any(part is not None for part in view):
        raise UserError(f"{path} has a storage that is a view of another. Save it again with a current PyTorch.")
    if name == _Name("torch.storage", "UntypedStorage"):
        return _Storage(key, None, n)
    if not isinstance(name, _Name):
        raise ValueError("a storage of no kind")
    dtype = DTYPES.get(name.name) if name.module in ("torch", "torch.cuda") else None
    if dtype is None:
        raise UserError(f"{path} contains numbers of the kind {name}, which are not read.")
    return _Storage(key, dtype, n * dtype.itemsize)


def _made(called: Any, arguments: Any, path: Path) -> Any:
    """What a call in the pickle stands for."""
    if not isinstance(called, _Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of something that is no name")
    if called == _Name("collections", "OrderedDict"):
        content: dict[str | int, Any] = {}
        for pair in arguments[0] if arguments else ():
            _set(content, list(pair), path)
        return content
    if called.module == "torch._utils" and called.name in PARAMETERS:
        return arguments[0]
    if called.module == "torch._utils" and called.name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
    ):
        return _placed(called.name, arguments, path)
    if called.module.startswith("torch") and called.name in UNPLAIN:
        raise UserError(f"{path} contains {UNPLAIN[called.name]}. Only plain dense tensors of numbers are read.")
    raise UserError(f"{path} contains a pickled {called}. {ONLY_TENSORS}")


def _placed(rule: str, arguments: tuple[Any, ...], path: Path) -> _Placed:
    storage, offset, size, stride, *rest = arguments
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor without a storage, a size or strides")
    dtype = storage.dtype
    if rule == "_rebuild_tensor_v3":
        named, rest = rest[2], [*rest[:2], *rest[3:]]
        dtype = getattr(torch, named.name, None) if isinstance(named, _Name) and named.module == "torch" else None
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{path} contains numbers of a kind that is not read.")
    if len(rest) > 2 and rest[2]:  # lazily conjugated or negated
        raise UserError(f"{path} contains a tensor that is negated or conjugated only when it is used. Save x.clone().")
    return _Placed(storage, dtype, offset, size, stride)
