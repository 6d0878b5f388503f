"""Sweeps from the command line: over several processes, and through the launcher of clusters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import run as runner
from hydra_plugins.fleet_launcher.launcher import PendingCell, cell_lines, run_in_processes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fixed(on_tiny_model: list[str]) -> list[str]:
    """A smoke sweep of three cells on the tiny model."""
    short = ["stream.n_tokens=1024", "stream.n_ctx=32", "evaluation.compat_tokens=512"]
    return ["experiment=leask_batchtopk", "scale=smoke", "logging=none", *on_tiny_model, *short]


def output_folders(folder: Path) -> list[str]:
    return [f"output_dir={folder}", f"artifacts_dir={folder / 'artifacts'}"]


def read(folder: Path, name: str = "results.json") -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in (folder / "leask_batchtopk").rglob(name)}


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    return {cell: record["metrics"] for cell, record in read(folder).items()}


@pytest.fixture
def sweep(fixed: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any):
    """Run the smoke sweep; returns (metrics by cell, standard error)."""

    def call(name: str, *arguments: str, code: int = 0) -> tuple[dict[str, dict[str, float]], str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *fixed, *output_folders(tmp_path / name), *arguments])
        assert runner.main() == code
        return metrics(tmp_path / name), capsys.readouterr().err

    return call


def test_cells_give_the_same_results_in_separate_processes_as_one_by_one(sweep, tmp_path):
    diverging = ["method=topk,batchtopk", "method.decoder_norm=none", "method.lr=0.001,1e30"]
    one, err = sweep("one", *diverging, code=1)
    assert "1 of 4 cells, " in err and "4 of 4 cells, 0 s left" in err
    first, _ = sweep("two", "method=topk", "method.decoder_norm=none", "method.lr=0.001")
    two, err = sweep("two", *diverging, "trainer.cell_processes=2", code=1)
    assert len(first) == 1 and len(one) == 2 and one == two
    assert "4 cells, 3 to run, 2 at a time" in err and err.count("already finished, skipped") == 1
    assert err.count("results.json") == 1 and "3 of 3 cells, 0 s left" in err
    assert "2 of 4 cells failed" in err and "Traceback" not in err
    failed = [read(tmp_path / name, "failed.json") for name in ("one", "two")]
    assert failed[0].keys() == failed[1].keys() and len(failed[0]) == 2
    assert all(a["message"] == failed[1][cell]["message"] for cell, a in failed[0].items())
    hydra = [{path.relative_to(tmp_path / n) for path in (tmp_path / n).rglob(".hydra/*")} for n in ("one", "two")]
    assert hydra[0] == hydra[1] and hydra[0]


@pytest.mark.slow
def test_an_interrupted_sweep_over_processes_keeps_finished_cells_and_can_continue_in_one_process(
    fixed, sweep, tmp_path
):
    command = [sys.executable, "run.py", *fixed, *output_folders(tmp_path / "a"), "trainer.cell_processes=2"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and " of 3 cells" not in log.read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    assert "run the same command again" in log.read_text() and "Traceback" not in log.read_text()
    kept = metrics(tmp_path / "a")
    assert 1 <= len(kept) < 3 and not read(tmp_path / "a", "failed.json")
    cells, err = sweep("a")
    assert f"3 cells, {3 - len(kept)} to run\n" in err and len(cells) == 3 and cells.items() >= kept.items()


def test_a_cell_whose_process_is_killed_gets_a_failed_json_and_the_others_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("hydra_plugins.fleet_launcher.launcher.RUN_CELL", f"{__name__}:dies_at_seed_1")
    monkeypatch.setattr("core.workers.ROOT", Path(__file__).parent)  # where this file can be imported from
    cfg = {"name": "x", "scale": "smoke", "trainer": {"accelerator": "cpu"}}
    cells = [PendingCell(OmegaConf.create({**cfg, "seed": seed}), tmp_path / str(seed)) for seed in range(3)]
    first, second, third = run_in_processes(cells, 2, lambda: None)
    assert first is None and third is None and "killed" in str(second)
    assert json.loads((tmp_path / "1/failed.json").read_text())["error"] == "WorkerDiedError"
    assert (tmp_path / "0/done").exists() and (tmp_path / "2/done").exists()


def dies_at_seed_1(cfg: DictConfig, folder: Path) -> None:
    if cfg.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    folder.mkdir()
    (folder / "done").touch()


def test_the_time_left_is_estimated_from_the_mean_so_far(monkeypatch, capsys):
    seconds = iter([0.0, 10.0, 30.0, 60.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    advance = cell_lines(3)
    for _ in range(3):
        advance()
    assert capsys.readouterr().err.splitlines() == [
        "1 of 3 cells, 20 s left", "2 of 3 cells, 15 s left", "3 of 3 cells, 0 s left"
    ]  # fmt: skip


def test_a_sweep_over_two_processes_gives_the_same_numbers_as_one_and_trains_only_what_is_missing(sweep):
    one, _ = sweep("one", "method=topk,batchtopk")
    narrowed, _ = sweep("two", "method=topk", "trainer.processes=2")
    two, err = sweep("two", "method=topk,batchtopk,jumprelu_short", "trainer.processes=2", "-m")
    assert "2 dictionaries to train" in err and "[0] " in err and "[1] " in err
    assert len(one) == 2 and len(narrowed) == 1 and len(two) == 3
    assert all(two[cell] == metrics for cell, metrics in one.items())


@pytest.mark.slow
def test_a_cell_with_two_devices_trains_on_two_ranks(sweep):
    cells, err = sweep("devices", "method=batchtopk", "trainer.devices=2")
    assert len(cells) == 1 and "[rank 0] " in err and "[rank 1] " in err


@pytest.mark.slow
def test_a_sweep_runs_through_submitit_where_each_cell_trains_for_itself(sweep):
    alone, _ = sweep("fleet", "method=batchtopk")
    jobs, _ = sweep("jobs", "method=batchtopk", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    assert len(jobs) == 1 and jobs == alone
