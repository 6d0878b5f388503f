import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.seeding import generator
from core.synthetic.sparse_codes import SparseCodeLaw, chance_latent_mcc


@settings(max_examples=30, deadline=None)
@given(data=st.data(), alpha=st.sampled_from([None, 0.5, 1.0, 3.0]), seed=st.integers(0, 2**31))
def test_codes_have_exactly_k_positive_entries_and_atoms_unit_norm(data, alpha: float | None, seed: int):
    N, M = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    K = data.draw(st.integers(1, N))
    problem = SparseCodeLaw(N, M, K, alpha).draw(n_train=20, n_test=7, seed=seed)
    for S, X, n in ((problem.S_train, problem.X_train, 20), (problem.S_test, problem.X_test, 7)):
        assert S.shape == (n, N) and X.shape == (n, M)
        assert S.dtype == X.dtype == torch.float32
        assert ((S > 0).sum(1) == K).all() and ((S != 0).sum(1) == K).all()
        assert torch.equal(X, S @ problem.D)
    assert problem.D.norm(dim=1).numpy() == pytest.approx(np.ones(N), abs=1e-6)


def test_uniform_codes_are_half_normal_and_equally_frequent():
    S = SparseCodeLaw(16, 8, 3).draw(100_000, 1, seed=0).S_train
    assert (S > 0).float().mean(0).numpy() == pytest.approx(np.full(16, 3 / 16), abs=0.006)  # 5 standard errors
    magnitudes = S[S > 0]
    assert magnitudes.mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.006)
    assert magnitudes.square().mean().item() == pytest.approx(1.0, abs=0.015)


def supports(S: torch.Tensor) -> np.ndarray:
    """Each sample's active codes as a binary number."""
    return ((S > 0).long() * 2 ** torch.arange(S.shape[1])).sum(1).numpy()


def test_all_sets_of_k_codes_are_equally_likely():
    S = SparseCodeLaw(5, 3, 2).draw(50_000, 1, seed=1).S_train
    counts = np.bincount(supports(S), minlength=32)
    assert (counts > 0).sum() == 10
    assert counts[counts > 0] / 50_000 == pytest.approx(np.full(10, 0.1), abs=0.007)


def test_zipf_supports_have_the_frequencies_of_successive_draws_without_replacement():
    N, K, n = 5, 3, 100_000
    w = 1 / np.arange(1, N + 1) / sum(1 / np.arange(1, N + 1))
    expected = np.zeros(2**N)
    for i, j, k in itertools.permutations(range(N), K):
        expected[2**i + 2**j + 2**k] += w[i] * w[j] / (1 - w[i]) * w[k] / (1 - w[i] - w[j])
    S = SparseCodeLaw(N, 4, K, zipf_alpha=1.0).draw(n, 1, seed=0).S_train
    assert np.bincount(supports(S), minlength=2**N) / n == pytest.approx(expected, abs=0.007)


def test_the_first_zipf_draw_has_probabilities_worked_by_hand_and_magnitudes_fall_with_them():
    # N = 3, alpha = 1: weights 1, 1/2, 1/3 over 11/6 are 6/11, 3/11, 2/11.
    source = SparseCodeLaw(3, 2, 1, zipf_alpha=1.0)
    w = np.array([6, 3, 2]) / 11
    assert source.weights().numpy() == pytest.approx(w)
    S = source.draw(200_000, 1, seed=3).S_train
    assert (S > 0).float().mean(0).numpy() == pytest.approx(w, abs=0.006)
    magnitude = torch.stack([s[s > 0].mean() for s in S.T]).numpy()
    assert magnitude / math.sqrt(2 / math.pi) == pytest.approx(w + 0.1, rel=0.02)


def test_atoms_point_in_all_directions():
    D = SparseCodeLaw(20_000, 3, 1).dictionary(seed=0)
    assert (D.T @ D / 20_000).numpy() == pytest.approx(np.eye(3) / 3, abs=0.01)
    assert D.mean(0).numpy() == pytest.approx(np.zeros(3), abs=0.02)


def test_a_seed_gives_the_same_problem_whatever_the_sizes():
    source = SparseCodeLaw(16, 8, 3)
    one, again, other = source.draw(50, 20, seed=0), source.draw(50, 20, seed=0), source.draw(50, 20, seed=1)
    assert all(torch.equal(getattr(one, name), getattr(again, name)) for name in vars(one))
    assert not any(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))
    longer = source.draw(80, 20, seed=0)
    assert torch.equal(one.S_test, longer.S_test) and torch.equal(one.D, longer.D)
    assert not torch.equal(one.S_test, one.S_train[:20])


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_active_codes_are_the_nonzero_entries_of_dense_codes(alpha: float | None):
    source = SparseCodeLaw(30, 8, 4, alpha)
    dense = source.codes(100, generator(0, "test"))
    indices, values = source.active(100, generator(0, "test"))
    assert torch.equal(dense.gather(1, indices), values)
    assert dense.count_nonzero() == values.count_nonzero() == 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"K": 17}, r"source\.K: 17 active codes cannot be chosen from source\.N = 16"),
        ({"K": 0}, r"source\.K: 0 must be a whole number of at least 1"),
        ({"K": 2.5}, r"source\.K: 2\.5 must be a whole number"),
        ({"N": 0}, r"source\.N: 0"),
        ({"M": -1}, r"source\.M: -1"),
        ({"zipf_alpha": 0.0}, r"source\.zipf_alpha: 0\.0 must be a positive number, or null"),
        ({"zipf_alpha": math.nan}, r"source\.zipf_alpha: nan"),
    ],
)
def test_sizes_that_allow_no_problem_are_named_in_the_error(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        SparseCodeLaw(**{"N": 16, "M": 8, "K": 3, **settings})


@pytest.mark.parametrize("sizes", [{"n_train": 0, "n_test": 1}, {"n_train": 1, "n_test": 0}])
def test_an_empty_split_is_named_in_the_error(sizes: dict):
    name = next(name for name, value in sizes.items() if value == 0)
    with pytest.raises(UserError, match=rf"source\.{name}: 0"):
        SparseCodeLaw(16, 8, 3).draw(**sizes, seed=0)


@pytest.mark.parametrize(("K", "chance"), [(3, 0.50), (9, 0.42)])
def test_latents_of_an_untrained_encoder_score_by_chance_as_expected(K: int, chance: float):
    assert chance_latent_mcc(SparseCodeLaw(16, 8, K)) == pytest.approx(chance, abs=0.025)


def test_the_chance_score_of_latents_is_decided_by_its_seed():
    one, again, other = (chance_latent_mcc(SparseCodeLaw(8, 4, 2), n_draws=2, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
