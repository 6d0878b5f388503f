"""The amortisation gap, checked (T1 to T5 of experiments/oneill/theorem.py) at reduced size."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

from core import preflight
from core.bench import threads
from core.errors import UserError
from core.synthetic.sparse_codes import SparseCodeLaw
from experiments.oneill import theorem
from reports.papers.oneill.figures import oneill_theorem as figures
from tests.composing import composed


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def configured(folder: Path, *overrides: str) -> DictConfig:
    return composed("experiment=oneill_theorem", "scale=smoke", f"cell_folder='{folder}'", *overrides)


@pytest.mark.parametrize(("N", "M"), [(9, 8), (10, 8), (16, 8), (5, 2)])
def test_no_map_comes_closer_to_the_identity_than_the_rank_deficit_and_the_pseudo_inverse_does(N: int, M: int):
    D = SparseCodeLaw(N, M, 2).dictionary(0).double()
    assert theorem.frobenius(D) == pytest.approx(N - M, abs=1e-10)
    best = torch.linalg.pinv(D)
    for seed in range(20):
        other = best + 0.1 * torch.randn(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (D @ other - torch.eye(N)).square().sum() > N - M


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    folder = tmp_path_factory.mktemp("cell")
    shapes = "shapes=[{N:8,K:2},{N:10,K:2},{N:12,K:2},{N:8,K:1}]"
    with threads(1):
        return theorem.run(configured(folder, shapes, "M=8", "steps=400", "n_train=1024", "n_test=256")), folder


def test_three_atoms_in_a_plane_are_read_by_solvers_and_not_by_the_encoder(smoke: tuple[dict[str, float], Path]):
    metrics, _ = smoke
    for solver in ("nnls", "basis_pursuit"):
        assert metrics[f"{solver}_largest_error_N3_K2"] < 1e-12 and metrics[f"{solver}_exact_samples_N3_K2"] == 1
    assert 0.05 < metrics["lnl_relative_mse_N3_K2"] < 0.10 and metrics["lnl_exact_samples_N3_K2"] < 0.02
    assert metrics["d_transposed_largest_error_N3_K1"] < 1e-14  # K = 1 is not enough for a gap


def test_the_gap_is_none_without_a_rank_deficit_and_grows_with_it(smoke: tuple[dict[str, float], Path]):
    metrics, _ = smoke
    errors = [metrics[f"lnl_relative_mse_N{N}_K2"] for N in (8, 10, 12)]
    assert errors[0] < 1e-7 and errors[0] < errors[1] < errors[2]
    assert errors[1] < metrics["lnl_relative_mse_untrained_N10_K2"]  # training did lower it


def test_the_problems_in_which_the_encoder_fails_are_solvable(smoke: tuple[dict[str, float], Path]):
    metrics, _ = smoke
    for N in (8, 10, 12):
        assert metrics[f"l0_oracle_exact_support_N{N}_K2"] == 1 and metrics[f"l0_oracle_relative_mse_N{N}_K2"] < 1e-10
        assert metrics[f"l0_oracle_least_singular_value_N{N}_K2"] > 1e-3


def test_the_figure_is_drawn_from_the_files_of_a_cell(smoke: tuple[dict[str, float], Path]):
    _, folder = smoke
    runs, samples = (pd.read_parquet(folder / name) for name in (theorem.RUNS, theorem.ILLUSTRATION))
    assert set(runs["coder.name"]) == {"L-NL", "L0 oracle", "NNLS", "basis pursuit", "D transposed"}
    left, middle, _ = figures.figure(runs, samples).axes
    assert len(left.collections) == 2 and "rank deficit" in middle.get_xlabel()


def test_every_atom_of_an_orthonormal_dictionary_is_readable_and_none_between_two_others():
    assert all(theorem.is_readable(np.eye(3), i) for i in range(3))
    between = np.array([[1.0, 0.0], [0.0, 1.0], [math.sqrt(0.5), math.sqrt(0.5)]])  # the third is a sum of the others
    assert [theorem.is_readable(between, i) for i in range(3)] == [True, True, False]


def test_as_many_atoms_are_readable_as_wendels_theorem_expects():
    found = [theorem.is_readable(SparseCodeLaw(6, 3, 1).dictionary(seed).double().numpy(), 0) for seed in range(400)]
    expected = theorem.expected_readable_share(6, 3)
    assert expected == 0.5 and abs(np.mean(found) - expected) < 4 * math.sqrt(0.25 / 400)
    assert theorem.expected_readable_share(8, 8) == 1 and theorem.expected_readable_share(9, 8) == 1 - 1 / 256


def test_the_gradient_of_the_encoder_is_that_of_autograd():
    g = torch.Generator().manual_seed(0)
    X, S, W0 = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((2, 20, 3), (2, 20, 5), (2, 3, 5)))
    W, b = W0.clone().requires_grad_(), torch.zeros(2, 1, 5, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([W, b], lr=0.01)
    for step in range(20):
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / 20)
        adam.zero_grad()
        ((X @ W + b).relu() - S).square().sum((0, 2)).mean().backward()
        adam.step()
    for found, expected in zip(theorem.train_lnl(X, S, W0, 20, 0.01), (W, b), strict=True):
        torch.testing.assert_close(found, expected.detach(), atol=1e-9, rtol=0)


def test_the_same_cell_gives_the_same_numbers_twice(tmp_path: Path):
    cfg = configured(tmp_path, "shapes=[{N:9,K:2}]", "steps=20", "n_train=64", "n_test=64")
    assert theorem.run(cfg) == theorem.run(cfg)


@pytest.mark.parametrize("shape", ["{N:6,K:2}", "{N:500,K:5}"])
def test_a_shape_outside_the_theorem_is_refused(shape: str, tmp_path: Path):
    with pytest.raises(UserError, match="K log"):
        preflight.check([configured(tmp_path, f"shapes=[{shape}]")])
