import json

import numpy as np
import pandas as pd
import pytest

from reports import compare, figures
from reports.collect import deviations, grid_size, read_cells

CLASSES = {"TopK": "topk.TopK", "BatchTopK": "batchtopk.BatchTopK", "JumpReLU": "jumprelu.JumpReLU"}


def write_cell(outputs, method, seed=0, scale="demo", dict_size=512, nmse=1.0, l0=8.0, **settings):
    """One finished cell of leask_batchtopk, with a histogram whose tokens have an L0 of 1 (BOS), 3 and 12."""
    named = {"method": method, "dict_size": dict_size, **settings, "seed": seed}
    folder = outputs / "leask_batchtopk" / scale / ",".join(f"{key}={value}" for key, value in named.items())
    folder.mkdir(parents=True)
    metrics = dict.fromkeys(
        ["nmse_token_std_compat", "fve", "ce_recovered_zero", "kl_nats_per_token", "dead_fraction"], 0.5
    )
    spread = 0.0 if method == "TopK" else 0.6 * l0
    metrics |= {"nmse_token_std": nmse, "ce_degradation": nmse / 2, "l0_mean": l0, "l0_std": spread, "l0_bos_mean": 1.0}
    config = {
        "seed": seed,
        "model": {"name": "bundled"},
        "stream": {"site": "resid_pre.4"},
        "method": {"_target_": f"core.methods.{CLASSES[method]}", "dict_size": dict_size, **settings},
    }
    record = {
        "experiment": "leask_batchtopk",
        "scale": scale,
        "seed": seed,
        "commit": "0123456789ab",
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "started": "2026-01-01T00:00:00Z",
        "seconds": 2.0,
    }
    (folder / "results.json").write_text(json.dumps({**record, "metrics": metrics, "config": config}))
    table = {"l0": range(14), "count": np.zeros(14, int), "count_without_bos": np.zeros(14, int)}
    table["count"][[1, 3, 12]] = 5, 60, 35
    table["count_without_bos"][[3, 12]] = 60, 35
    pd.DataFrame(table).to_parquet(folder / "l0_histogram.parquet")
    return folder


def write_grid(outputs, seeds=(0, 1), gain=0.1, scale="demo"):
    for seed in seeds:
        for dict_size, k in ((256, 8), (512, 8), (512, 16)):
            nmse = 1 - 0.01 * k - dict_size / 2000 + seed / 1000
            write_cell(outputs, "TopK", seed, scale, dict_size, nmse, float(k), k=k)
            write_cell(outputs, "BatchTopK", seed, scale, dict_size, nmse * (1 - gain), float(k), k=k)
        for coefficient, l0 in ((0.01, 6.0), (0.001, 20.0)):
            write_cell(outputs, "JumpReLU", seed, scale, 512, 1 - 0.01 * l0, l0, l0_coefficient=coefficient)


def write_failure(outputs, name="method=TopK,seed=7", scale="demo"):
    folder = outputs / "leask_batchtopk" / scale / name
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "experiment": "leask_batchtopk",
        "scale": scale,
        "seed": 7,
        "error": "NonFiniteLoss",
        "message": "NaN at step 3",
    }
    (folder / "failed.json").write_text(json.dumps(record))


@pytest.fixture(autouse=True)
def _figures_only_where_a_test_looks_at_them(request, monkeypatch):
    if "figures" not in request.node.name and "page" not in request.node.name and "enough" not in request.node.name:
        monkeypatch.setattr(compare.figures, "draw", lambda *_: [])


def report_of(outputs, capsys):
    assert compare.main(["--outputs", str(outputs), "--no-kept"]) == 0
    claims = json.loads((outputs / "report" / "claims.json").read_text())
    return {claim["id"]: claim["scales"] for claim in claims}, capsys.readouterr().out


def test_a_demo_grid_gives_verdicts_tables_figures_and_their_paths(tmp_path, capsys):
    write_grid(tmp_path)
    claims, printed = report_of(tmp_path, capsys)
    assert claims["leask/batchtopk-1a"]["demo"]["verdict"] == "direction agrees"
    # 10 % in both seeds; the two differ by .001 in what they are 10 % of
    ours = claims["leask/batchtopk-1a"]["demo"]["ours"]
    assert (
        ours.startswith("mean 10.0% lower [9.9%, 10.1%]; weakest: 10.0% lower")
        and "2 of 2 hold; 2 seeds (1 draw of data, 2 of init" in ours
    )
    assert claims["leask/batchtopk-1a"]["paper"]["verdict"] == "not run"
    assert claims["leask/batchtopk-5c"]["demo"]["verdict"] == "agrees (one value)"
    assert claims["leask/batchtopk-6"]["demo"]["verdict"] == "-"
    assert printed.splitlines()[-1] == f"report: {tmp_path / 'report' / 'report.html'}"
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| leask_batchtopk | demo | 16 | 0 |" in text
    assert "| BatchTopK | bundled | resid_pre.4 | 512 | 16 |  | 2 | 1 | 2 | 0.5" in text
    assert "commit: 0123456789ab" in text and "32 s in 16 cells" in text
    for line in printed.splitlines():
        if line.startswith("figure: "):
            assert tmp_path.joinpath(line.removeprefix("figure: ")).stat().st_size > 10_000


def test_the_page_needs_no_other_file(tmp_path, capsys):
    write_grid(tmp_path, seeds=(0,))
    report_of(tmp_path, capsys)
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('src="data:image/') == page.count("<img ") == 2
    assert "http:" not in page and "https:" not in page


def test_a_reversed_result_disagrees_in_the_report(tmp_path, capsys):
    write_grid(tmp_path, gain=-0.1)
    claims, _ = report_of(tmp_path, capsys)
    for claim in ("1a", "1b", "2a", "2b", "5a"):
        assert claims[f"leask/batchtopk-{claim}"]["demo"]["verdict"] == "disagrees"


def test_failures_are_counted_named_and_left_out_of_every_number(tmp_path, capsys):
    write_grid(tmp_path)
    before, _ = report_of(tmp_path, capsys)
    write_failure(tmp_path)
    after, _ = report_of(tmp_path, capsys)
    for claim, scales in before.items():
        assert after[claim]["demo"]["ours"] == scales["demo"]["ours"]
    assert after["leask/batchtopk-1a"]["demo"]["verdict"] == "direction agrees; failed cells: 1"
    assert "NaN at step 3" in (tmp_path / "report" / "report.md").read_text()


def test_a_cell_that_failed_after_it_had_finished_keeps_its_results_and_is_named(tmp_path, capsys):
    write_grid(tmp_path)
    write_failure(tmp_path, name=write_cell(tmp_path, "TopK", 7, nmse=0.5, k=64).name)
    claims, _ = report_of(tmp_path, capsys)
    assert "failed cells" not in claims["leask/batchtopk-1a"]["demo"]["verdict"]
    assert "latest run failed" in (tmp_path / "report" / "report.md").read_text()


def test_only_failures_are_a_report_too(tmp_path, capsys):
    write_failure(tmp_path)
    claims, printed = report_of(tmp_path, capsys)
    assert claims["leask/batchtopk-1a"]["demo"]["verdict"] == "failed cells: 1"
    assert "figure:" not in printed


@pytest.mark.parametrize(("method", "settings"), [("JumpReLU", {"l0_coefficient": 0.01}), ("BatchTopK", {"k": 8})])
def test_one_finished_cell_is_enough_for_a_report(tmp_path, capsys, method, settings):
    write_cell(tmp_path, method, **settings)
    claims, printed = report_of(tmp_path, capsys)
    assert claims["leask/batchtopk-1a"]["demo"]["verdict"] == "not run"
    assert "_curves.png" in printed


def test_smoke_results_are_never_reported(tmp_path, capsys):
    write_grid(tmp_path, scale="smoke")
    assert compare.main(["--outputs", str(tmp_path), "--no-kept"]) == 1
    assert "only smoke results" in capsys.readouterr().err
    write_grid(tmp_path, seeds=(0,))
    claims, _ = report_of(tmp_path, capsys)
    assert claims["leask/batchtopk-1a"]["demo"]["n_seeds"] == 1


def test_without_results_the_message_says_what_to_do(tmp_path, capsys):
    assert compare.main(["--outputs", str(tmp_path), "--no-kept"]) == 1
    assert "no results. Run `make demo`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_demo_and_paper_results_do_not_mix(tmp_path, capsys):
    write_grid(tmp_path, gain=0.1)
    write_grid(tmp_path, gain=-0.1, scale="paper")
    claims, _ = report_of(tmp_path, capsys)
    assert claims["leask/batchtopk-5a"]["demo"]["verdict"] == "direction agrees"
    assert claims["leask/batchtopk-5a"]["paper"]["verdict"] == "disagrees"
    assert claims["leask/batchtopk-1a"]["paper"]["verdict"] == "not run"  # it is about GPT-2 small


def test_an_experiment_that_no_paper_claims_anything_about_has_a_table_of_its_metrics(tmp_path, capsys):
    folder = write_cell(tmp_path, "TopK", k=8)
    record = json.loads((folder / "results.json").read_text()) | {
        "experiment": "bundled_lm",
        "metrics": {"bits_per_byte": 1.5},
    }
    (folder / "results.json").write_text(json.dumps(record))
    report_of(tmp_path, capsys)
    assert "| bits_per_byte | 1.5 |" in (tmp_path / "report" / "report.md").read_text()


def test_figures_are_png_and_svg_and_the_same_from_the_same_cells(tmp_path):
    write_grid(tmp_path)
    cells = read_cells(tmp_path)
    assert cells[0].metrics["l0_lowest"] == 1 and cells[0].metrics["l0_highest"] == 12
    first, second = (figures.draw("leask_batchtopk", cells, tmp_path / name) for name in "ab")
    assert [path.name for path in first] == [
        f"leask_batchtopk_demo_bundled_resid_pre.4_{kind}.{ending}"
        for kind in ("curves", "l0_histogram")
        for ending in ("png", "svg")
    ]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    assert figures.draw("an_experiment_without_figures", cells, tmp_path) == []


def test_the_grid_counts_the_cells_of_the_union_of_its_blocks(tmp_path):
    (tmp_path / "experiment").mkdir()
    blocks = 'grid: {demo: [{method: "topk,batchtopk", seed: "0,1"}, {method: topk, seed: "1,2"}, {k: "range(1,4)"}]}'
    (tmp_path / "experiment" / "toy.yaml").write_text(blocks)
    assert grid_size("toy", "demo", tmp_path) == 4 + 1 + 3
    assert grid_size("toy", "paper", tmp_path) == 1
    assert grid_size("no_such", "demo", tmp_path) is None
    assert grid_size("leask_batchtopk", "paper") == 24


def test_deviations_are_read_from_the_experiments_comments(tmp_path):
    (tmp_path / "experiment").mkdir()
    comments = (
        "# @package _global_\n# deviations: one thing\n#   that goes on.\n# deviations: another.\n# other\nname: toy\n"
    )
    (tmp_path / "experiment" / "toy.yaml").write_text(comments)
    assert deviations("toy", tmp_path) == ["one thing that goes on.", "another."]
    assert deviations("no_such", tmp_path) == []
