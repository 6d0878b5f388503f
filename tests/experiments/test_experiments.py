"""Every experiment runs at smoke scale as its YAML stands, and emits the metrics that its claims file declares."""

import json
import re
import sys

import pytest

import run as runner
from reports.claims import load_papers
from reports.collect import read_cells
from tests.composing import CONF, composed

DECLARED = {name: rows.metrics for paper in load_papers() for name, rows in paper.experiments.items()}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

BENCHMARKS_WITHOUT = {"bench_hours", "bench_quality", "bench_stream", "bench_stacked", "bench_stitching"}
WITHOUT_LIGHTNING = {*BENCHMARKS_WITHOUT, "oneill_classical", "oneill_theorem"}  # they fit nothing with it


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_at_smoke_scale_and_is_skipped_the_next_time(name, artifacts, tmp_path, monkeypatch, capsys):
    """A smoke run is too short for the steps of the paper's `read_at`. It reads at its first logged step instead."""
    declared = DECLARED.get(name, [])
    read_at = composed(f"experiment={name}", "scale=paper").get("read_at", []) if declared else []
    first = composed(f"experiment={name}", "scale=smoke").log_every if read_at else 0
    early = [f"read_at=[{first}]"] if read_at else []
    places = [f"output_dir={tmp_path}", f"artifacts_dir={artifacts}"]
    here = "trainer.cell_processes=1"  # the cells take less time than a process takes to start
    monkeypatch.setattr(sys, "argv", ["run.py", f"experiment={name}", "scale=smoke", here, *early, *places])
    assert runner.main() == 0
    results = [json.loads(path.read_text()) for path in (tmp_path / name / "smoke").rglob("results.json")]
    assert results and all(result["metrics"] and result["scale"] == "smoke" for result in results)
    emitted = {metric for cell in read_cells(tmp_path / name) for metric in cell.metrics}
    at_smoke = {re.sub(r"_at_(\d+)$", lambda m: f"_at_{first}" if int(m[1]) in read_at else m[0], d) for d in declared}
    assert at_smoke - emitted == set()
    assert bool(list((tmp_path / "logs").rglob("events.out.tfevents.*"))) == (name not in WITHOUT_LIGHTNING)
    capsys.readouterr()
    assert runner.main() == 0
    assert capsys.readouterr().err.count("skipped") == len(results)
