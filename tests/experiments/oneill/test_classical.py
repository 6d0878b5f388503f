from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig

from core import preflight
from core.errors import UserError
from experiments.oneill import classical
from reports.collect import Cell
from reports.papers.oneill.figures.oneill_classical import panels
from tests.composing import composed

SMALL = ("source.N=8", "source.M=6", "source.K=1", "source.n_train=100", "source.n_test=50")


def configured(folder: Path, *overrides: str) -> DictConfig:
    return composed("experiment=oneill_classical", f"cell_folder='{folder}'", *overrides)


def test_the_authors_published_value_comes_out_of_the_authors_settings(tmp_path: Path):
    found = classical.run(configured(tmp_path, "scale=paper", "source.N=32", "source.M=16", "source.K=3"))
    assert found["latent_mcc"] == pytest.approx(0.986, abs=1e-3)
    assert found["dict_mcc"] == pytest.approx(0.989, abs=1e-3)


@pytest.mark.parametrize("codes", ["signed", "nonnegative"])
def test_a_planted_dictionary_is_recovered_beyond_chance(codes: str, tmp_path: Path):
    found = classical.run(
        configured(tmp_path, f"codes={codes}", *SMALL, f"coders.{codes}.max_iter=15", f"coders.{codes}.fit_alpha=0.1")
    )
    assert found["dict_mcc"] > 0.9 > found["dict_mcc_chance"]
    assert found["latent_mcc"] > 0.8 > found["latent_mcc_chance"] > 0
    row = pd.read_parquet(tmp_path / classical.RUNS).iloc[0]
    assert row["seed"] == 42 and row["metrics.latent_mcc"] == found["latent_mcc"]


def test_nonnegative_codes_stay_nonnegative_and_signed_ones_do_not(tmp_path: Path):
    for codes, lowest in (("nonnegative", 0.0), ("signed", -np.inf)):
        cfg = configured(tmp_path, f"codes={codes}", *SMALL)
        data = classical.draw(cfg, 0)
        found = classical.coded(cfg, data.X_test, data.D)
        assert (found.min() >= lowest) and (data.S_test.min() < 0) == (found.min() < 0) == (codes == "signed")
        assert ((data.S_test != 0).sum(1) == 1).all()
        np.testing.assert_allclose(data.S_test @ data.D, data.X_test, atol=1e-6)


def test_codes_of_an_orthonormal_dictionary_are_soft_thresholds(tmp_path: Path):
    x = np.array([[1.0, -0.5, 0.02]])
    for codes, expected in (("signed", [0.95, -0.45, 0.0]), ("nonnegative", [0.95, 0.0, 0.0])):
        found = classical.coded(configured(tmp_path, f"codes={codes}"), x, np.eye(3))
        np.testing.assert_allclose(found, [expected], atol=1e-12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.N=2"], "source.K"),
        (["source.n_train=10"], "n_train=10"),
        (["source.zipf_alpha=1.0"], "zipf_alpha"),
        (["coders.nonnegative.fit_algorithm=lars", "codes=nonnegative"], "with cd alone"),
    ],
)
def test_a_problem_that_cannot_be_drawn_or_fitted_is_refused(overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        preflight.check([configured(tmp_path, *overrides)])


def test_the_figure_has_a_panel_for_each_metric_and_k():
    def cell(N: int, M: int, K: int) -> Cell:
        metrics = {"latent_mcc": 0.5, "dict_mcc": 0.6, "latent_mcc_chance": 0.4, "dict_mcc_chance": 0.5}
        settings = {"source.N": N, "source.M": M, "source.K": K, "codes": "signed"}
        return Cell("oneill_classical", "paper", 42, Path(), metrics, settings, {})

    figure = panels([cell(N, M, K) for N in (16, 32) for M in (8, 16) for K in (3, 6)], "signed")
    assert len(figure.axes) == 4 and [len(axes.containers) for axes in figure.axes] == [2] * 4
