"""Whatever one file holds, it is left out and named, and all other cells are read as they are."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from core.atomic import _entry
from core.errors import UserError
from reports.collect import HISTOGRAM, Cell, found, read_cells, read_failures, with_kept
from reports.culprits import on_the_rest, ordinary_first
from reports.left_out import Omission, described, note, nothing_left_out, noting
from reports.matching import order
from reports.side_files import listing
from tests.reports.trees import CONTENTS, batchtopk, stacks


def read(outputs: Path) -> tuple[list[Cell], list[Omission]]:
    with noting() as omissions:
        return read_cells(outputs), omissions


def numbers(cells: list[Cell], but: Path | None = None) -> dict[Path, dict[str, float]]:
    return {cell.folder: dict(cell.metrics) for cell in cells if cell.folder != but}


def changed(folder: Path, **changes: Any) -> None:
    """Keys of results.json with other values; `...` removes one."""
    path = folder / "results.json"
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


RECORDS: list[tuple[dict[str, Any], str]] = [
    ({"experiment": ...}, "has no experiment"),
    ({"experiment": 3}, "experiment is 3, not a text"),
    ({"experiment": ["leask_batchtopk"]}, "experiment is a list, not a text"),
    ({"experiment": "../../etc"}, "experiment is '../../etc', not a name"),
    ({"experiment": "x" * 300}, "experiment is a text, not a name"),
    ({"experiment": "*"}, "experiment is '*', not a name"),
    ({"scale": None}, "scale is null, not a text"),
    ({"scale": "huge"}, "scale is 'huge', not one of demo, paper, smoke"),
    ({"seed": 1.5}, "seed is 1.5, not a whole number"),
    ({"seed": "0"}, "seed is '0', not a whole number"),
    ({"seed": True}, "seed is true, not a whole number"),
    ({"seed": None}, "seed is null"),
    ({"seconds": "long"}, "seconds is 'long', not a finite number"),
    ({"seconds": float("nan")}, "seconds is nan, not a finite number"),
    ({"metrics": [1.0]}, "metrics is a list, not an object"),
    ({"metrics": ...}, "has no metrics"),
    ({"config": "k: 8"}, "config is 'k: 8', not an object"),
    ({"commit": 7}, "commit is 7, not a text"),
    ({"device": {"a": 1}}, "device is an object with keys, not a text"),
    ({"versions": ["torch"]}, "versions is a list, not an object"),
]


@pytest.mark.parametrize(("changes", "message"), RECORDS, ids=[str(changes)[:40] for changes, _ in RECORDS])
def test_a_record_of_other_kinds_of_values_is_left_out(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folders = batchtopk(tmp_path)
    before = numbers(read_cells(tmp_path), folders[3])
    changed(folders[3], **changes)
    cells, omissions = read(tmp_path)
    assert numbers(cells) == before
    [omission] = omissions
    assert omission.what == str(folders[3]) and message in omission.why and "results.json" in omission.why
    assert capsys.readouterr().err == f"left out: {omission.what}: {omission.why}\n"


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("name", ["results.json", "runs.parquet"])
def test_a_foreign_file_is_left_out(name: str, content: bytes, tmp_path: Path):
    folders = stacks(tmp_path)
    before = read_cells(tmp_path)
    (folders[1] / name).write_bytes(content)
    cells, [omission] = read(tmp_path)
    assert [(c.folder, c.seed, c.metrics) for c in cells] == [
        (c.folder, c.seed, c.metrics) for c in before if c.folder != folders[1]
    ]
    assert omission.what == str(folders[1]) and name in omission.why


DEEP = json.loads('{"a":' * 60 + "1" + "}" * 60)


def test_settings_may_be_nested_but_not_without_end(tmp_path: Path):
    folders = batchtopk(tmp_path)
    changed(folders[0], config=DEEP)
    changed(folders[1], config={"a": {"b": [1, [2, {"c": 3}]]}, "d": None})
    cells, [omission] = read(tmp_path)
    assert cells[0].settings == {"a.b": "[1, [2, {'c': 3}]]", "d": None}
    assert "nested deeper than 50 levels" in omission.why


def test_circumstances_that_were_not_recorded_are_called_so(tmp_path: Path):
    folders = batchtopk(tmp_path)
    changed(folders[0], commit=..., device=None, versions=...)
    cells, omissions = read(tmp_path)
    assert not omissions and cells[0].record["commit"] == cells[0].record["device"] == "not recorded"
    assert cells[0].record["versions"] == {}


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf"), ("0.5", "'0.5'"), (None, "null"),
        (True, "true"), ([0.5], "a list"), ({"mean": 0.5}, "an object with keys"), (10**400, "a whole number"),
    ],
)  # fmt: skip
def test_a_metric_that_is_no_number_is_left_out_alone(value: Any, named: str, tmp_path: Path):
    folders = batchtopk(tmp_path)
    before = {cell.folder: dict(cell.metrics) for cell in read_cells(tmp_path)}
    metrics = {"nmse_token_std": 0.25, "l0_mean": value}
    changed(folders[2], metrics=metrics)
    cells, [omission] = read(tmp_path)
    after = numbers(cells)
    assert after.pop(folders[2]) == {"nmse_token_std": 0.25, "l0_lowest": 1.0, "l0_highest": 12.0}
    before.pop(folders[2])
    assert after == before
    assert omission == (f"the metric l0_mean of {folders[2]}", f"it is {named}, not a finite number")


def test_files_that_are_too_large_for_a_report_are_left_out_unread(tmp_path: Path):
    folders = batchtopk(tmp_path)
    changed(folders[0], metrics={f"m{i}": None for i in range(3000)} | {"fve": 0.5})
    changed(folders[1], note="x" * 17_000_000)
    changed(folders[2], files={f"{i}.parquet": 1 for i in range(1001)})
    (folders[3] / "table.json").write_text(json.dumps({"rows": [{}] * 2001, "notes": []}))
    started = time.process_time()
    with noting() as omissions:
        cells = read_cells(tmp_path)
        assert listing(next(cell for cell in cells if cell.folder == folders[3])) is None
    assert time.process_time() - started < 5 and len(cells) == 14
    named = {omission.what: omission.why for omission in omissions}
    assert len(named) == 4 and "such as m0" in named[f"3,000 metrics of {folders[0]}"]
    assert "results.json has 17,0" in named[str(folders[1])] and "lists 1,001 files" in named[str(folders[2])]
    assert "table.json has 2,001 rows" in named[str(folders[3] / "table.json")]


def test_large_numbers_are_numbers_and_small_ones_stay_what_they_are(tmp_path: Path):
    folders = batchtopk(tmp_path)
    changed(folders[0], metrics={"a": 10**30, "b": 5, "c": 1e308, "d": 5e-324})
    cells, omissions = read(tmp_path)
    first = next(cell for cell in cells if cell.folder == folders[0])
    assert not omissions and first.metrics["a"] == 1e30 and first.metrics["c"] == 1e308 and first.metrics["d"] == 5e-324
    assert type(first.metrics["a"]) is float and type(first.metrics["b"]) is int


RUNS: list[tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = [
    (lambda runs: runs.iloc[:0], "has 0 rows"),
    (lambda runs: runs.assign(seed=[0.5, 1.0]), "seed is 0.5, not a whole number"),
    (lambda runs: runs.assign(seed=["a", "b"]), "seed is 'a', not a whole number"),
    (lambda runs: runs.assign(seed=[[0], [1]]), "seed is "),
    (lambda runs: pd.concat([runs] * 10_001), "has 20,002 rows"),
]


@pytest.mark.parametrize(("change", "message"), RUNS)
def test_runs_that_are_no_runs_leave_the_cell_out(
    change: Callable[[pd.DataFrame], pd.DataFrame], message: str, tmp_path: Path
):
    folders = stacks(tmp_path)
    path = folders[2] / "runs.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    cells, [omission] = read(tmp_path)
    assert {cell.folder for cell in cells} == set(folders) - {folders[2]}
    assert omission.what == str(folders[2]) and message in omission.why


def test_metrics_of_runs_that_are_no_numbers_are_left_out_alone(tmp_path: Path):
    folders = stacks(tmp_path)
    path = folders[2] / "runs.parquet"
    runs = pd.read_parquet(path).assign(**{"metrics.text": ["a", None], "metrics.wide": [math.inf, math.nan]})
    runs.assign(when=pd.Timestamp("2026-01-01")).to_parquet(path)
    cells, omissions = read(tmp_path)
    first, second = (cell for cell in cells if cell.folder == folders[2])
    assert sorted(first.metrics) == sorted(second.metrics) == [
        "dict_mcc", "dict_mcc_chance", "latent_mcc", "latent_mcc_chance"
    ]  # fmt: skip
    assert first.get("when") == "2026-01-01 00:00:00"
    assert {omission.what.split(" of ")[0] for omission in omissions} == {"the metric text", "the metric wide"}


def test_a_stacked_cell_without_its_runs_is_not_taken_for_one_run(tmp_path: Path):
    folders = stacks(tmp_path)
    (folders[0] / "runs.parquet").unlink()
    cells, [omission] = read(tmp_path)
    assert {cell.folder for cell in cells} == set(folders[1:])
    assert "runs.parquet is missing. The cell's own metrics are means over its 2 seeds." in omission.why


def listed(folder: Path, **changes: Any) -> None:
    """Let results.json list the files beside it, as a run does."""
    files = [path for path in folder.iterdir() if path.name != "results.json"]
    changed(folder, files={path.name: _entry(path) for path in files} | changes)


def test_a_table_that_is_not_the_one_that_the_run_wrote_is_not_shown(tmp_path: Path):
    folders = batchtopk(tmp_path)
    for folder in folders[:3]:
        listed(folder)
    pd.DataFrame({"l0": [1, 2], "count": [1, 1], "count_without_bos": [1, 1]}).to_parquet(
        folders[0] / "l0_histogram.parquet"
    )
    (folders[1] / "l0_histogram.parquet").unlink()
    cells, omissions = read(tmp_path)
    shown = [cell.folder for cell in cells if HISTOGRAM.has(cell)]
    assert shown == [folder for folder in sorted(folders) if folder not in folders[:2]]
    assert ["l0_highest" in cell.metrics for cell in cells if cell.folder in folders[:3]] == [False, False, True]
    assert {omission.what: omission.why.partition(" bytes")[0] for omission in omissions} == {
        str(folders[0] / "l0_histogram.parquet"): omissions[0].why.partition(" bytes")[0],
        str(folders[1] / "l0_histogram.parquet"): "l0_histogram.parquet is missing",
    }


@pytest.mark.parametrize("gone", [True, False])
def test_runs_that_are_not_those_that_were_written_leave_the_cell_out(gone: bool, tmp_path: Path):
    folders = stacks(tmp_path)
    listed(folders[0])
    path = folders[0] / "runs.parquet"
    if gone:
        path.unlink()
    else:
        pd.read_parquet(path).assign(**{"metrics.latent_mcc": 0.99}).to_parquet(path)
    cells, [omission] = read(tmp_path)
    assert {cell.folder for cell in cells} == set(folders[1:])
    assert "runs.parquet is missing" in omission.why if gone else "runs.parquet has " in omission.why


@pytest.mark.parametrize("entry", [None, 3, {}, {"bytes": "many", "sha256": 1}, {"bytes": 1e400, "sha256": ""}, []])
def test_a_list_of_files_that_is_none_is_an_error_of_the_file(entry: Any, tmp_path: Path):
    folders = batchtopk(tmp_path)
    listed(folders[0], **{"a.parquet": entry})
    cells, [omission] = read(tmp_path)
    assert len(cells) == 15 and "the list of files cannot be read" in omission.why


def test_what_is_no_file_is_left_out(tmp_path: Path):
    folders = batchtopk(tmp_path)
    before = numbers(read_cells(tmp_path))
    places = {name: tmp_path / "leask_batchtopk" / "demo" / name for name in ("folder", "loop", "dangling", "pipe")}
    for place in places.values():
        place.mkdir()
    (places["folder"] / "results.json").mkdir()
    (places["loop"] / "results.json").symlink_to("results.json")
    (places["dangling"] / "results.json").symlink_to("nowhere.json")
    os.mkfifo(places["pipe"] / "results.json")
    (folders[0] / "l0_histogram.parquet").unlink()
    (folders[0] / "l0_histogram.parquet").symlink_to("l0_histogram.parquet")
    before[folders[0]] = {name: value for name, value in before[folders[0]].items() if not name.startswith("l0_l")}
    cells, omissions = read(tmp_path)
    del before[folders[0]]["l0_highest"]
    assert numbers(cells) == before
    assert {omission.what for omission in omissions} == {
        str(folders[0] / "l0_histogram.parquet"), *map(str, places.values())
    }  # fmt: skip


def test_links_are_followed_once_and_never_upwards(tmp_path: Path):
    outputs, elsewhere = tmp_path / "outputs", tmp_path / "disk"
    batchtopk(elsewhere)
    outputs.mkdir()
    (outputs / "linked").symlink_to(elsewhere)
    (outputs / "again").symlink_to(elsewhere)
    (elsewhere / "leask_batchtopk" / "up").symlink_to(outputs)
    (outputs / "root").symlink_to("/")
    cells, omissions = read(outputs)
    assert len(cells) == 16 and {cell.folder.relative_to(outputs).parts[0] for cell in cells} == {"again"}
    assert {omission.what for omission in omissions} == {
        str(outputs / "root"), str(outputs / "again" / "leask_batchtopk" / "up")
    }  # fmt: skip


def test_what_may_not_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = batchtopk(tmp_path)
    closed, scandir, read_bytes = folders[5].parent.parent / "closed", os.scandir, Path.read_bytes
    closed.mkdir()

    def scan(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def refused(path: Path) -> bytes:
        if path == folders[5] / "results.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(Path, "read_bytes", refused)
    cells, omissions = read(tmp_path)
    assert {cell.folder for cell in cells} == set(folders) - {folders[5]}
    assert {omission.what: omission.why for omission in omissions} == {
        str(closed): "Permission denied",
        str(folders[5]): f"{folders[5] / 'results.json'} cannot be read: Permission denied.",
    }


def test_results_are_found_in_the_order_of_their_paths(tmp_path: Path):
    folders = batchtopk(tmp_path)
    assert found(tmp_path, "results.json") == sorted(folder / "results.json" for folder in folders)
    assert found(tmp_path / "nowhere", "results.json") == []


FAILED = {"experiment": "leask_batchtopk", "scale": "demo", "error": "NonFiniteLoss", "message": "NaN at step 3"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "has no experiment"),
        (b"[]", "not an object with keys"),
        (b"[" * 100_000, "not JSON that can be read"),
        (json.dumps({**FAILED, "message": None}).encode(), "message is null"),
        (json.dumps({**FAILED, "error": 3}).encode(), "error is 3"),
        (json.dumps({**FAILED, "scale": []}).encode(), "scale is a list"),
    ],
)
def test_a_damaged_failure_is_left_out_and_the_others_count(content: bytes, message: str, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "failed.json").write_text(json.dumps(FAILED))
    (tmp_path / "a" / "failed.json").write_bytes(content)
    with noting() as omissions:
        [failure] = read_failures(tmp_path)
    assert failure.message == "NaN at step 3" and failure.folder == tmp_path / "b"
    assert omissions[0].what == str(tmp_path / "a" / "failed.json") and message in omissions[0].why


def test_a_failure_beside_damaged_results_is_not_called_a_later_one(tmp_path: Path):
    folders = batchtopk(tmp_path)
    for folder in folders[:2]:
        (folder / "failed.json").write_text(json.dumps(FAILED))
    (folders[0] / "results.json").write_text("{}")
    cells, _ = read(tmp_path)
    assert [failure.later_than_results for failure in read_failures(tmp_path, cells)] == [False, True]


def test_a_cell_that_is_damaged_in_the_outputs_is_taken_from_what_is_kept(tmp_path: Path):
    folders = batchtopk(tmp_path / "outputs")
    shutil.copytree(tmp_path / "outputs", tmp_path / "kept")
    (folders[0] / "results.json").write_text("{}")
    cells = with_kept(tmp_path / "outputs", tmp_path / "kept")
    assert [cell.folder.name for cell in cells if cell.kept] == [folders[0].name] and len(cells) == 16


def cells_with(values: list[Any]) -> list[Cell]:
    return [Cell("toy", "demo", 0, Path(f"cell{i}"), {"mse": 0.5}, {"k": value}, {}) for i, value in enumerate(values)]


def total(cells: Any) -> float:
    return sum(cell.get("k") for cell in cells) * 1.0


@pytest.mark.parametrize("values", [["a", 1, 2, 3, 4], [1, 2, "a", 3, 4], [1, 2, 3, 4, None], [[], 1, 2, 3, 4]])
def test_the_cell_with_which_something_cannot_be_done_is_found_wherever_it_stands(values: list[Any]):
    """The sum of 1 to 4, whichever cell holds something else than a number."""
    cells = cells_with(values)
    with noting() as omissions:
        made, left = on_the_rest(total, cells, "the sum")
    odd = next(i for i, value in enumerate(values) if not isinstance(value, int))
    assert made == 10.0 and [cell.folder.name for cell in left] == [f"cell{i}" for i in range(5) if i != odd]
    assert [omission.what for omission in omissions] == [f"cell{odd}, in the sum"]
    assert omissions[0].why.startswith("TypeError: unsupported operand")


def test_a_few_odd_cells_are_left_out_and_with_more_of_them_everything():
    with noting() as omissions:
        assert on_the_rest(total, cells_with([1, "a", 2, "b", 3, None, 4, 5]), "the sum")[0] == 15.0
    assert len(omissions) == 3
    with noting() as omissions:
        assert on_the_rest(total, cells_with(["a", "b", "c", "d", "e"]), "the sum") == (None, [])
    assert [omission.what for omission in omissions] == ["the sum"]


def test_what_raises_with_every_cell_is_left_out_as_a_whole():
    def fails(cells: Any) -> float:
        raise ZeroDivisionError("never")

    with noting() as omissions:
        assert on_the_rest(fails, cells_with([1, 2]), "the quotient") == (None, [])
    assert omissions == [("the quotient", "ZeroDivisionError: never")]


def test_ordinary_cells_come_before_odd_ones():
    assert [folder.name for folder in ordinary_first(cells_with(["a", 1, 0, 2, 3.5]))] == [
        "cell1", "cell3", "cell4", "cell0", "cell2"
    ]  # fmt: skip


def test_each_omission_is_named_once_on_one_line(capsys: pytest.CaptureFixture[str]):
    with noting() as omissions:
        for _ in range(3):
            note("a\nb", "c\x1b[31m")
    assert omissions == [("a b", "c\ufffd[31m")] and capsys.readouterr().err == "left out: a b: c\ufffd[31m\n"


def test_an_error_says_where_in_the_report_it_was_raised():
    with pytest.raises(TypeError) as error:
        order(None)  # type: ignore[arg-type]
    assert re.fullmatch(r"TypeError: .*, reports/matching\.py:\d+", described(error.value))
    assert described(UserError("a.json: no")) == "a.json: no"


def test_pages_that_are_written_whole_are_refused_with_the_names_of_what_they_would_lack():
    with pytest.raises(UserError, match=r"would lack a \(b\); c \(d\); e \(f\), and 1 more"), nothing_left_out():
        for what, why in ("ab", "cd", "ef", "gh"):
            note(what, why)
    with nothing_left_out():
        pass
