"""The page at the end of minder_crosscoder: what it shows is what the cell measured, and a browser shows it."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import run as runner
from tests.browser import browser, in_browser


@pytest.fixture
def cell(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished cell at smoke scale, of a pair of folders: the shipped models under names of a user's own."""
    folder = tmp_path / "page"
    pair = ["pair=local", "pair.base=bundled", "pair.chat=bundled_chat", "pair.site=resid_post.3"]
    places = [f"output_dir={folder}", f"artifacts_dir={artifacts}", "logging=none"]
    arguments = ["run.py", "experiment=minder_crosscoder", "scale=smoke", "hydra.mode=RUN", *pair, *places]
    monkeypatch.setattr(sys, "argv", arguments)
    assert runner.main() == 0
    (results,) = folder.rglob("results.json")
    return results.parent


def page_data(cell: Path) -> dict[str, Any]:
    return json.loads((cell / "diff.html").read_text().partition('id="data">')[2].partition("</script>")[0])


def test_the_page_counts_what_the_results_count_and_lists_latents_of_the_cell(cell: Path):
    data, record = page_data(cell), json.loads((cell / "results.json").read_text())
    metrics, table = record["metrics"], pd.read_parquet(cell / "latents.parquet")
    assert sum(data["counts"].values()) == len(data["points"]) >= len(table) - metrics["n_dead"]
    assert dict(map(tuple, data["facts"]))["variance explained, chat"] == f"{metrics['fve_chat']:.1%}"
    delta = {latent: value for latent, _, value, *_ in data["points"]}
    assert all(delta[latent] == pytest.approx(table["delta"][latent], abs=1e-5) for latent, *_ in data["latents"])
    assert len(data["latents"]) == 3 and any(contexts for *_, contexts in data["latents"])
    kl = {(name, where): value for name, where, value, *_ in data["bars"]}
    assert kl["nothing (base model)", "all tokens of answers"] > kl["every latent", "all tokens of answers"] * 0.5 > 0
    assert "diff.html" in record["files"]


@browser
def test_the_page_of_a_run_opens_without_an_error(cell: Path, tmp_path: Path):
    steps = """
    seen.errors = []; addEventListener('error', e => seen.errors.push(e.message));
    seen.heading = $('#detail h2').textContent;
    seen.listed = all('#list a').length; seen.bars = nodes('figure.kl').length;
    $('#list a').click(); await wait(); seen.latent = $('#detail h2').textContent;
    seen.contexts = all('.context').length;
    """
    seen = in_browser(cell / "diff.html", steps, tmp_path)
    assert seen["heading"] == "What differs" and seen["listed"] == 3 and seen["bars"] == 2 and not seen["errors"]
    assert seen["latent"].startswith("Latent ")
