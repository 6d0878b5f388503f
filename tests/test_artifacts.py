import json
import multiprocessing
from pathlib import Path

import pytest

from core.artifacts import Store, content_key, write_atomically


def test_the_key_depends_on_content_and_not_on_the_order_of_keys():
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


def test_a_failed_making_leaves_nothing_behind(tmp_path: Path):
    store = Store(tmp_path)

    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.get_or_make("kind", {"a": 1}, make)
    assert not store.has("kind", {"a": 1})
    assert [p for p in (tmp_path / "kind").iterdir() if p.is_dir()] == []


def test_a_folder_without_its_manifest_is_not_an_artifact(tmp_path: Path):
    store = Store(tmp_path)
    store.path("kind", {"a": 1}).mkdir(parents=True)
    made = store.get_or_make("kind", {"a": 1}, lambda folder: (folder / "x").touch())
    assert (made / "x").exists() and store.has("kind", {"a": 1})


def _make_slowly(root: Path) -> None:
    def make(folder: Path) -> None:
        import time

        with (root / "makings").open("a") as log:
            log.write("x")
        time.sleep(0.5)

    Store(root).get_or_make("kind", {"a": 1}, make)


def test_two_processes_that_want_the_same_artifact_share_one_making(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make_slowly, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "makings").read_text() == "x"


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
