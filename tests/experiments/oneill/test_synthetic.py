"""The synthetic problems of O'Neill et al.: what a cell leaves behind, and the paper's directions at reduced size."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, open_dict

from core import preflight
from core.errors import UserError
from core.metrics import flops
from experiments.oneill.common import Stack, recovered
from experiments.oneill.outcome import CURVES, RUNS
from tests.composing import composed


def configured(name: str, tmp_path: Path, *overrides: str) -> DictConfig:
    cfg = composed(f"experiment=oneill_{name}", "scale=smoke", "logging=none", f"output_dir={tmp_path}", *overrides)
    with open_dict(cfg):
        cfg.cell_folder = str(tmp_path / "cell")
    return cfg


def run(name: str, tmp_path: Path, *overrides: str) -> tuple[dict[str, float], pd.DataFrame, pd.DataFrame]:
    cfg = configured(name, tmp_path, *overrides)
    metrics = import_module(f"experiments.oneill.{name}").run(cfg)
    folder = Path(cfg.cell_folder)
    return metrics, pd.read_parquet(folder / RUNS), pd.read_parquet(folder / CURVES)


def final(table: pd.DataFrame, label: str, metric: str) -> pd.Series:
    return table.loc[table["coder.name"] == label, f"metrics.{metric}"]


# ---- stacks


def test_codes_that_no_unit_represents_differ_from_those_represented_badly():
    scores = recovered(torch.tensor([[0.9, 0.7, 0.49, -0.1], [1.0, 0.5, 0.8, 0.9], [0.1, 0.2, 0.0, -1.0]]))
    assert scores["lost"].tolist() == pytest.approx([0.5, 0, 1])
    assert scores["latent_mcc_of_found"].tolist() == pytest.approx([0.8, 0.8, 0])
    assert scores["latent_mcc"].tolist() == pytest.approx([1.99 / 4, 0.8, -0.175])


def test_a_stack_has_one_run_for_each_seed_and_penalty_on_the_same_data(tmp_path: Path):
    stack = Stack.of(configured("unknown", tmp_path, "seeds=[3,4]", "coder.l1=[0.1,0.2,0.3]"))
    assert [(row["seed"], row["coder.l1"]) for row in stack.rows] == [(s, x) for s in (3, 4) for x in (0.1, 0.2, 0.3)]
    assert stack.problem.X_train.shape == (6, 1024, 8) and stack.problem.D.shape == (6, 16, 8)
    assert (stack.problem.X_train == stack.problem.X_train[0]).all() and stack.k is None


def test_data_per_run_differ_between_seeds_and_are_shared_between_penalties(tmp_path: Path):
    stack = Stack.of(configured("unknown", tmp_path, "seeds=[3,4]", "coder.l1=[0.1,0.2]", "source.per_run=true"))
    X, D = stack.problem.X_train, stack.problem.D
    assert torch.equal(X[0], X[1]) and not torch.equal(X[0], X[2]) and not torch.equal(D[1], D[3])
    alone = Stack.of(configured("unknown", tmp_path, "seeds=[4]", "coder.l1=[0.2]", "source.per_run=true"))
    assert torch.equal(alone.problem.X_test[0], stack.problem.X_test[3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.K=17"], r"source\.K"),
        (["coder.k=[3,17]"], r"coder\.k: \[3, 17\] must be at most 16"),
        (["coder=sc"], r"coder\.kind: 'sc' must be one of sae, mlp, solver for task=known_dictionary"),
        (["coder.N=12"], r"coder\.N: 12 must be null"),
        (["coder=fista", "coder.k=[2]"], r"coder\.k"),
        (["coder=mlp", "coder.width=null"], r"coder\.width"),
        (["coder=l0_oracle", "source.N=200", "source.K=8"], "supports"),
        (["coder=ito", "coder.solver.kind=sgd"], "sgd"),
    ],
)
def test_impossible_settings_are_refused_by_name(overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        preflight.check([configured("known_dictionary", tmp_path, *overrides)])


# ---- what a cell leaves behind


def test_a_cell_reports_every_run_and_the_codes_optimised_further(tmp_path: Path):
    metrics, runs, curves = run("unknown", tmp_path, "coder.l1=[0.01,0.1]", "steps=60", "log_every=30")
    assert sorted(zip(runs["coder.name"], runs["seed"], runs["coder.l1"], strict=True)) == sorted(
        (label, seed, l1) for label in ("SAE", "SAE+ITO") for seed in (0, 1) for l1 in (0.01, 0.1)
    )
    assert sorted(set(curves["step"])) == [0, 30, 60]
    last = curves[(curves["step"] == 60) & (curves["coder.name"] == "SAE")]
    assert (last["train_flops_paper"] == 60 * flops.sae_train_step(16, 8, 1024, True, "paper")).all()
    assert (last["test_flops_paper"] == flops.sae_inference(16, 8, 1024)).all()
    of_one = runs[(runs["coder.name"] == "SAE") & (runs["coder.l1"] == 0.1)]
    assert metrics["sae_dict_mcc_l1_0.1"] == pytest.approx(of_one["metrics.dict_mcc"].mean())
    chance = runs["metrics.dict_mcc_chance"]
    assert runs["metrics.dict_mcc_corrected"].equals((runs["metrics.dict_mcc"] - chance) / (1 - chance))


def test_a_run_in_a_cell_is_the_one_in_a_cell_of_its_own(tmp_path: Path):
    together = run("unknown", tmp_path / "a", "seeds=[0,1]", "coder.l1=[0.01,0.1]")[1]
    alone = run("unknown", tmp_path / "b", "seeds=[1]", "coder.l1=[0.1]")[1]
    same = together[(together["seed"] == 1) & (together["coder.l1"] == 0.1)].reset_index(drop=True)
    numbers = [name for name in alone if name.startswith("metrics.") and "support" not in name]
    pd.testing.assert_frame_equal(same[numbers], alone[numbers], rtol=1e-3, atol=1e-5)


def test_truncated_codes_are_rows_of_their_own(tmp_path: Path):
    _, runs, _ = run("sparsity", tmp_path, "coder=sc", "truncate_to=[1,3]", "coder.l1=[0.01]")
    cut = runs[runs["coder.name"] == "SC truncated"]
    assert sorted(cut["coder.k"]) == [1, 1, 3, 3]
    assert (cut["metrics.l0"] <= cut["coder.k"] / 16 + 1e-6).all()


def test_fewer_and_more_codes_than_the_source_has_are_scored(tmp_path: Path):
    for N in (12, 24):
        _, runs, _ = run("ablations", tmp_path / str(N), "part=geometry", "normalise=false", f"coder.N={N}")
        assert runs["metrics.dict_mcc"].between(0.1, 1).all() and runs["metrics.interference"].gt(0).all()
    assert (runs["metrics.dict_mcc"] > 0.6).all()


def test_a_bias_is_learned_on_both_sides(tmp_path: Path):
    without, with_bias = (
        run("ablations", tmp_path / bias, "part=bias", f"coder.bias={bias}", "steps=60")[1]["metrics.loss"]
        for bias in ("false", "true")
    )
    assert not without.equals(with_bias)


# ---- the paper's directions


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("oracles")
    return {
        name: run("known_dictionary", folder / name, f"coder={name}", "source.n_test=300")[1]
        for name in ("fista", "nnls", "l0_oracle")
    }


def test_the_problem_is_solvable_and_the_solvers_stand_in_order(oracles):
    assert (final(oracles["l0_oracle"], "L0 oracle", "exact_support") > 0.999).all()
    best, lasso, least = (float(table["metrics.latent_mcc"].mean()) for table in oracles.values())
    assert float(final(oracles["l0_oracle"], "L0 oracle", "latent_mcc").mean()) > 0.999
    assert 0.97 < best < 0.999 and 0.85 < lasso < best and least > 0.999


def test_towards_known_codes_the_wide_mlp_beats_the_sae(tmp_path: Path):
    few = ["steps=400", "log_every=400", "coder.bias=true"]
    _, sae, _ = run("known_codes", tmp_path / "sae", "coder=sae", *few)
    _, mlp, _ = run("known_codes", tmp_path / "mlp", "coder=mlp", "coder.width=256", *few)
    assert (mlp["metrics.latent_mcc"].to_numpy() > sae["metrics.latent_mcc"].to_numpy()).all()
    assert sae["metrics.latent_mcc"].between(0.75, 0.92).all()


def test_under_the_true_dictionary_ito_beats_the_sae_whose_recovery_peaks_and_falls(tmp_path: Path):
    few = ["steps=8000", "log_every=500", "seeds=[0,1]"]
    _, sae, _ = run("known_dictionary", tmp_path / "sae", "coder=sae", *few)
    _, ito, curve = run("known_dictionary", tmp_path / "ito", "coder=ito", *few)
    own = sae[sae["coder.name"] == "SAE"]
    assert (own["metrics.latent_mcc_peak"] > own["metrics.latent_mcc"] + 0.02).all()
    assert (own["metrics.peak_step"] < 5000).all()
    assert (ito["metrics.latent_mcc"] > 0.85).all() and (final(sae, "ITO warm floor", "latent_mcc") > 0.97).all()
    assert (final(sae, "ITO warm", "latent_mcc") < 0.97).all()  # a code of zero cannot grow
    delayed = curve.set_index("step")["latent_mcc"]
    assert (delayed.loc[4500] < 0.78).all()


def test_without_the_dictionary_sparse_coding_beats_the_sae(tmp_path: Path):
    few = ["steps=4000", "log_every=4000", "lr=3e-3", "seeds=[0,1]"]
    _, sae, _ = run("unknown", tmp_path / "sae", "coder=sae", "inference.iterations=3000", *few)
    _, sc, _ = run("unknown", tmp_path / "sc", "coder=sc", "inference.iterations=3000", *few)
    assert final(sc, "SC", "latent_mcc").mean() > final(sae, "SAE", "latent_mcc").mean() + 0.05
    assert final(sc, "SC", "dict_mcc").mean() > final(sae, "SAE", "dict_mcc").mean() + 0.05
    assert abs(final(sae, "SAE+ITO", "latent_mcc").mean() - final(sae, "SAE", "latent_mcc").mean()) < 0.06
