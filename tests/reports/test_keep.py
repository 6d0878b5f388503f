import errno
import json
import multiprocessing
import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from core.atomic import sha256
from core.results import damage_of
from reports import compare, figures, keep
from reports.collect import one_per_folder, read_cells, with_kept

RUNS = [
    {"seed": 0, "coder.name": "SAE", "coder.l1": 0.01, "coder.k": None, "metrics.mcc": 0.5, "metrics.dead": None},
    {"seed": 1, "coder.name": "SAE", "coder.l1": 0.05, "coder.k": None, "metrics.mcc": 0.6, "metrics.dead": 2},
    {"seed": 1, "coder.name": "TopK SAE", "coder.l1": None, "coder.k": 3, "metrics.mcc": 0.7, "metrics.dead": 0},
]


def write_stack(outputs, name="coder=sae", scale="paper", commit="0123456789ab", runs=RUNS, experiment="toy"):
    """One finished cell of three runs, with a curve for each."""
    folder = outputs / experiment / scale / name
    folder.mkdir(parents=True)
    record = {
        "experiment": experiment,
        "scale": scale,
        "seed": 0,
        "commit": commit,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "started": "2026-01-01T00:00:00Z",
        "seconds": 2.0,
        "metrics": {"mcc": 0.6, "seconds": 1.5},
        "config": {"seed": 0, "coder": {"l1": None, "name": "SAE"}, "source": {"N": 16}, "l1": [0.01, 0.05]},
    }
    (folder / "results.json").write_text(json.dumps(record))
    pd.DataFrame(runs).to_parquet(folder / "runs.parquet")
    return folder


def test_every_row_of_a_stack_is_a_cell_with_its_own_seed_settings_and_metrics(tmp_path):
    folder = write_stack(tmp_path)
    first, second, third = read_cells(tmp_path)
    assert [cell.seed for cell in (first, second, third)] == [0, 1, 1]
    assert [cell.method for cell in (first, second, third)] == ["SAE", "SAE", "TopK SAE"]
    assert [cell.get("coder.l1") for cell in (first, second, third)] == [0.01, 0.05, None]
    assert first.metrics == {"seconds": 1.5, "mcc": 0.5}
    assert third.metrics == {"seconds": 1.5, "mcc": 0.7, "dead": 0.0}
    assert {cell.folder for cell in (first, second, third)} == {folder}
    assert first.get("source.N") == 16 and first.get("l1") == "[0.01, 0.05]"


def test_an_empty_entry_is_null_where_the_configuration_has_the_setting_and_unknown_elsewhere(tmp_path):
    write_stack(tmp_path)
    first, _, third = read_cells(tmp_path)
    assert third.has("coder.l1") and third.get("coder.l1") is None
    assert not first.has("coder.k") and third.get("coder.k") == 3
    assert first.has("metrics.mcc") and not first.has("metrics.dead")


def test_a_cell_without_a_coders_name_is_named_after_its_methods_class(tmp_path):
    folder = write_stack(tmp_path)
    (folder / "runs.parquet").unlink()
    record = json.loads((folder / "results.json").read_text())
    record["config"] = {"method": {"_target_": "core.methods.topk.TopK"}}
    (folder / "results.json").write_text(json.dumps(record))
    assert [(cell.method, cell.metrics) for cell in read_cells(tmp_path)] == [("TopK", {"mcc": 0.6, "seconds": 1.5})]


def report(outputs, *arguments):
    assert compare.main(["--outputs", str(outputs), *arguments]) == 0
    return (outputs / "report" / "report.md").read_text()


def test_the_report_counts_cells_not_runs_and_their_time_once(tmp_path):
    write_stack(tmp_path)
    text = report(tmp_path, "--no-kept")
    assert "| toy | paper | 1 | 0 | ? |" in text
    assert "2 s in 1 cells" in text and "runs: 3, stacked in the 1 cells" in text


def test_kept_results_stand_in_for_cells_that_are_nowhere_else(tmp_path):
    ours, kept = tmp_path / "ours", tmp_path / "kept"
    write_stack(ours, "coder=sae")
    write_stack(kept, "coder=sae", commit="aaaaaaaaaaaa")
    write_stack(kept, "coder=sc", commit="bbbbbbbbbbbb")
    found = one_per_folder(with_kept(ours, kept))
    assert [(cell.folder.name, cell.kept, cell.record["commit"]) for cell in found] == [
        ("coder=sae", False, "0123456789ab"),
        ("coder=sc", True, "bbbbbbbbbbbb"),
    ]
    text = report(ours, "--kept", str(kept))
    assert "kept results: 1 of 2 cells were read from the repository, commit bbbbbbbbbbbb" in text
    assert "kept results" not in report(ours, "--no-kept")


def test_a_cell_that_failed_is_not_covered_up_by_a_kept_result(tmp_path):
    ours, kept = tmp_path / "ours", tmp_path / "kept"
    folder = write_stack(ours, "coder=sae")
    record = json.loads((folder / "results.json").read_text()) | {"error": "NonFiniteLoss", "message": "NaN"}
    (folder / "failed.json").write_text(json.dumps(record))
    (folder / "results.json").unlink()
    write_stack(kept, "coder=sae")
    assert with_kept(ours, kept) == []


def test_without_outputs_the_report_shows_what_is_kept(tmp_path):
    write_stack(tmp_path / "kept")
    (tmp_path / "empty").mkdir()
    text = report(tmp_path / "empty", "--kept", str(tmp_path / "kept"))
    assert "kept results: 1 of 1 cells" in text


@pytest.fixture
def _one_figure(monkeypatch):
    def draw(experiment, cells, folder):
        for ending in ("png", "svg"):
            (folder / f"{experiment}_paper.{ending}").write_text(f"{len(cells)} runs")
        return [folder / f"{experiment}_paper.png", folder / f"{experiment}_paper.svg"]

    monkeypatch.setattr(figures, "draw", draw)


@pytest.mark.usefixtures("_one_figure")
def test_keeping_copies_what_the_report_reads_and_names_what_it_leaves(tmp_path, capsys):
    folder = write_stack(tmp_path / "outputs", commit="0123456789ab-dirty")
    write_stack(tmp_path / "outputs", scale="demo")
    (folder / "checkpoint.pt").write_text("large")
    stale = tmp_path / "kept" / "toy" / "paper" / "coder=sae" / "curves.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    assert keep.main(["--outputs", str(tmp_path / "outputs"), "--kept", str(tmp_path / "kept"), "toy"]) == 0
    files = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*.*"))
    cell = "toy/paper/coder=sae"
    assert files == ["README.md", f"{cell}/results.json", f"{cell}/runs.parquet", "toy/toy_paper.png"]
    assert (tmp_path / "kept" / "toy" / "toy_paper.png").read_text() == "3 runs"
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "checkpoint.pt" in err and "uncommitted changes" in err
    assert [c.metrics for c in read_cells(tmp_path / "kept")] == [c.metrics for c in read_cells(folder)]


@pytest.mark.usefixtures("_one_figure")
def test_what_is_kept_has_a_readme_with_hours_claims_and_figures_that_can_be_made_anew(tmp_path, capsys):
    kept = tmp_path / "kept"
    for name in ("coder=sae", "coder=sc"):
        write_stack(kept, name, experiment="bundled_lm")
    write_stack(kept)
    assert keep.main(["--redraw", "--kept", str(kept), "--outputs", str(tmp_path / "no")]) == 0
    lines = (kept / "README.md").read_text().splitlines()
    assert "| bundled_lm | paper | 2 of 1 | 0.00 | 0 | 0 | 0 | 0 | 0 |" in lines
    assert "| toy | paper | 1 of ? | 0.00 | 0 | 0 | 0 | 0 | 0 |" in lines
    assert "![toy paper](toy/toy_paper.png)" in lines and "- time: 3 s in 2 cells, 1.5 s in the median one " in str(
        lines
    )
    assert keep.main(["--redraw", "--kept", str(kept), "toi"]) == 1
    assert "holds nothing of toi at paper scale" in capsys.readouterr().err


def test_the_repositorys_readme_of_kept_results_is_what_they_and_the_claims_make():
    written = (keep.KEPT / keep.README).read_text()
    assert written == keep.readme(keep.KEPT), "after a change of claims or results: python -m reports.keep --redraw"


def test_a_file_larger_than_2_mb_is_refused_and_nothing_is_kept(tmp_path, capsys):
    write_stack(tmp_path / "outputs")
    folder = write_stack(tmp_path / "outputs", "coder=sc")
    (folder / "curves.parquet").write_bytes(b"x" * 2_000_001)
    assert keep.main(["--outputs", str(tmp_path / "outputs"), "--kept", str(tmp_path / "kept")]) == 1
    assert "coder=sc/curves.parquet (2.0 MB)" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def kept_and_new(tmp_path, monkeypatch):
    """Two cells that are kept, and other results of both, and of a third cell, in the outputs."""
    monkeypatch.setattr(keep, "readme", lambda kept: "as it is")
    for name in ("coder=sae", "coder=sc"):
        write_stack(tmp_path / "kept", name, runs=RUNS[:1])
    for name in ("coder=sae", "coder=sc", "coder=mlp"):
        write_stack(tmp_path / "outputs", name)
    return tmp_path


def keep_all(folder: Path) -> int:
    return keep.main(["--outputs", str(folder / "outputs"), "--kept", str(folder / "kept")])


@pytest.mark.usefixtures("_one_figure")
def test_on_a_disk_that_is_full_at_any_moment_every_kept_cell_is_whole_and_the_message_names_a_path(
    kept_and_new, capsys, monkeypatch
):
    """Every flush to the disk fails in turn."""
    fsync, moments = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for n in count():
        left = n
        code = keep_all(kept_and_new)
        if code == 0:
            break
        moments += 1
        error = capsys.readouterr().err
        assert "error: " in error and "No space left" in error and str(kept_and_new) in error, n
        for name in ("coder=sae", "coder=sc"):
            cell = kept_and_new / "kept/toy/paper" / name
            runs = len(pd.read_parquet(cell / "runs.parquet"))
            assert sorted(path.name for path in cell.iterdir()) == ["results.json", "runs.parquet"] and runs in (1, 3)
        now = tree(kept_and_new / "kept")
        assert not any("/." in f"/{path}" for path in now), "nothing unfinished is left"
    assert moments > 10
    assert len(read_cells(kept_and_new / "kept")) == 9


@pytest.mark.usefixtures("_one_figure")
@pytest.mark.parametrize("name", ["replace", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mkdir", "unlink"))])
def test_kept_results_survive_a_kill_at_any_rename_or_removal(kept_and_new, name):
    for n in range(1, 60):
        process = multiprocessing.get_context("fork").Process(target=killed_at, args=(name, n, kept_and_new))
        process.start()
        process.join(60)
        cells = read_cells(kept_and_new / "kept")
        hidden = list((kept_and_new / "kept").rglob(".kept before.*"))
        assert len({cell.folder.name for cell in cells}) + len(hidden) >= 2
        for folder in {cell.folder for cell in cells}:
            assert sorted(path.name for path in folder.iterdir()) == ["results.json", "runs.parquet"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert keep_all(kept_and_new) == 0
    assert len(read_cells(kept_and_new / "kept")) == 9
    assert not list((kept_and_new / "kept").rglob(".*"))


def killed_at(name: str, n: int, folder: Path) -> None:
    original, calls = getattr(os, name), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(os, name, counted)
    os._exit(keep_all(folder))


def test_a_cell_whose_files_are_not_as_results_json_lists_them_is_not_kept(tmp_path, capsys):
    folder = write_stack(tmp_path / "outputs")
    record = json.loads((folder / "results.json").read_text())
    record["files"] = {"runs.parquet": {"bytes": 3, "sha256": "0" * 64}}
    (folder / "results.json").write_text(json.dumps(record))
    assert keep_all(tmp_path) == 1
    assert "runs.parquet has" in capsys.readouterr().err and not (tmp_path / "kept").exists()


@pytest.mark.usefixtures("_one_figure")
def test_a_kept_cell_lists_the_files_that_are_kept_and_is_whole(tmp_path):
    folder = write_stack(tmp_path / "outputs")
    (folder / "page.html").write_text("large")
    record = json.loads((folder / "results.json").read_text())
    record["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in ("page.html", "runs.parquet")
    }
    (folder / "results.json").write_text(json.dumps(record))
    assert keep_all(tmp_path) == 0
    kept = tmp_path / "kept/toy/paper/coder=sae"
    assert list(json.loads((kept / "results.json").read_text())["files"]) == ["runs.parquet"]
    assert damage_of(kept) is None


def test_an_experiment_without_finished_cells_is_not_kept(tmp_path, capsys):
    write_stack(tmp_path / "outputs")
    assert keep.main(["--outputs", str(tmp_path / "outputs"), "--kept", str(tmp_path / "kept"), "toi"]) == 1
    assert "no finished cell of toi at paper scale" in capsys.readouterr().err
    assert keep.main(["--outputs", str(tmp_path / "no"), "--kept", str(tmp_path / "kept")]) == 1
