"""Known codes from a data set that is never dense as a whole, at reduced size."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

from core import preflight
from core.bench import threads
from core.errors import UserError
from core.metrics.recovery import unmatched_correlations
from core.results import RESULTS, run_cell
from core.stacked.coders import LinearCoder
from experiments.oneill import large_scale as large
from reports import figures
from reports.collect import read_cells
from tests.composing import composed


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def configured(folder: Path, *overrides: str) -> DictConfig:
    arguments = ["experiment=oneill_large_scale", "scale=smoke", "logging=none", f"cell_folder='{folder}'"]
    return composed(*arguments, f"output_dir='{folder}'", *overrides)


LONGER = ["steps=600", "log_every=200", "read_at=[200]", "lr=0.01"]


def test_an_encoder_learns_codes_that_the_oracle_finds_and_a_narrow_one_does_not(tmp_path: Path):
    sae = large.run(configured(tmp_path / "sae", *LONGER))
    narrow = large.run(configured(tmp_path / "mlp", "coder=mlp", "coder.width=3", *LONGER))
    fista = large.run(configured(tmp_path / "fista", "coder=fista"))
    assert narrow["latent_mcc"] + 0.1 < sae["latent_mcc"] < fista["latent_mcc"]
    assert fista["latent_mcc"] > 0.98 and fista["l0"] == pytest.approx(3 / 40, rel=0.4)
    assert 0 < sae["latent_mcc_at_200"] < sae["latent_mcc"] and 0 < sae["peak_extra_gb"] < 0.2
    curves = pd.read_parquet(tmp_path / "sae/curves.parquet")
    assert sorted(curves["step"].unique()) == [0, 200, 400, 600] and set(curves["seed"]) == {0, 1}
    per_sample = {"corrected": 6 * 12 * 40, "paper": 6 * 12 * 40}  # both leading terms: 3 products of 2 M N
    for mode, least in per_sample.items():
        flops = curves.set_index("step")[f"train_flops_{mode}"][200].iloc[0] / (200 * 128)
        assert 0.6 * least < flops < 2 * least


def test_scores_over_chunks_are_those_of_the_whole_test_set(tmp_path: Path):
    cfg = configured(tmp_path)
    coder, test = LinearCoder([0, 1], 12, 40, bias=True), large.samples(cfg, "test")
    with torch.no_grad():
        found = large.scores(coder, test, cfg)
        active = test.active(slice(None))
        X, S = test.observed(*active), test.dense(*active)
        S_hat = coder(X.expand(2, -1, -1))
    assert torch.allclose(found["latent_mcc"], unmatched_correlations(S.expand(2, -1, -1), S_hat).mean(-1), atol=1e-9)
    assert torch.allclose(found["l0"], (S_hat > large.ACTIVE).float().mean((1, 2)))


def test_a_stack_of_two_seeds_is_each_of_them_alone(tmp_path: Path):
    both = large.encoders(configured(tmp_path / "both"))
    alone = large.encoders(configured(tmp_path / "alone", "seeds=[1]"))
    assert both.curves["SAE"][60]["latent_mcc"][1] == pytest.approx(float(alone.curves["SAE"][60]["latent_mcc"][0]))


def test_the_figure_has_the_curves_of_finished_cells_and_the_oracle(tmp_path: Path):
    for name, overrides in {"sae": [], "fista": ["coder=fista"], "mlp": ["coder=mlp", "coder.width=8"]}.items():
        folder = tmp_path / "oneill_large_scale/smoke" / name
        run_cell(configured(folder, *overrides), folder, large.run)
        assert math.isfinite(json.loads((folder / RESULTS).read_text())["metrics"]["latent_mcc"])
    cells = read_cells(tmp_path)
    assert {cell.method for cell in cells} == {"SAE", "FISTA", "MLP8"} and len(cells) == 5
    written = figures.draw("oneill_large_scale", cells, tmp_path)
    assert [path.suffix for path in written] == [".png", ".svg"] and all(path.stat().st_size > 0 for path in written)
    assert figures.draw("oneill_large_scale", [cell for cell in cells if cell.method == "FISTA"], tmp_path) == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("source.per_run=true", r"source\.per_run"),
        ("objective=mse", "objective"),
        ("coder=l0_oracle", "oracle"),
        ("coder=sc", r"coder\.kind: 'sc' must be one of sae, mlp, solver"),
        ("coder.k=[3]", r"coder\.k"),
        ("coder.l1=[0.1,0.2]", r"coder\.l1"),
        ("batch_size=3000", "batch_size"),
        ("n_oracle=301", "n_oracle"),
        ("source.K=41", r"source\.K"),
    ],
)
def test_a_wrong_setting_is_named_before_data_are_drawn(tmp_path: Path, override: str, named: str):
    with pytest.raises(UserError, match=named):
        preflight.check([configured(tmp_path, override)])
