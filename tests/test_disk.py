"""The command line on disks that are read-only, full or not there, in little memory, with folders that cannot be."""

import builtins
import errno
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import run as runner
from core.artifacts import Store
from core.atomic import atomically, files_atomically, write_atomically, write_table
from core.errors import UserError, lack_of_memory
from core.methods.pretrained import Pretrained
from core.methods.saved import save_dictionary
from hydra_plugins.fleet_launcher.launcher import refuse_shared_folders

ROOT = Path(__file__).parents[1]
SINGLE = ["experiment=oneill_theorem", "scale=smoke", "logging=none", "module=tests.trivial"]
SWEEP = [*SINGLE, "hydra.sweeper.blocks=[{}]", "seed=0,1", "-m"]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run the command line in this process; returns (exit code, standard error)."""

    def call(*arguments: str) -> tuple[int, str]:
        places = [f"output_dir={tmp_path / 'disk/outputs'}", f"artifacts_dir={tmp_path / 'disk/artifacts'}"]
        given = [argument.partition("=")[0] for argument in arguments]
        places = [place for place in places if place.partition("=")[0] not in given]
        monkeypatch.setattr(sys, "argv", ["run.py", *places, *arguments])
        code = runner.main()
        return code, capfd.readouterr().err

    return call


@pytest.fixture
def make_read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder one that refuses every write, as a disk that is mounted read-only does (root may write anywhere
    else)."""

    def make(folder: Path) -> None:
        def refuse_below(path: Any) -> None:
            if isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(folder):
                raise OSError(errno.EROFS, "Read-only file system", str(path))

        def guard(owner: Any, name: str, writes: Callable[..., bool] = lambda *_, **__: True) -> None:
            original = getattr(owner, name)

            def guarded(path: Any, *arguments: Any, **named: Any) -> Any:
                if writes(*arguments, **named):
                    refuse_below(path)
                return original(path, *arguments, **named)

            monkeypatch.setattr(owner, name, guarded)

        def opens_to_write(mode: str = "r", *_: Any, **__: Any) -> bool:
            return not set(mode) <= set("rbtU")

        guard(io, "open", opens_to_write)
        guard(builtins, "open", opens_to_write)
        guard(os, "open", lambda flags, *_, **__: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "chmod", "utime", "truncate", "link", "symlink"):
            guard(os, name)
        mkdir = os.mkdir

        def guarded_mkdir(path: Any, *arguments: Any, **named: Any) -> None:
            if not Path(path).exists():  # else it is "File exists", there too
                refuse_below(path)
            mkdir(path, *arguments, **named)

        monkeypatch.setattr(os, "mkdir", guarded_mkdir)

    return make


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("arguments", [SINGLE, SWEEP], ids=["one cell", "sweep"])
def test_a_rerun_with_nothing_to_do_writes_nothing_that_matters_and_works_on_a_read_only_disk(
    cli, tmp_path, make_read_only, arguments
):
    assert cli(*arguments)[0] == 0
    before = tree(tmp_path / "disk")
    make_read_only(tmp_path / "disk")
    code, err = cli(*arguments)
    assert code == 0 and "already finished, skipped" in err and "Traceback" not in err
    assert tree(tmp_path / "disk") == before
    code, err = cli("seed=7", *(argument for argument in arguments if argument != "seed=0,1"))
    assert code == 1 and "Read-only file system" in err and str(tmp_path / "disk") in err and "Traceback" not in err


def test_a_finished_cell_needs_no_lock(cli, tmp_path, monkeypatch):
    assert cli(*SINGLE)[0] == 0

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("core.artifacts.FileLock", refuse)
    assert cli(*SINGLE)[0] == 0


def test_a_store_without_locks_is_named_with_a_way_out(tmp_path, monkeypatch):
    class Refusing:
        def __init__(self, *_: object, **__: object) -> None: ...

        def acquire(self, **_: object) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("core.artifacts.FileLock", Refusing)
    with pytest.raises(UserError, match=r"artifacts_dir: .*cannot be locked .Function not implemented.*flock"):
        Store(tmp_path).get_or_make("kind", {"a": 1}, lambda folder: None)


@pytest.mark.parametrize("mode", ["hydra.mode=RUN", "hydra.mode=MULTIRUN"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("output_dir=", "output_dir='' names no folder"),
        ("output_dir=''", "output_dir='' names no folder"),
        ("output_dir=null", "output_dir=None names no folder"),
        ("artifacts_dir=''", "artifacts_dir='' names no folder"),
        ("artifacts_dir=null", "artifacts_dir=None names no folder"),
        ("artifacts_dir='  '", "names no folder"),
        ("output_dir={file}", "is a file, not a folder"),
        ("output_dir={file}/below/it", "is a file, not a folder"),
        ("artifacts_dir={file}", "is a file, not a folder"),
        ("name=../elsewhere", "name='../elsewhere': an experiment's name is a folder's name"),
    ],
)
def test_a_folder_that_cannot_be_ends_with_a_message_before_anything_is_made(cli, tmp_path, mode, setting, words):
    (tmp_path / "file").write_text("a file")
    code, err = cli(*SWEEP[:-2], mode, setting.format(file=tmp_path / "file"))
    assert code == 1 and words in err and err.count("error: ") == 1 and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_cells_of_a_sweep_that_have_one_folder_are_refused_and_named(cli, tmp_path):
    code, err = cli(*SWEEP[:-2], "seed=0", "trainer.processes=1,2", "-m")
    assert code == 1 and "trainer.processes=1" in err and "trainer.processes=2" in err and "have one folder" in err
    code, err = cli("hydra.sweep.subdir=same", *SWEEP)
    assert code == 1 and "the one with seed=0, and the one with seed=1" in err and "/same:" in err
    assert not list((tmp_path / "disk").rglob("results.json"))


def test_names_that_a_disk_takes_for_the_same_are_refused_there_alone(tmp_path, monkeypatch):
    folders, cells = [tmp_path / "a=X", tmp_path / "a=x"], [["a=X"], ["a=x"]]
    refuse_shared_folders(folders, cells)
    monkeypatch.setattr("hydra_plugins.fleet_launcher.launcher.ignores_case", lambda folder: True)
    with pytest.raises(UserError, match="a=X, and the one with a=x"):
        refuse_shared_folders(folders, cells)


# ---- a disk that is full


@pytest.fixture
def full_after() -> Iterator[Callable[[int], None]]:
    """Lets no file of this process grow beyond a number of bytes: the write fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def big_table(path: Path) -> None:
    import pandas as pd

    write_table(pd.DataFrame({"x": torch.rand(20_000).numpy()}), path)


def big_dictionary(path: Path) -> None:
    W = torch.rand(200, 100)
    options: dict[str, Any] = {"activation": "relu", "subtract_b_dec": True}
    save_dictionary(Pretrained.of(W, W, torch.zeros(200), torch.zeros(100), **options), {}, path.parent)


def big_folder(path: Path) -> None:
    with files_atomically(path.parent) as scratch:
        (scratch / path.name).write_bytes(b"x" * 50_000)


def big_artifact(path: Path) -> None:
    Store(path.parent).get_or_make("kind", {"a": 1}, lambda folder: write_atomically(folder / "big", b"x" * 50_000))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path: write_atomically(path, "x" * 50_000), "big.json"),
        (big_table, "big.parquet"),
        (big_dictionary, "weights.safetensors"),
        (big_artifact, "big"),
        (big_folder, "big.bin"),
    ],
)
def test_a_write_that_the_disk_refuses_names_its_file_and_leaves_the_old_one(tmp_path, full_after, write, name):
    if write is not big_artifact:
        (tmp_path / name).write_text("old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    full_after(10_000)
    with pytest.raises(OSError) as error:
        write(tmp_path / name)
    assert error.value.errno in (errno.EFBIG, errno.ENOSPC) and name in str(error.value)
    assert str(tmp_path) in str(error.value)
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert left == before


def test_a_cell_whose_files_do_not_fit_on_the_disk_ends_with_one_message(cli, tmp_path, full_after):
    full_after(2_000)
    code, err = cli(*SINGLE)
    assert code == 1 and "Traceback" not in err and err.count("error: ") == 1
    assert f"{tmp_path / 'disk/outputs'}" in err and ("too large" in err.lower() or "No space" in err)
    assert not list((tmp_path / "disk").rglob("results.json"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("Error writing bytes to file. Detail: [errno 28] No space left"), "No space left"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/elsewhere"), "/elsewhere"),
        (ValueError("of another kind"), "of another kind"),
    ],
)
def test_however_a_library_words_it_an_error_of_a_write_names_the_file(tmp_path, error, says):
    with pytest.raises(Exception, match=says) as raised, atomically(tmp_path / "results.json"):
        raise error
    is_of_the_disk = not isinstance(error, ValueError | PermissionError)
    assert (str(tmp_path / "results.json") in str(raised.value)) == is_of_the_disk
    assert isinstance(raised.value, OSError) == (not isinstance(error, ValueError))
    assert list(tmp_path.iterdir()) == []


# ---- modes


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_and_tables_have_the_modes_of_the_umask_in_the_store_and_outside(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        Store(tmp_path).get_or_make("kind", {"a": 1}, lambda folder: big_dictionary(folder / "x"))
        big_dictionary(tmp_path / "outside/x")
        big_table(tmp_path / "tables/one.parquet")
        big_folder(tmp_path / "exported/one.bin")
    finally:
        os.umask(before)
    files = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) >= 6 and set(files.values()) == {mode}, files
    folders = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()}
    assert folders == {0o777 & ~umask}


# ---- what killed processes leave in the store


def test_the_next_run_removes_what_killed_ones_left_under_any_key_unless_they_are_alive(tmp_path):
    store = Store(tmp_path)
    names = (f".{'a' * 16}.01234567", f".{'b' * 16}.01234567", ".x")
    left, alive, not_ours = (tmp_path / "kind" / name for name in names)
    for folder in (left, alive, not_ours):
        folder.mkdir(parents=True)
    from filelock import FileLock

    with FileLock(alive.with_name(f"{'b' * 16}.lock")):
        store.remove_leftovers()
    assert not left.exists() and alive.exists() and not_ours.exists()
    store.remove_leftovers()
    assert not alive.exists()


# ---- little memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8.00 TiB for an array"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes."),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_a_lack_of_memory_is_one_message_however_a_library_words_it(error: Exception):
    message = lack_of_memory(error)
    assert message is not None and "not enough memory" in str(message) and "\n" not in str(message)
    try:
        try:
            raise error
        except Exception as cause:
            raise ValueError("could not be built") from cause
    except ValueError as outer:
        assert lack_of_memory(outer) is not None
    assert lack_of_memory(ValueError("of another kind")) is None
    assert lack_of_memory(UserError("trainer.processes: out of memory of ours")) is None


@pytest.mark.parametrize("megabytes", [150, 300, 700, 1100])
def test_a_memory_limit_ends_a_run_in_one_message(tmp_path: Path, megabytes: int):
    places = [f"output_dir={tmp_path}", f"artifacts_dir={tmp_path / 'artifacts'}"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    done = subprocess.run(
        [sys.executable, "run.py", *SINGLE, *places],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("error: There is not enough memory") == 1, done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.rglob("results.json"))


def test_a_cell_that_runs_out_of_memory_leaves_failed_json_and_one_message(cli, tmp_path, monkeypatch):
    def too_much(cfg: object) -> None:
        raise MemoryError("Unable to allocate 8.00 TiB for an array")

    monkeypatch.setattr("tests.trivial.run", too_much)
    code, err = cli(*SWEEP)
    assert code == 1 and err.count("not enough memory") == 2 and "Traceback" not in err
    records = [json.loads(path.read_text()) for path in (tmp_path / "disk").rglob("failed.json")]
    assert [record["error"] for record in records] == ["UserError", "UserError"]
