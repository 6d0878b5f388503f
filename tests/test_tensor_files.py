"""Files of tensors: what the libraries write is read as it is; anything else is one message, before memory is taken."""

import io
import json
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from core.errors import UserError
from core.tensor_files import Weights, read_npz, read_pt, read_safetensors
from tests.test_reading import FUZZ, mutations

PLAIN = {"W": torch.arange(12.0).view(3, 4), "b": torch.tensor([1.5, -2.0, 0.25]), "k": torch.tensor(3)}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)
READERS: dict[str, Callable[[Path], Weights]] = {"t.safetensors": read_safetensors, "t.pt": read_pt, "t.npz": read_npz}


def put(path: Path) -> Path:
    """A file of `PLAIN`, in the format that the name says."""
    if path.suffix == ".safetensors":
        save_file(PLAIN, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in PLAIN.items()})
    else:
        torch.save(PLAIN, path)
    return path


def rezipped(whole: bytes, changed: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive with other content in some entries, and the right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w", packing) as new:
        for name in old.namelist():
            new.writestr(name, changed.get(name, old.read(name)))
    return out.getvalue()


class Counted(torch.nn.Module):
    """A module with a buffer, parameters and, in its state, the versions of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_what_torch_saves_is_read_as_torch_reads_it(dtype: torch.dtype, options: Any, tmp_path: Path) -> None:
    flat = (torch.arange(24) % 2 if dtype is torch.bool else torch.arange(24)).to(dtype)
    tied = {"whole": flat, "part": flat[2:5], "number": flat[0], "none": flat[:0]}
    views = {"turned": flat.view(4, 6).T, "every_second": flat[::2], "one": flat.view(1, 24, 1)}
    own = {name: view.clone(memory_format=torch.preserve_format) for name, view in views.items()}
    state = OrderedDict(tied | own | {"cube": flat.clone().view(2, 3, 4).permute(2, 0, 1)})
    torch.save({**state, "half": 0.5, "seven": 7}, tmp_path / "a.pt", **options)
    read = read_pt(tmp_path / "a.pt").all()
    assert read.pop("half") == 0.5 and read.pop("seven") == 7
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in read.items()} == {
        name: (dtype, tensor.tolist()) for name, tensor in state.items()
    }


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_states_of_modules_and_parameters_are_read(options: Any, tmp_path: Path) -> None:
    module = Counted()
    for state in (module.state_dict(), dict(module.named_parameters()) | {"steps": module.steps}):
        torch.save(state, tmp_path / "a.pt", **options)
        read = read_pt(tmp_path / "a.pt").all()
        assert sorted(read) == ["layer.bias", "layer.weight", "steps"] and read["steps"] == 7
        assert torch.equal(read["layer.weight"], module.layer.weight)


def sparse() -> Tensor:
    return torch.eye(3).to_sparse()


class OwnKind(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of kinds of tensors that it is still working on
@pytest.mark.parametrize(
    ("tensor", "message"),
    [(sparse, "a sparse tensor"), (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor"),
     (lambda: torch.zeros(3, 3, device="meta"), "a tensor of the meta device"),
     (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "a nested tensor"),
     (lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "a quantised tensor|QInt8Storage"),
     (lambda: torch.eye(3).as_subclass(OwnKind), "a pickled .*OwnKind|a tensor of a class of its own"),
     (lambda: torch.zeros(1, 3).expand(3, 3), "elements that lie in one place"),
     (lambda: torch.zeros(5).as_strided((3, 3), (1, 1)), "elements that lie in one place"),
     (lambda: torch._neg_view(torch.eye(3)), "negated or conjugated"),
     (lambda: torch.eye(3, dtype=torch.complex64), "ComplexFloatStorage, which are not read"),
     (lambda: torch.eye(3, dtype=torch.complex64).conj(), "ComplexFloatStorage, which are not read")],
)  # fmt: skip
def test_a_tensor_that_is_not_plain_and_dense_is_refused(tensor: Any, message: str, tmp_path: Path) -> None:
    torch.save({"W": tensor()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message) as error:
        read_pt(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(error.value)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.uint8, torch.uint16, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_weights_of_whole_or_8_bit_numbers_are_refused(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    save: Any = save_file if name.endswith("safetensors") else torch.save
    save({"W": torch.ones(2, 2).to(dtype)}, tmp_path / name)
    with pytest.raises(UserError, match=r"W holds numbers of the kind \w+; only floats of 16 to 64 bits are read"):
        READERS[f"t{Path(name).suffix}"](tmp_path / name).take("W", 2, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_in_float32_are_refused(value: float, tmp_path: Path) -> None:
    torch.save({"W": torch.full((2,), value, dtype=torch.float64), "k": value}, tmp_path / "a.pt")
    weights = read_pt(tmp_path / "a.pt")
    with pytest.raises(UserError, match="W contains numbers that are NaN or infinite"):
        weights.take("W", 2)
    with pytest.raises(UserError, match=r"k is .*, not a (finite|whole) number"):
        weights.take_whole("k", 1 if value != 1e300 else 10**400)


def test_a_whole_number_is_whole(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor(4.0), "b": torch.tensor(2.5), "c": torch.tensor(-1), "d": 3}, tmp_path / "a.pt")
    weights = read_pt(tmp_path / "a.pt")
    assert (weights.take_whole("a"), weights.take_whole("d")) == (4, 3)
    for name in ("b", "c"):
        with pytest.raises(UserError, match=f"{name} is .*, not a whole number of 0 or more"):
            weights.take_whole(name)


def npy(shape: str, body: bytes) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def bomb(path: Path, kind: str) -> None:
    """A file of some kB that asks for gigabytes, one for each way of asking."""
    if kind in ("expanded", "expanded, old format"):
        old = {"_use_new_zipfile_serialization": False} if "old" in kind else {}
        torch.save({"W": torch.zeros(1).expand(60_000, 60_000)}, path, **old)
    elif kind == "many names for one storage":
        shared = torch.zeros(1000)
        torch.save({str(i): shared for i in range(5000)}, path)
    elif kind == "a storage that the old format does not hold":
        torch.save({"W": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"cpuq\x06K\x02N", b"cpuq\x06J\xff\xff\xff\x7fN"))
    elif kind == "packed zeros":
        torch.save({"W": torch.zeros(8_000_000)}, path)
        path.write_bytes(rezipped(path.read_bytes(), {}, zipfile.ZIP_DEFLATED))
    elif kind == "packed zeros, npz":
        np.savez_compressed(path, W=np.zeros(8_000_000, np.float32))
    elif kind == "a shape beyond the entry":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("W.npy", npy("(4000000000,)", b"\0" * 16))
    elif kind == "a header of 2^60 bytes":
        path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    elif kind == "a header that lists more than the file":
        header = json.dumps({"W": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    else:
        entries = {str(i): {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for i in range(50_000)}
        header = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("t.pt", "expanded", "elements that lie in one place"),
     ("t.pt", "expanded, old format", "elements that lie in one place"),
     ("t.pt", "many names for one storage", "declares tensors of 20,000,000 bytes, but holds 4,000 bytes"),
     ("t.pt", "a storage that the old format does not hold", "that it does not hold"),
     ("t.pt", "packed zeros", "No more than 4 times a file's size is unpacked"),
     ("t.npz", "packed zeros, npz", "No more than 4 times a file's size is unpacked"),
     ("t.npz", "a shape beyond the entry", "does not fit its 16 bytes"),
     ("t.safetensors", "a header of 2^60 bytes", "a header of 1,152,921,504,606,846,976 bytes in 10"),
     ("t.safetensors", "a header that lists more than the file", "its tensors need 40,000,000,000 bytes, it has 16"),
     ("t.safetensors", "many tensors in one place", "its tensors overlap or leave gaps")],
)  # fmt: skip
def test_a_file_that_declares_more_than_it_holds_is_refused_at_once(
    name: str, kind: str, message: str, tmp_path: Path
) -> None:
    bomb(tmp_path / name, kind)
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        READERS[name](tmp_path / name)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS.*git lfs pull"),
     (b"<!DOCTYPE html><html>Sign in</html>", "a web page"), (b"", "is not a complete"),
     (b"text", "is not a complete")],
)  # fmt: skip
def test_what_is_no_file_of_tensors_is_said(content: bytes, message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_and_a_folder_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} is missing"):
        READERS[name](tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is not a file"):
        READERS[name](tmp_path / name)


def test_names_of_compiled_and_wrapped_modules_are_those_of_the_module(tmp_path: Path) -> None:
    names = ("_orig_mod.module.encoder.weight", "module.encoder._orig_mod.bias", "decoder.module.weight", "my_module.b")
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "a.pt")
    assert sorted(read_pt(tmp_path / "a.pt").unwrapped().all()) == [
        "decoder.weight", "encoder.bias", "encoder.weight", "my_module.b"
    ]  # fmt: skip
    torch.save({"module.b": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="has one tensor under two names"):
        read_pt(tmp_path / "a.pt").unwrapped()


def test_a_missing_tensor_is_named_beside_all_that_the_file_holds(tmp_path: Path) -> None:
    weights = read_pt(put(tmp_path / "t.pt"))
    weights.take("W", 3, 4)
    with pytest.raises(UserError, match=r"has no threshold; it contains W, b, k\."):
        weights.take_number("threshold")


def read_whole(reader: Callable[[Path], Weights], path: Path) -> dict[str, list[float]] | None:
    """What a caller gets of `PLAIN`; None where one message says that it cannot be read."""
    started = time.monotonic()
    try:
        weights = reader(path)
        return {
            "W": weights.take("W", 3, 4).tolist(),
            "b": weights.take("b", 3).tolist(),
            "k": [weights.take_whole("k")],
        }
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 1000
        return None
    finally:
        assert time.monotonic() - started < 5


TRUTH = {"W": PLAIN["W"].tolist(), "b": PLAIN["b"].tolist(), "k": [3]}


@pytest.mark.parametrize("name", READERS)
@FUZZ
@given(data=st.data())
def test_damaged_bytes_are_one_message(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Archives have checksums, so what is read is right; safetensors has none, so other numbers can come out of it."""
    whole = put(tmp_path / name).read_bytes()
    (tmp_path / f"damaged-{name}").write_bytes(data.draw(mutations(whole)))
    read = read_whole(READERS[name], tmp_path / f"damaged-{name}")
    assert read in (None, TRUTH) or name == "t.safetensors"


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@FUZZ
@given(data=st.data())
def test_a_changed_description_is_one_message_or_other_tensors(
    options: Any, data: st.DataObject, tmp_path: Path
) -> None:
    torch.save(PLAIN, tmp_path / "t.pt", **options)
    whole = (tmp_path / "t.pt").read_bytes()
    if options:
        changed = data.draw(mutations(whole))
    else:
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            name = data.draw(st.sampled_from([n for n in archive.namelist() if "/data" in n or "byteorder" in n]))
            changed = rezipped(whole, {name: data.draw(mutations(archive.read(name)))})
    (tmp_path / "t.pt").write_bytes(changed)
    read_whole(read_pt, tmp_path / "t.pt")


@FUZZ
@given(data=st.data())
def test_a_changed_entry_of_an_npz_is_one_message_or_other_numbers(data: st.DataObject, tmp_path: Path) -> None:
    whole = put(tmp_path / "t.npz").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        name = data.draw(st.sampled_from(archive.namelist()))
        changed = rezipped(whole, {name: data.draw(mutations(archive.read(name)))})
    (tmp_path / "t.npz").write_bytes(changed)
    read_whole(read_npz, tmp_path / "t.npz")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=4), st.just([]),
    st.just({}), st.lists(st.integers(-3, 2**63), max_size=10),
)  # fmt: skip


@FUZZ
@given(key=st.sampled_from(["dtype", "shape", "data_offsets", "", "drop"]), value=VALUES, which=st.integers(0, 2))
def test_a_changed_header_of_safetensors_is_one_message(key: str, value: Any, which: int, tmp_path: Path) -> None:
    whole = put(tmp_path / "t.safetensors").read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    name = sorted(PLAIN)[which]
    if key == "drop":
        del header[name]
    elif key:
        header[name][key] = value
    else:
        header[name] = value
    text = json.dumps(header).encode()
    (tmp_path / "t.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + n :])
    assert read_whole(read_safetensors, tmp_path / "t.safetensors") in (None, TRUTH)


MEASURE = """
import sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from core.tensor_files import read_npz, read_pt, read_safetensors

def peak():
    status = Path("/proc/self/status").read_text()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("Vm")}

folder = Path(sys.argv[1])
half = torch.randn(2000, 4000).half()
np.savez_compressed(folder / "a.npz", W=half.numpy())
torch.save({"W": half}, folder / "a.pt")
torch.save({"W": half}, folder / "old.pt", _use_new_zipfile_serialization=False)
save_file({"W": half}, folder / "a.safetensors")
del half
for name, read in (("a.npz", read_npz), ("a.pt", read_pt), ("old.pt", read_pt), ("a.safetensors", read_safetensors)):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()["VmRSS"]
    read(folder / name).take("W", 2000, 4000)
    print(name, (peak()["VmHWM"] - before) / (folder / name).stat().st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
def test_reading_takes_less_than_ten_times_the_files_size_in_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    ratios = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert len(ratios) == 4 and all(ratio < 8 for ratio in ratios.values()), ratios
