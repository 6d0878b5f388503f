"""Whole demos, as a user starts them: they end, and the claims that they are made for show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reports.compare import main as compare
from tests.composing import ROOT

MAIN_CLAIMS = {
    "leask_batchtopk": ["leask/batchtopk-1a"],
    "oneill_theorem": ["oneill/theorem-3"],
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", MAIN_CLAIMS)
def test_a_demo_ends_and_its_main_claims_show(name: str, artifacts: Path, tmp_path: Path):
    places = [f"output_dir={tmp_path}", f"artifacts_dir={artifacts}"]
    command = [sys.executable, "run.py", f"experiment={name}", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert compare(["--outputs", str(tmp_path), "--no-kept"]) == 0
    verdicts = {
        claim["id"]: claim["scales"]["demo"]["verdict"]
        for claim in json.loads((tmp_path / "report/claims.json").read_text())
        if claim["experiment"] == name
    }
    assert all(verdicts[claim] in ("agrees", "direction agrees") for claim in MAIN_CLAIMS[name]), verdicts
    assert not any("failed" in verdict or "cannot" in verdict for verdict in verdicts.values()), verdicts
