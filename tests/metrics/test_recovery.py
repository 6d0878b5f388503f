import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from core.errors import UserError
from core.metrics.recovery import (
    Kind,
    UnmatchedCorrelationSums,
    chance_corrected,
    chance_dictionary_mcc,
    correlations,
    dictionary_mcc,
    matched_correlations,
    mcc,
    unmatched_correlations,
)
from core.synthetic.sparse_codes import SparseCodeLaw

KINDS: tuple[Kind, ...] = ("pearson", "cosine")
CHANCE = {  # of the dictionary, Pearson: N -> M = 8, 16, 32
    16: (0.66, 0.48, 0.33),
    32: (0.74, 0.54, 0.38),
    64: (0.79, 0.59, 0.43),
    128: (0.84, 0.64, 0.46),
}


def codes(n: int = 200, N: int = 6, seed: int = 0) -> torch.Tensor:
    return SparseCodeLaw(N, 4, min(2, N)).draw(n, 1, seed).S_train


def test_correlations_by_hand():
    # Centred: (-1, 0, 1) and (-1, 1, 0), norms sqrt 2 each, inner product 1.
    A, B = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.0], [2.0], [1.0]])
    assert correlations(A, B).item() == pytest.approx(1 / 2)
    assert correlations(A, -B).item() == pytest.approx(-1 / 2)
    assert correlations(A, B, "cosine").item() == pytest.approx(7 / math.sqrt(14 * 5))


def test_mcc_by_hand_takes_the_best_assignment_not_the_best_pairs_first():
    # |cosine| is [[.9, .8], [.8, .1]] up to norms: the pair .9 first leaves .1; the best sum is .8 + .8.
    S = torch.eye(4)[:, :2]
    S_hat = torch.tensor([[0.9, 0.8], [0.8, 0.1], [0.0, 0.0], [0.0, 0.0]])
    S_hat[2, 0], S_hat[3, 1] = 0.3, 0.4  # norms: sqrt(.81 + .64 + .09), sqrt(.64 + .01 + .16)
    a, b = math.sqrt(1.54), 0.9
    assert mcc(S, S_hat, "cosine").item() == pytest.approx((0.8 / b + 0.8 / a) / 2)
    assert matched_correlations(S, S_hat, "cosine").tolist() == pytest.approx([0.8 / b, 0.8 / a])
    assert matched_correlations(S, S_hat[:, :1], "cosine").tolist() == pytest.approx([0.9 / a, 0])


def naive_mcc(S: np.ndarray, S_hat: np.ndarray) -> float:
    """Each pair by `numpy.corrcoef`, then scipy's assignment on costs."""
    C = np.zeros((S.shape[1], S_hat.shape[1]))
    for i, j in itertools.product(range(S.shape[1]), range(S_hat.shape[1])):
        if S[:, i].std() > 1e-6 and S_hat[:, j].std() > 1e-6:
            C[i, j] = abs(np.corrcoef(S[:, i], S_hat[:, j])[0, 1])
    return C[linear_sum_assignment(-C)].sum() / S.shape[1]


def naive_cosine_mcc(A: np.ndarray, B: np.ndarray) -> float:
    """SAELens's definition for dictionaries whose rows are atoms: rows to unit norm, |A B^T|, assignment, mean."""
    C = np.abs((A / np.linalg.norm(A, axis=1, keepdims=True)) @ (B / np.linalg.norm(B, axis=1, keepdims=True)).T)
    return C[linear_sum_assignment(1 - C)].mean()


@settings(max_examples=30, deadline=None)
@given(
    P=st.integers(1, 9),
    Q=st.integers(1, 9),
    n=st.integers(3, 40),
    dead=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_mcc_agrees_with_a_naive_implementation_for_all_widths(P: int, Q: int, n: int, dead: int, seed: int):
    rng = np.random.default_rng(seed)
    S, S_hat = rng.normal(size=(n, P)).astype(np.float32), rng.normal(size=(n, Q)).astype(np.float32)
    S_hat[:, :dead] = 0.1
    assert mcc(torch.tensor(S), torch.tensor(S_hat)).item() == pytest.approx(naive_mcc(S, S_hat), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(N=st.integers(1, 12), M=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_dictionary_mcc_by_cosine_is_the_definition_of_saelens(N: int, M: int, seed: int):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(N, M)), rng.normal(size=(N, M))
    found = dictionary_mcc(torch.tensor(A), torch.tensor(B), "cosine").item()
    assert found == pytest.approx(naive_cosine_mcc(A, B), abs=1e-9)


def test_dictionary_mcc_by_pearson_is_that_of_codes_with_coordinates_as_samples():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(16, 8)), rng.normal(size=(16, 8))
    assert dictionary_mcc(torch.tensor(A), torch.tensor(B)).item() == pytest.approx(naive_mcc(A.T, B.T), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(6)),
    scales=st.lists(st.floats(0.01, 100), min_size=6, max_size=6),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6),
    shift=st.floats(-5, 5),
    kind=st.sampled_from(KINDS),
)
def test_mcc_is_1_under_permutation_scaling_and_sign(
    order: list[int], scales: list[float], signs: list[float], shift: float, kind: Kind
):
    S = codes()
    S_hat = S[:, order] * torch.tensor(scales) * torch.tensor(signs)
    assert mcc(S, S_hat, kind).item() == pytest.approx(1, abs=1e-6)
    if kind == "pearson":
        assert mcc(S, S_hat + shift * torch.tensor(scales)).item() == pytest.approx(1, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
def test_mcc_does_not_change_with_order_scale_or_sign_of_imperfect_codes(data, kind: Kind, seed: int):
    S = codes(n=60, seed=seed)
    S_hat = S + torch.randn(S.shape, generator=torch.Generator().manual_seed(seed))
    order = data.draw(st.permutations(range(6)))
    scales = torch.tensor(data.draw(st.lists(st.floats(0.01, 100), min_size=6, max_size=6)))
    sign = data.draw(st.sampled_from([-1.0, 1.0]))
    expected = mcc(S, S_hat, kind).item()
    assert 0 <= expected < 1
    assert mcc(S, sign * scales * S_hat[:, order], kind).item() == pytest.approx(expected, abs=1e-6)
    assert mcc(S[:, order], S_hat, kind).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_columns_count_0(kind: Kind):
    S = codes()
    S_hat = S.clone()
    S_hat[:, [1, 4]] = 0
    assert mcc(S, S_hat, kind).item() == pytest.approx(4 / 6)
    assert mcc(S, torch.zeros_like(S), kind).item() == 0
    assert correlations(S, S_hat, kind)[:, [1, 4]].abs().max() == 0


def test_constant_columns_count_0_for_pearson_in_spite_of_rounding():
    S = codes()
    assert mcc(S, torch.full_like(S, 0.1)).item() == 0
    assert not unmatched_correlations(S, torch.full_like(S, math.exp(-10))).any()


@pytest.mark.parametrize("kind", KINDS)
def test_true_columns_without_a_partner_count_0_and_surplus_columns_cost_nothing(kind: Kind):
    S = codes()
    assert mcc(S, S[:, :4], kind).item() == pytest.approx(4 / 6)
    surplus = torch.cat([torch.rand(200, 3, generator=torch.Generator().manual_seed(0)), S], 1)
    assert mcc(S, surplus, kind).item() == pytest.approx(1)
    D = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert dictionary_mcc(D, -2 * D[[3, 0]], kind).item() == pytest.approx(2 / 5)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_runs_get_what_each_gets_alone(kind: Kind):
    g = torch.Generator().manual_seed(0)
    S, S_hat = torch.rand(2, 3, 40, 5, generator=g), torch.rand(2, 3, 40, 7, generator=g)
    alone = [[mcc(S[a, b], S_hat[a, b], kind).item() for b in range(3)] for a in range(2)]
    stacked = mcc(S, S_hat, kind)
    assert stacked.shape == (2, 3) and mcc(S[0, 0], S_hat[0, 0]).shape == ()
    assert stacked.numpy() == pytest.approx(np.array(alone), abs=1e-12)
    assert mcc(S[0, 0], S_hat, kind).shape == (2, 3)  # one truth for all runs


def test_unmatched_correlations_are_signed_and_of_equal_indices():
    rng = np.random.default_rng(0)
    S, S_hat = rng.normal(size=(3, 50, 4)), rng.normal(size=(3, 50, 4))
    expected = [[np.corrcoef(S[r, :, i], S_hat[r, :, i])[0, 1] for i in range(4)] for r in range(3)]
    found = unmatched_correlations(torch.tensor(S), torch.tensor(S_hat))
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-12)
    one = torch.tensor(S[0])
    assert unmatched_correlations(one, one).tolist() == pytest.approx([1] * 4)
    assert unmatched_correlations(one, -one).tolist() == pytest.approx([-1] * 4)
    assert unmatched_correlations(one, one.flip(1)).mean().item() < 0.5


def test_a_run_with_nan_or_infinity_gets_nan_and_the_others_their_values():
    S = codes().expand(3, -1, -1)
    S_hat = S.clone()
    S_hat[0, 5, 2], S_hat[2, 0, 0] = math.nan, math.inf
    for values in (mcc(S, S_hat), mcc(S, S_hat, "cosine"), unmatched_correlations(S, S_hat).mean(-1)):
        assert values.isnan().tolist() == [True, False, True]
        assert values[1].item() == pytest.approx(1)


@pytest.mark.parametrize(("N", "column"), [(16, 0), (16, 2), (64, 1)])
def test_chance_of_a_dictionary(N: int, column: int):
    assert chance_dictionary_mcc(N, 2 ** (3 + column)) == pytest.approx(CHANCE[N][column], abs=0.02)


def test_chance_of_dictionaries_of_all_published_shapes():
    for N, row in CHANCE.items():
        found = [chance_dictionary_mcc(N, M) for M in (8, 16, 32)]
        assert found == pytest.approx(row, abs=0.02)
        by_cosine = [chance_dictionary_mcc(N, M, "cosine") for M in (8, 16, 32)]
        assert all(0 < p - c < 0.05 for p, c in zip(found, by_cosine, strict=True))
    assert chance_dictionary_mcc(1000, 200, n_draws=2) == pytest.approx(0.23, abs=0.02)


def test_chance_repeats_with_its_seed():
    assert chance_dictionary_mcc(8, 4, n_draws=2, seed=1) == chance_dictionary_mcc(8, 4, n_draws=2, seed=1)
    assert chance_dictionary_mcc(8, 4, n_draws=2, seed=1) != chance_dictionary_mcc(8, 4, n_draws=2, seed=2)


def test_chance_corrected_by_hand():
    assert chance_corrected(0.83, 0.66) == pytest.approx(0.5)
    assert chance_corrected(torch.tensor([0.66, 1.0, 0.32]), 0.66).tolist() == pytest.approx([0, 1, -1])
    assert math.isnan(chance_corrected(1.0, 1.0))


def test_two_coordinates_make_pearson_say_nothing():
    assert chance_dictionary_mcc(3, 2) == pytest.approx(1)
    assert chance_dictionary_mcc(3, 2, "cosine") < 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mcc(torch.ones(1, 3), torch.ones(1, 3)), "pearson correlations need 2 samples"),
        (lambda: dictionary_mcc(torch.ones(3, 1), torch.ones(3, 1)), "pearson correlations need 2 samples"),
        (lambda: mcc(torch.ones(0, 3), torch.ones(0, 3), "cosine"), "need 1 sample"),
        (lambda: mcc(torch.ones(5, 0), torch.ones(5, 3)), "1 column"),
        (lambda: mcc(torch.ones(5, 3), torch.ones(4, 3)), "5 and 4"),
        (lambda: dictionary_mcc(torch.ones(3, 8), torch.ones(3, 7)), "8 and 7"),
        (lambda: unmatched_correlations(torch.ones(5, 3), torch.ones(5, 4)), "3 true and 4"),
        (lambda: unmatched_correlations(torch.ones(5, 0), torch.ones(5, 0)), "1 column"),
        (lambda: mcc(torch.ones(5, 3), torch.ones(5, 3), "spearman"), "'spearman' must be pearson or cosine"),  # type: ignore[arg-type]
        (lambda: chance_dictionary_mcc(0, 8), "N: 0 must be at least 1"),
        (lambda: chance_dictionary_mcc(8, 8, n_draws=0), "n_draws: 0"),
    ],
)
def test_what_has_no_correlation_is_refused(call, says: str):
    with pytest.raises(UserError, match=says):
        call()


def test_unmatched_correlations_of_many_columns_are_those_of_each(monkeypatch):
    g = torch.Generator().manual_seed(0)
    S, S_hat = torch.rand(2, 30, 7, generator=g), torch.rand(2, 30, 7, generator=g)
    whole = unmatched_correlations(S, S_hat)
    monkeypatch.setattr("core.metrics.recovery.CHUNK", 60 * 3)
    assert unmatched_correlations(S, S_hat).numpy() == pytest.approx(whole.numpy(), abs=1e-12)
    assert whole.numpy() == pytest.approx(correlations(S, S_hat).diagonal(dim1=-2, dim2=-1).numpy(), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(0, 2**31))
def test_correlation_sums_over_chunks_are_the_correlation_over_all_samples(n: int, seed: int):
    law, g = SparseCodeLaw(N=12, M=3, K=3), torch.Generator().manual_seed(seed)
    indices, values = law.active(n, g)
    S = torch.zeros(n, 12).scatter_(1, indices, values)
    S_hat = (S + torch.randn(4, n, 12, generator=g)).relu()
    S_hat[0, :, 3], S_hat[1, :, 5] = 0, 2.5  # a dead and a constant unit
    sums = UnmatchedCorrelationSums(4, 12)
    for part in torch.arange(n).split(7):
        sums.add(indices[part], values[part], S_hat[:, part])
    assert torch.allclose(sums.each(), unmatched_correlations(S.expand(4, n, 12), S_hat), atol=1e-9)


def test_correlation_sums_need_two_samples():
    with pytest.raises(UserError, match="2 samples"):
        UnmatchedCorrelationSums(1, 3).each()
