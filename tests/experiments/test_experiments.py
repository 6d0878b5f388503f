"""Every experiment runs at smoke scale as its YAML stands."""

import json
import sys

import pytest

import run as runner
from tests.composing import CONF

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

BENCHMARKS_WITHOUT = {"bench_hours", "bench_stream", "bench_stacked", "bench_stitching"}
WITHOUT_LIGHTNING = {*BENCHMARKS_WITHOUT, "oneill_classical", "oneill_theorem"}  # they fit nothing with it


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_at_smoke_scale_and_is_skipped_the_next_time(name, artifacts, tmp_path, monkeypatch, capsys):
    places = [f"output_dir={tmp_path}", f"artifacts_dir={artifacts}"]
    here = "trainer.cell_processes=1"  # the cells take less time than a process takes to start
    monkeypatch.setattr(sys, "argv", ["run.py", f"experiment={name}", "scale=smoke", here, *places])
    assert runner.main() == 0
    results = [json.loads(path.read_text()) for path in (tmp_path / name / "smoke").rglob("results.json")]
    assert results and all(result["metrics"] and result["scale"] == "smoke" for result in results)
    assert bool(list((tmp_path / "logs").rglob("events.out.tfevents.*"))) == (name not in WITHOUT_LIGHTNING)
    capsys.readouterr()
    assert runner.main() == 0
    assert capsys.readouterr().err.count("skipped") == len(results)
