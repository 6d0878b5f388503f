import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core import artifacts
from core.artifacts import MANIFEST, Store, content_key, damage
from core.atomic import sha256, write_atomically
from core.interrupts import Interrupted


def test_the_key_depends_on_the_content_and_not_on_the_order_of_keys():
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


@pytest.mark.parametrize("error", [OSError("No space left on device"), Interrupted(signal.SIGTERM)])
def test_a_make_that_fails_or_is_interrupted_leaves_nothing_behind(tmp_path: Path, error: BaseException):
    store = Store(tmp_path)

    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.get_or_make("kind", {"a": 1}, make)
    assert not store.has("kind", {"a": 1})
    assert [p for p in (tmp_path / "kind").iterdir() if p.is_dir()] == []


def test_a_folder_without_its_manifest_is_not_an_artifact(tmp_path: Path):
    store = Store(tmp_path)
    store.path("kind", {"a": 1}).mkdir(parents=True)
    folder = store.get_or_make("kind", {"a": 1}, lambda folder: (folder / "x").touch())
    assert (folder / "x").exists() and store.has("kind", {"a": 1})


def _make_slowly(root: Path) -> None:
    def make(folder: Path) -> None:
        import time

        with (root / "calls").open("a") as log:
            log.write("x")
        time.sleep(0.5)

    Store(root).get_or_make("kind", {"a": 1}, make)


def test_two_processes_that_want_the_same_artifact_make_it_once(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make_slowly, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "results.json"
    write_atomically(path, json.dumps({"old": 1}))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.artifacts.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, json.dumps({"new": 2}))
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


SPEC = {"a": 1}


def make(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part/x.bin").write_bytes(b"0123456789" * 100)
    (folder / "y.txt").write_text("y")


def test_the_manifest_has_the_size_and_the_hash_of_every_file(tmp_path: Path):
    folder = Store(tmp_path).put("kind", SPEC, make)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert files == {
        "part/x.bin": {"bytes": 1000, "sha256": sha256(folder / "part/x.bin")},
        "y.txt": {"bytes": 1, "sha256": "a1fce4363854ff888cff4b8e7875d600c2682390412a8cf79b37d0b11148b0fa"},
    }
    assert damage(folder) is None


def truncate(folder: Path) -> None:
    os.truncate(folder / "part/x.bin", 500)


def alter(folder: Path) -> None:
    (folder / "part/x.bin").write_bytes(b"0123456780" * 100)


def remove(folder: Path) -> None:
    (folder / "y.txt").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 50)


def drop_hashes(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"kind": "kind", "spec": SPEC}))


def swap(folder: Path) -> None:
    other = Store(folder.parents[1]).put("kind", {"a": 2}, make)
    shutil.rmtree(folder)
    other.rename(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "part/x.bin has 500 bytes instead of 1,000"),
        (alter, "part/x.bin has changed since it was written"),
        (remove, "y.txt is missing"),
        (cut_manifest, "cannot be read, or has no hashes"),
        (drop_hashes, "cannot be read, or has no hashes"),
        (swap, "belongs to another artifact"),
    ],
)
def test_a_damaged_artifact_is_reported_set_aside_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], message: str
):
    store = Store(tmp_path)
    folder = store.get_or_make("kind", SPEC, make)
    assert store.has("kind", SPEC)
    for n in (1, 2):
        harm(folder)
        assert not store.has("kind", SPEC) and not store.has("kind", SPEC)
        assert store.get_or_make("kind", SPEC, make) == folder
        assert store.has("kind", SPEC) and (folder / "part/x.bin").read_bytes() == b"0123456789" * 100
        assert (tmp_path / f"kind/{folder.name}.damaged-{n}").is_dir()
        err = capsys.readouterr().err
        assert err.count(message) == 1 and f"{folder.name}.damaged-{n}" in err


def test_a_process_checks_an_artifact_once_unless_its_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, calls = Store(tmp_path), []
    folder = store.put("kind", SPEC, make)
    monkeypatch.setattr(artifacts, "damage", lambda path, name: calls.append(path))
    assert all(store.has("kind", SPEC) for _ in range(3)) and calls == [folder]
    os.utime(folder / "y.txt", ns=(0, 0))
    assert store.has("kind", SPEC) and len(calls) == 2


def test_an_artifact_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced, replace, fsync = [], Path.replace, os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def check(path: Path, target: Path) -> Path:
        if path.is_dir():
            assert {"x.bin", "y.txt", "part", path.name} <= set(synced)
            synced.clear()
        return replace(path, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to map a descriptor to its path")
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", check)
    Store(tmp_path).put("kind", SPEC, make)
    assert synced == ["kind"]


def _hold(root: Path, seconds: float) -> None:
    def make_slowly(folder: Path) -> None:
        (folder / "half").write_text("half")
        (root / "begun").touch()
        time.sleep(seconds)

    Store(root).get_or_make("kind", SPEC, make_slowly)


def _started_holder(root: Path, seconds: float) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(root, seconds))
    process.start()
    deadline = time.monotonic() + 60
    while not (root / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_the_lock_of_a_killed_process_is_free_at_once_and_its_unfinished_folder_is_removed(tmp_path: Path):
    process = _started_holder(tmp_path, 60)
    assert len(list((tmp_path / "kind").glob(".*"))) == 1
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    Store(tmp_path).get_or_make("kind", SPEC, make)
    assert time.monotonic() - started < artifacts.PATIENCE_SECONDS
    key = content_key(SPEC)
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == [key, f"{key}.lock"]


def test_a_process_that_waits_for_a_lock_reports_who_holds_it(tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.setattr(artifacts, "PATIENCE_SECONDS", 0.1)
    process = _started_holder(tmp_path, 1)
    Store(tmp_path).get_or_make("kind", SPEC, make)
    assert f"waiting for process {process.pid} on " in capsys.readouterr().err
    assert (Store(tmp_path).path("kind", SPEC) / "half").exists()
    process.join()
