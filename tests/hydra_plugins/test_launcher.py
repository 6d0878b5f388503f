"""Sweeps from the command line: over several processes, and through the launcher of clusters."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import run as runner


@pytest.fixture
def sweep(tmp_path: Path, tiny_model: dict[str, Any], words: Any, monkeypatch: Any, capsys: Any):
    """Run a smoke sweep on the tiny model; returns (metrics by cell, standard error)."""
    text = tmp_path / "words.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in words.texts))
    fixed = [
        "experiment=leask_batchtopk", "scale=smoke", "logging=none", "stream.n_tokens=1024", "data=local",
        f"data.path={text}", "model=local", "stream.site=resid_pre.1", "stream.n_ctx=32",
        "evaluation.compat_tokens=512",
        *[f"model.{key}={'null' if value is None else value}" for key, value in tiny_model.items()],
    ]  # fmt: skip

    def call(name: str, *arguments: str) -> tuple[dict[str, dict[str, float]], str]:
        places = [f"output_dir={tmp_path / name}", f"artifacts_dir={tmp_path / name / 'artifacts'}"]
        monkeypatch.setattr(sys, "argv", ["run.py", *fixed, *places, *arguments])
        assert runner.main() == 0
        found = (tmp_path / name / "leask_batchtopk").rglob("results.json")
        return {path.parent.name: json.loads(path.read_text())["metrics"] for path in found}, capsys.readouterr().err

    return call


@pytest.mark.slow
def test_a_sweep_over_two_processes_gives_the_numbers_of_one_and_trains_only_what_is_missing(sweep):
    one, _ = sweep("one", "method=topk,batchtopk")
    narrowed, _ = sweep("two", "method=topk", "trainer.processes=2")
    two, err = sweep("two", "method=topk,batchtopk,jumprelu_short", "trainer.processes=2", "-m")
    assert "2 dictionaries to train" in err and "[0] " in err and "[1] " in err
    assert len(one) == 2 and len(narrowed) == 1 and len(two) == 3
    assert all(two[cell] == metrics for cell, metrics in one.items())


@pytest.mark.slow
def test_a_cell_over_two_devices_trains_on_two_ranks(sweep):
    cells, err = sweep("devices", "method=batchtopk", "trainer.devices=2")
    assert len(cells) == 1 and "[rank 0] " in err and "[rank 1] " in err


@pytest.mark.slow
def test_a_sweep_runs_through_submitit_where_each_cell_trains_for_itself(sweep):
    alone, _ = sweep("fleet", "method=batchtopk")
    jobs, _ = sweep("jobs", "method=batchtopk", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    assert len(jobs) == 1 and jobs == alone
