import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from core import results
from core.atomic import atomically, note_outside, write_atomically, write_table
from core.errors import UserError


def config(**changes: object) -> DictConfig:
    return OmegaConf.create({"name": "test", "scale": "smoke", "seed": 0, "force": False, "x": "${seed}", **changes})


def test_a_finished_cell_is_recognised_by_its_configuration(tmp_path: Path):
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    assert results.is_finished(tmp_path, config())
    assert results.is_finished(tmp_path, config(force=True))
    assert not results.is_finished(tmp_path, config(seed=1))


def test_a_table_of_scales_in_older_results_decides_nothing(tmp_path: Path):
    table = {"paper": 1, "demo": 2, "smoke": 3}
    results.run_cell(config(all_steps=table), tmp_path, lambda cfg: {"a": 1.0})
    assert results.is_finished(tmp_path, config())
    results.run_cell(config(other={**table, "x": 4}), tmp_path, lambda cfg: {"a": 1.0})
    assert not results.is_finished(tmp_path, config())


def test_the_number_of_devices_can_change_a_result_and_the_number_of_processes_cannot(tmp_path: Path):
    results.run_cell(config(trainer={"processes": "auto", "devices": 1}), tmp_path, lambda cfg: {"a": 1.0})
    assert results.is_finished(tmp_path, config(trainer={"processes": 4, "devices": 1}))
    assert not results.is_finished(tmp_path, config(trainer={"processes": "auto", "devices": 2}))


def test_a_result_records_where_it_comes_from(tmp_path: Path):
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    record = json.loads((tmp_path / results.RESULTS).read_text())
    assert record["metrics"] == {"a": 1.0}
    assert record["config"]["x"] == 0
    assert {"commit", "device", "versions", "seconds", "seed", "started"} <= record.keys()


def test_a_failure_writes_its_error_and_no_result(tmp_path: Path):
    def run(cfg: DictConfig) -> dict[str, float]:
        raise UserError("method.k=9 is too large")

    with pytest.raises(UserError):
        results.run_cell(config(), tmp_path, run)
    record = json.loads((tmp_path / results.FAILED).read_text())
    assert record["error"] == "UserError" and record["message"] == "method.k=9 is too large"
    assert not (tmp_path / results.RESULTS).exists()


def test_a_success_removes_the_record_of_an_earlier_failure(tmp_path: Path):
    (tmp_path / results.FAILED).write_text("{}")
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    assert not (tmp_path / results.FAILED).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5"])
def test_a_metric_that_is_not_a_finite_number_fails_the_cell(tmp_path: Path, value: float):
    with pytest.raises(RuntimeError, match="metric a "):
        results.run_cell(config(), tmp_path, lambda cfg: {"a": value})
    assert not (tmp_path / results.RESULTS).exists()


def test_a_cell_with_a_truncated_results_file_is_not_finished(tmp_path: Path):
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    whole = (tmp_path / results.RESULTS).read_text()
    (tmp_path / results.RESULTS).write_text(whole[: len(whole) // 2])
    assert not results.is_finished(tmp_path, config())
    assert list(results.read_all(tmp_path)) == []


def test_on_a_full_disk_the_cells_own_error_is_still_raised(tmp_path: Path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def run(cfg: DictConfig) -> dict[str, float]:
        raise UserError("method.k=9 is too large")

    monkeypatch.setattr(results, "write_atomically", full)
    with pytest.raises(UserError, match=r"method\.k=9"):
        results.run_cell(config(), tmp_path, run)
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- the files beside results.json


def with_files(folder: Path, value: int) -> Callable[[DictConfig], dict[str, float]]:
    """A cell that writes a table, a page and a file in a folder of its own, all of one value."""

    def run(cfg: DictConfig) -> dict[str, float]:
        write_table(pd.DataFrame({"value": [value]}), folder / "table.parquet")
        write_atomically(folder / "page.html", f"<p>{value}</p>")
        write_atomically(folder / "export/weights.bin", bytes([value]))
        return {"value": float(value)}

    return run


def content(folder: Path) -> set[int]:
    """The values in a cell's files and in its metrics."""
    table = pd.read_parquet(folder / "table.parquet")["value"][0]
    page = (folder / "page.html").read_text()[3:-4]
    metric = json.loads((folder / results.RESULTS).read_text())["metrics"]["value"]
    return {int(table), int(page), (folder / "export/weights.bin").read_bytes()[0], int(metric)}


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def put_back_later(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))


HARM: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "altered": (damaged, "has changed since it was written"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b" "), "bytes instead of"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is missing"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "is missing"),
    "of another date": (put_back_later, None),
}


@pytest.mark.parametrize("name", ["table.parquet", "page.html", "export/weights.bin"])
@pytest.mark.parametrize("harm", HARM)
def test_a_cell_whose_file_is_not_as_it_was_written_runs_again_and_says_which(tmp_path, capsys, name, harm):
    results.run_cell(config(), tmp_path, with_files(tmp_path, 1))
    assert results.is_finished(tmp_path, config())
    do, message = HARM[harm]
    do(tmp_path / name)
    assert results.is_finished(tmp_path, config()) == (message is None)
    err = capsys.readouterr().err
    assert err == "" if message is None else (name in err and message in err and "will be run again" in err)


def test_a_file_that_an_earlier_run_listed_is_gone_after_one_that_does_not_write_it(tmp_path: Path):
    results.run_cell(config(), tmp_path, with_files(tmp_path, 1))
    (tmp_path / "notes.txt").write_text("a person's own")
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["notes.txt", results.RESULTS]


def test_results_that_list_no_files_are_taken_as_they_are(tmp_path: Path):
    results.run_cell(config(), tmp_path, with_files(tmp_path, 1))
    record = json.loads((tmp_path / results.RESULTS).read_text())
    del record["files"]
    (tmp_path / results.RESULTS).write_text(json.dumps(record))
    damaged(tmp_path / "page.html")
    assert results.is_finished(tmp_path, config())


def test_files_exported_to_a_place_of_the_users_count_too_and_are_not_removed(tmp_path: Path):
    def export(cfg: DictConfig) -> dict[str, float]:
        write_atomically(tmp_path / "mine/cfg.json", "{}")
        note_outside([tmp_path / "mine/cfg.json"])
        return {"a": 1.0}

    results.run_cell(config(), tmp_path / "cell", export)
    assert results.is_finished(tmp_path / "cell", config())
    damaged(tmp_path / "mine/cfg.json")
    assert not results.is_finished(tmp_path / "cell", config())
    results.take_back(tmp_path / "cell")
    assert (tmp_path / "mine/cfg.json").exists()


def test_a_results_json_that_lists_files_elsewhere_removes_none_of_them(tmp_path: Path):
    (tmp_path / "cell").mkdir()
    (tmp_path / "mine").touch()
    (tmp_path / "cell/link").symlink_to(tmp_path)
    names = ["../mine", str(tmp_path / "mine"), "link/mine", "..", ".", "", "\0", "/"]
    (tmp_path / "cell" / results.RESULTS).write_text(json.dumps({"files": dict.fromkeys(names)}))
    results.take_back(tmp_path / "cell")
    assert (tmp_path / "mine").exists() and not (tmp_path / "cell" / results.RESULTS).exists()


def test_results_json_is_taken_back_before_a_cell_runs_again(tmp_path: Path):
    results.run_cell(config(), tmp_path, with_files(tmp_path, 1))

    def run(cfg: DictConfig) -> dict[str, float]:
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        raise UserError("it fails")

    with pytest.raises(UserError, match="it fails"):
        results.run_cell(config(force=True), tmp_path, run)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [results.FAILED]


SLOW_CALLS = [pytest.param(call, marks=pytest.mark.slow) for call in ("open", "close", "stat")]


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink", *SLOW_CALLS])
def test_a_cell_killed_at_any_call_to_the_disk_is_finished_and_whole_or_runs_again(tmp_path: Path, call: str):
    folder, kills = tmp_path / "cell", 0
    for n in range(1, 400):
        results.run_cell(config(), folder, with_files(folder, 1))
        process = multiprocessing.get_context("fork").Process(target=killed_at, args=(call, n, folder))
        process.start()
        process.join(30)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if results.is_finished(folder, config()):
            assert content(folder) in ({1}, {2}), n
        results.run_cell(config(), folder, with_files(folder, 3))
        assert results.is_finished(folder, config()) and content(folder) == {3}
        assert not list(folder.rglob(".*")), "nothing unfinished is left"
    assert content(folder) == {2} and kills > 3


def killed_at(call: str, n: int, folder: Path) -> None:
    original, calls = getattr(os, call), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(call)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(os, call, counted)
    results.run_cell(config(force=True), folder, with_files(folder, 2))
    os._exit(0)


def test_a_file_that_another_run_of_the_cell_has_replaced_meanwhile_makes_the_cell_run_again(tmp_path: Path):
    def run(cfg: DictConfig) -> dict[str, float]:
        metrics = with_files(tmp_path, 1)(cfg)
        pd.DataFrame({"value": [2]}).to_parquet(tmp_path / "table.parquet")  # by another process
        return metrics

    results.run_cell(config(), tmp_path, run)
    assert not results.is_finished(tmp_path, config())


def test_what_a_killed_run_left_unfinished_is_removed_by_the_next_one_unless_its_process_is_alive(tmp_path: Path):
    (tmp_path / "export").mkdir()
    for name in (".page.html.0123abcd", "export/.weights.bin.zzzz____"):
        (tmp_path / name).write_text("half of a file")
    (tmp_path / ".files.01234567/in").mkdir(parents=True)
    not_ours = [".hidden", ".gitignore", ".a.short", ".page.html.TOOLOUD1"]
    for name in not_ours:
        (tmp_path / name).write_text("not ours")
    with atomically(tmp_path / "alive.html") as unfinished:
        results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
        assert unfinished.exists()
        unfinished.write_text("whole")
    names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(names) == sorted([*not_ours, "alive.html", results.RESULTS])
    assert not (tmp_path / ".files.01234567").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_modes_of_files_follow_the_umask(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        results.run_cell(config(), tmp_path / "cell", with_files(tmp_path / "cell", 1))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "cell").rglob("*") if path.is_file()]
    assert len(files) == 4 and {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_a_clock_that_is_set_back_gives_no_negative_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = iter(range(2_000_000_000, 0, -1_000_000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    assert 0 <= json.loads((tmp_path / results.RESULTS).read_text())["seconds"] < 60


# ---- what does not decide a cell's numbers


@pytest.mark.parametrize("place", ["artifacts", "./artifacts/", "/elsewhere/artifacts", "../wt/artifacts"])
def test_another_spelling_of_the_folder_of_the_store_does_not_run_a_cell_again(tmp_path: Path, place: str):
    def at(artifacts_dir: str) -> DictConfig:
        data = {"artifacts_dir": "${artifacts_dir}", "source": {"artifacts_dir": "${artifacts_dir}"}, "size": 1}
        cache = {"dir": "${artifacts_dir}/activations"}
        return config(artifacts_dir=artifacts_dir, output_dir=artifacts_dir, data=data, cache=cache)

    results.run_cell(at("artifacts"), tmp_path, lambda cfg: {"a": 1.0})
    assert results.is_finished(tmp_path, at(place))
    record = json.loads((tmp_path / results.RESULTS).read_text())
    record["config"]["data"]["artifacts_dir"] = "artifacts"  # as in results of before
    (tmp_path / results.RESULTS).write_text(json.dumps(record))
    assert results.is_finished(tmp_path, at(place))
    assert not results.is_finished(tmp_path, config(data={"size": 2}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("\0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    results.run_cell(config(), folder, with_files(folder, 1))
    return folder


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.sampled_from(["files", "inputs", "config", "metrics", "files.table.parquet", "files.x", "inputs.x"]), JSON)
def test_a_results_json_of_any_content_is_finished_or_not_and_can_be_taken_back(finished: Path, key: str, value: Any):
    whole = (finished / results.RESULTS).read_text()
    record = json.loads(whole)
    outer, _, inner = key.partition(".")
    record[outer] = {**record.get(outer, {}), inner: value} if inner else value
    text = json.dumps(record)
    try:
        (finished / results.RESULTS).write_text(text)
        assert not results.is_finished(finished, config()) or key in ("metrics", "inputs", "inputs.x", "files")
    finally:
        (finished / results.RESULTS).write_text(whole)
    alone = finished / "alone"
    alone.mkdir(exist_ok=True)
    (alone / results.RESULTS).write_text(text)
    results.take_back(alone)
    assert not list(alone.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1" * 5000, "[" * 99_999, '{"config": ' * 999, "\ud800", "\0"])
def test_a_results_json_that_is_none_is_not_finished(tmp_path: Path, text: str):
    (tmp_path / results.RESULTS).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert not results.is_finished(tmp_path, config())
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    assert results.is_finished(tmp_path, config())
