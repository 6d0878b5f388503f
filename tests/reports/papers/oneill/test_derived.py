import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.collect import read_cells
from reports.papers.oneill import derived
from reports.papers.oneill.curves import read_curves
from reports.papers.oneill.derived import crossing, derive

STEPS = range(0, 1100, 100)


def write_curves(outputs, name, curves, task="unknown", per_run=False, train=1e6, test=5e7, l1=0.01):
    """One cell; `curves`: seed -> the latent MCC at every step. The dictionary's MCC is 0.1 higher."""
    folder = outputs / "oneill_unknown" / "paper" / f"coder={name},task={task},source.per_run={per_run}"
    folder.mkdir(parents=True)
    config = {"task": task, "source": {"N": 16, "per_run": per_run, "zipf_alpha": None}, "coder": {"k": None}}
    record = {"experiment": "oneill_unknown", "scale": "paper", "seed": 0, "seconds": 1.0, "metrics": {}}
    (folder / "results.json").write_text(json.dumps({**record, "config": config}))
    settings = {"coder.name": name, "coder.l1": l1, "coder.k": None}
    runs = [{**settings, "seed": seed, "metrics.latent_mcc": values[-1]} for seed, values in curves.items()]
    pd.DataFrame(runs).to_parquet(folder / "runs.parquet")
    rows = [
        {
            **settings,
            "seed": seed,
            "step": step,
            "latent_mcc": value,
            "dict_mcc": value + 0.1,
            "train_flops_paper": train * step,
            "test_flops_paper": test,
            "train_flops_corrected": train * step / 2,
            "test_flops_corrected": test,
        }
        for seed, values in curves.items()
        for step, value in zip(STEPS, values, strict=True)
    ]
    pd.DataFrame(rows).to_parquet(folder / "curves.parquet")


def ramp(start, per_step):
    return [start + per_step * step for step in STEPS]


def crossings_of(outputs, method, start=""):
    """Seed -> its crossings whose names begin so, or all but those of the mean."""
    return {
        cell.seed: {
            name: value
            for name, value in cell.metrics.items()
            if "crossing" in name and name.startswith("mean_") == (start == "mean_")
        }
        for cell in derive(read_cells(outputs))
        if cell.method == method
    }


def test_a_run_passes_the_best_of_the_saes_mean_curve(tmp_path):
    """The SAE's mean is highest at step 200: 0.6. The line 0.3 + 0.001 t passes it at t = 300, training included."""
    bump = [0.4, 0.5, 0.7, *[0.5] * 8]
    write_curves(tmp_path, "SAE", {0: bump, 1: [value - 0.2 if value > 0.6 else value for value in bump]})
    write_curves(tmp_path, "SC", {0: ramp(0.3, 0.001), 1: ramp(0.3, 0.0001)})
    found = crossings_of(tmp_path, "SC")
    assert found[0] == pytest.approx(
        {
            "crossing_flops_paper": 300e6 + 5e7,
            "crossing_flops_corrected": 150e6 + 5e7,
            "dict_crossing_flops_paper": 300e6 + 5e7,
            "dict_crossing_flops_corrected": 150e6 + 5e7,
        }
    )
    assert found[1] == {}
    of_mean = crossings_of(tmp_path, "SC", "mean_")  # 0.3 + 0.00055 t passes 0.6 at t = 300 / 0.55
    assert of_mean[0] == of_mean[1] and len(of_mean[0]) == 6
    assert of_mean[1]["mean_crossing_flops_paper"] == pytest.approx(300e6 / 0.55 + 5e7)
    assert of_mean[1]["mean_dict_crossing_flops_corrected"] == pytest.approx(150e6 / 0.55 + 5e7)
    assert crossings_of(tmp_path, "SAE") == {0: {}, 1: {}}


def test_where_codes_are_known_the_plateau_is_passed_and_training_alone_counts(tmp_path):
    bump = [0.4, 0.5, 0.7, *[0.5] * 8]
    write_curves(tmp_path, "SAE", {0: bump}, task="known_codes")
    write_curves(tmp_path, "MLP32", {0: ramp(0.35, 0.001)}, task="known_codes")
    found = crossings_of(tmp_path, "MLP32")[0]
    assert found["plateau_crossing_flops"] == pytest.approx(150e6)
    assert found["plateau_crossing_flops_corrected"] == pytest.approx(75e6)


def test_a_run_that_lost_a_code_has_no_crossing_of_its_own_among_the_whole_ones(tmp_path):
    write_curves(tmp_path, "SAE", {0: [0.5] * 11}, task="known_codes")
    write_curves(tmp_path, "MLP32", {0: ramp(0.35, 0.001), 1: ramp(0.25, 0.001)}, task="known_codes")
    file = next(tmp_path.rglob("coder=MLP32*/curves.parquet"))
    curves = pd.read_parquet(file)
    curves["lost"] = (curves["seed"] == 1) / 16
    curves.to_parquet(file)
    found = crossings_of(tmp_path, "MLP32")
    assert found[0]["whole_plateau_crossing_flops"] == pytest.approx(150e6)
    assert found[1]["plateau_crossing_flops"] == pytest.approx(250e6) and "whole_plateau_crossing_flops" not in found[1]


def test_the_published_level_is_passed_where_the_mean_curve_passes_it(tmp_path, monkeypatch):
    monkeypatch.setitem(derived.PUBLISHED, "oneill_unknown", {"latent_mcc": 0.4})
    write_curves(tmp_path, "SAE", {0: [0.5] * 11})
    write_curves(tmp_path, "SC", {0: ramp(0.3, 0.001)})
    of_mean = crossings_of(tmp_path, "SC", "mean_")[0]
    assert of_mean["mean_crossing_flops_paper_at_published"] == pytest.approx(100e6 + 5e7)
    assert of_mean["mean_crossing_flops_paper"] == pytest.approx(200e6 + 5e7)


def test_methods_on_other_data_are_not_compared(tmp_path):
    write_curves(tmp_path, "SAE", {0: [0.5] * 11}, per_run=True)
    write_curves(tmp_path, "SC", {0: ramp(0.3, 0.001)})
    assert crossings_of(tmp_path, "SC") == {0: {}}


def test_curves_know_the_settings_of_their_cells(tmp_path):
    write_curves(tmp_path, "SAE", {0: [0.5] * 11}, per_run=True)
    write_curves(tmp_path, "SC", {0: ramp(0.3, 0.001)})
    table = read_curves(read_cells(tmp_path))
    assert len(table) == 22
    assert set(table[["coder.name", "source.per_run"]].itertuples(index=False, name=None)) == {
        ("SAE", True),
        ("SC", False),
    }
    assert read_curves([]).empty


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(0, 1))
def test_a_crossing_lies_where_the_curve_first_rises_above_the_level(values, level):
    at = crossing(range(len(values)), values, level)
    if at is None:
        assert values[0] > level or max(values) <= level
    else:
        assert all(value <= level for value in values[: int(at) + (at > int(at))])
        assert any(value > level for value in values[int(at) :])
