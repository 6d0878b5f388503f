from collections.abc import Iterator

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from torch import Tensor

from core.bench import threads
from core.errors import UserError
from core.metrics.recovery import unmatched_correlations
from core.stacked.coders import normal_codes
from core.stacked.inference import (
    as_stack,
    fista,
    hard_top_k,
    kkt_violation,
    log_codes,
    nnls,
    objective,
    relu_codes,
    rozell_lca,
)
from core.stacked.l0 import l0_oracle, n_supports
from core.synthetic.sparse_codes import SparseCodeLaw

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def planted(
    R: int, n: int, N: int, M: int, K: int, seed: int = 0, dtype: torch.dtype = DOUBLE
) -> tuple[Tensor, Tensor, Tensor]:
    """X [R, n, M], D [R, N, M], S [R, n, N]."""
    problems = [SparseCodeLaw(N, M, K).draw(n, 1, seed + run) for run in range(R)]
    D = torch.nn.functional.normalize(torch.stack([p.D for p in problems]).to(dtype), dim=2)
    S = torch.stack([p.S_train for p in problems]).to(dtype)
    return S @ D, D, S


def test_the_objective_by_hand():
    # x = (1, 2), one atom (0, 1), s = 0.5: residual (1, 1.5), 3.25 / (1 * 2) + 0.4 * 0.5 / (1 * 1)
    X, D, S = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5]])
    assert objective(X, D, S, 0.4).item() == pytest.approx(1.825)


def test_one_atom_is_soft_thresholded_by_hand():
    # mu = l1 M / (2 N) = 0.4 * 2 / 2 = 0.4; s = max(2 - 0.4, 0)
    X, D = torch.tensor([[1.0, 2.0], [3.0, 0.3]]), torch.tensor([[0.0, 1.0]])
    expected = torch.tensor([[1.6], [0.0]])
    for found in (fista(X, D, 0.4), rozell_lca(X, D, 0.4), log_codes(X, D, 0.4, 2000, 2e-2, init=-2.0)):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("l1", [1e-3, 0.01, 0.5])
def test_fista_is_the_nonnegative_lasso_of_scikit_learn(l1: float):
    X, D, _ = planted(1, 40, 16, 8, 3)
    S = fista(X[0], D[0], l1, iterations=100_000, tolerance=1e-10)
    lasso = Lasso(alpha=l1 / (2 * 16), positive=True, fit_intercept=False, tol=1e-14, max_iter=1_000_000)
    reference = np.stack([lasso.fit(D[0].mT.numpy(), x).coef_ for x in X[0].numpy()])  # alpha = mu / M
    np.testing.assert_allclose(S.numpy(), reference, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), N=st.integers(1, 20), M=st.integers(1, 12), n=st.integers(1, 12),
    l1=st.lists(st.floats(1e-3, 2.0), min_size=2, max_size=2),
)  # fmt: skip
def test_fista_ends_where_the_optimality_conditions_hold(seed: int, N: int, M: int, n: int, l1: list[float]):
    X, D, _ = planted(2, n, N, M, min(3, N), seed)
    S = fista(X, D, l1, iterations=100_000, tolerance=1e-8)
    assert (S >= 0).all() and (kkt_violation(X, D, S, l1) < 1e-6).all()
    nearby = (S + 1e-3 * torch.randn(S.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)).clamp(min=0)
    assert (objective(X, D, S, l1) <= objective(X, D, nearby, l1) + 1e-12).all()


def test_a_wrong_code_violates_the_optimality_conditions_by_hand():
    X, D = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    assert kkt_violation(X, D, torch.tensor([[0.0]]), 0.4).item() == pytest.approx(1.6)  # 2 - mu wants to be active
    assert kkt_violation(X, D, torch.tensor([[1.9]]), 0.4).item() == pytest.approx(0.3)
    assert kkt_violation(X, D, torch.tensor([[1.6]]), 0.4).item() == pytest.approx(0.0, abs=1e-6)


def test_fp32_fista_reaches_its_tolerance():
    X, D, _ = planted(3, 200, 16, 8, 3, dtype=torch.float32)
    assert (kkt_violation(X, D, fista(X, D, 0.01), 0.01) < 2e-5).all()


def test_the_residual_of_nnls_is_scipys_and_no_larger_than_fistas():
    X, D, _ = planted(2, 30, 6, 8, 3)
    X = X + 0.1 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    found = nnls(X, D)
    for run in range(2):
        for x, s in zip(X[run].numpy(), found[run].numpy(), strict=True):
            reference = scipy.optimize.lsq_linear(D[run].mT.numpy(), x, bounds=(0, np.inf), method="bvls", tol=1e-14).x
            np.testing.assert_allclose(s, reference, atol=1e-8)
    torch.testing.assert_close(found, fista(X, D, 0.0, iterations=100_000, tolerance=1e-10), atol=1e-7, rtol=0)


def test_nnls_reads_a_sample_in_an_overcomplete_cone_exactly_with_at_most_m_codes():
    X, D, _ = planted(1, 50, 16, 8, 3)
    S = nnls(X, D)
    torch.testing.assert_close(S @ D, X, atol=1e-10, rtol=0)
    assert (S >= 0).all() and ((S > 0).sum(-1) <= 8).all()


def test_log_codes_tend_to_the_solution_of_the_lasso():
    X, D, _ = planted(2, 64, 8, 6, 2, dtype=torch.float32)
    best = objective(X, D, fista(X, D, 0.05), 0.05)
    codes = [log_codes(X, D, 0.05, iterations, 0.03, init=-2.0) for iterations in (200, 1000, 4000)]
    gaps = [objective(X, D, S, 0.05) / best - 1 for S in codes]
    assert (gaps[0] > gaps[1]).all() and (gaps[1] > gaps[2]).all()
    assert (gaps[2] >= -1e-5).all() and (gaps[2] < 5e-3).all()
    assert (codes[-1] - fista(X, D, 0.05)).abs().mean() < 5e-3


def test_the_first_steps_of_log_codes_are_adam_on_the_objective_by_autograd():
    X, D, _ = planted(2, 20, 6, 4, 2)
    l1 = torch.tensor([0.01, 0.3], dtype=DOUBLE)
    L = torch.full((2, 20, 6), -1.5, dtype=DOUBLE, requires_grad=True)
    adam = torch.optim.Adam([L], lr=0.05)
    for _ in range(30):
        adam.zero_grad()
        objective(X, D, L.exp(), l1).sum().backward()
        adam.step()
    found = log_codes(X, D, l1, 30, 0.05, init=-1.5)
    torch.testing.assert_close(found, L.exp().detach(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("k", [None, 2])
def test_relu_codes_are_adam_on_the_objective_by_autograd_and_keep_what_starts_at_zero(k: int | None):
    X, D, _ = planted(2, 20, 6, 4, 2)
    starts = [relu_codes(X, D, 0.0, 1, 1e-9, seeds) for seeds in ([3, 4], [3, 5])]
    assert torch.equal(starts[0][0], starts[1][0]) and not torch.equal(starts[0][1], starts[1][1])
    L = normal_codes([3, 4], 20, 6, "test_codes").double().requires_grad_()
    adam = torch.optim.Adam([L], lr=0.05)
    for _ in range(30):
        adam.zero_grad()
        S = L.relu() if k is None else hard_top_k(L.relu(), k)
        objective(X, D, S, 0.01).sum().backward()
        adam.step()
    found = relu_codes(X, D, 0.01, 30, 0.05, [3, 4], mask_k=k)
    expected = L.relu().detach()
    torch.testing.assert_close(found, expected if k is None else hard_top_k(expected, k), atol=1e-9, rtol=1e-9)
    assert not found[starts[0] == 0].any()


def test_the_initialisation_at_minus_ten_delays_log_codes_and_changes_the_end_little():
    X, D, S = planted(2, 256, 16, 8, 3, dtype=torch.float32)
    seen: dict[float, dict[int, tuple[Tensor, Tensor]]] = {-10.0: {}, -2.0: {}}
    for init, at in seen.items():

        def record(i: int, S_hat: Tensor, at: dict[int, tuple[Tensor, Tensor]] = at) -> None:
            at[i] = unmatched_correlations(S, S_hat).mean(-1), objective(X, D, S_hat, 0.01)

        log_codes(X, D, 0.01, 4000, 6e-3, init, callback=record, callback_at={0, 500, 4000})
    late, soon = seen[-10.0], seen[-2.0]
    assert (late[500][0] < 0.75).all() and (late[500][1] > 0.8 * late[0][1]).all()  # Adam moved L by 3 of about 10
    assert (soon[500][1] < 0.1 * late[500][1]).all() and (soon[500][0] > late[500][0]).all()
    assert ((late[4000][0] - soon[4000][0]).abs() < 0.06).all()


def test_a_warm_start_at_zero_cannot_move_and_at_the_floor_can():
    X, D, S = planted(1, 100, 16, 8, 3, dtype=torch.float32)
    wrong = torch.where(torch.rand(S.shape, generator=torch.Generator().manual_seed(0)) < 0.3, 0.0, S)
    codes = [log_codes(X, D, 0.01, 3000, 1e-3, wrong, floor=floor) for floor in (1e-10, 1e-2)]
    stuck, moved = (unmatched_correlations(S, S_hat).mean().item() for S_hat in codes)
    assert moved > stuck + 0.02


def test_masked_log_codes_keep_k_per_sample():
    X, D, _ = planted(2, 50, 8, 6, 2, dtype=torch.float32)
    S = log_codes(X, D, 0.01, 200, 0.05, init=-2.0, mask_k=2)
    assert ((S > 0).sum(-1) == 2).all()


def test_lca_rests_at_the_lasso_also_in_chunks(monkeypatch: pytest.MonkeyPatch):
    X, D, _ = planted(2, 30, 8, 6, 2)
    expected = fista(X, D, [0.05, 0.2], iterations=100_000, tolerance=1e-10)
    whole = rozell_lca(X, D, [0.05, 0.2], iterations=20_000, tolerance=1e-9)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    monkeypatch.setattr("core.stacked.inference.CHUNK_BYTES", 7 * 8 * 8)
    torch.testing.assert_close(
        rozell_lca(X, D, [0.05, 0.2], iterations=20_000, tolerance=1e-9), expected, atol=1e-5, rtol=0
    )


SOLVERS = {
    "log_codes": lambda X, D, l1: log_codes(X, D, l1, 200, 0.01, init=-2.0),
    "relu": lambda X, D, l1: relu_codes(X, D, l1, 100, 0.01, [0] * len(as_stack(X, D)[0])),
    "masked": lambda X, D, l1: log_codes(X, D, l1, 100, 0.01, init=-2.0, mask_k=3),
    "fista": lambda X, D, l1: fista(X, D, l1),
    "rozell_lca": lambda X, D, l1: rozell_lca(X, D, l1, iterations=200),
    "nnls": lambda X, D, l1: nnls(X, D),
    "l0_oracle": lambda X, D, l1: l0_oracle(X, D, 3),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_stack_gives_each_run_what_it_gets_alone(name: str):
    X, D, _ = planted(3, 64, 12, 6, 3, dtype=torch.float32)
    l1 = torch.tensor([0.01, 0.1, 0.5])
    stacked = SOLVERS[name](X, D, l1)
    alone = torch.stack([SOLVERS[name](X[r], D[r], float(l1[r])) for r in range(3)])
    assert stacked.shape == (3, 64, 12) and stacked.dtype == torch.float32 and (stacked >= 0).all()
    torch.testing.assert_close(stacked, alone, atol=1e-6, rtol=0)
    shared = SOLVERS[name](X[0], D, l1)  # one data set for all runs
    torch.testing.assert_close(shared[0], alone[0], atol=1e-6, rtol=0)
    assert shared.shape == (3, 64, 12)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_gives_the_same_bits_twice(name: str):
    X, D, _ = planted(2, 32, 12, 6, 3, dtype=torch.float32)
    assert torch.equal(SOLVERS[name](X, D, 0.1), SOLVERS[name](X, D, 0.1))


def test_the_callback_sees_the_codes_at_the_iterations_asked_for():
    X, D, _ = planted(1, 10, 4, 3, 2, dtype=torch.float32)
    seen: dict[int, Tensor] = {}
    final = log_codes(
        X[0], D[0], 0.01, 20, 0.1, -2.0, callback=lambda i, S: seen.update({i: S.clone()}), callback_at=[0, 7, 20]
    )
    assert list(seen) == [0, 7, 20]
    torch.testing.assert_close(seen[0], torch.full((10, 4), -2.0).exp())
    assert torch.equal(seen[20], final) and torch.equal(seen[7], log_codes(X[0], D[0], 0.01, 7, 0.1, -2.0))


def test_the_l0_oracle_finds_every_support_of_sixteen_atoms_in_eight_dimensions():
    X, D, S = planted(2, 300, 16, 8, 3, dtype=torch.float32)
    found = l0_oracle(X, D, 3)
    assert n_supports(16, 3) == 560 + 120 + 16
    assert torch.equal(found > 1e-6, S > 1e-6)
    torch.testing.assert_close(found, S, atol=2e-5, rtol=0)


def test_the_l0_oracle_takes_a_smaller_support_where_least_squares_would_be_negative():
    # atoms (1, 0) and (0.6, 0.8); x = (1, -0.5): on both atoms the second code is negative, so x ~ 1 * (1, 0)
    D, X = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, -0.5], [-1.0, -1.0]])
    torch.testing.assert_close(l0_oracle(X, D, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_the_l0_oracle_is_never_worse_than_other_codes_of_its_sparsity():
    X, D, _ = planted(1, 40, 8, 5, 4)
    error = (X - l0_oracle(X, D, 2) @ D).square().sum(-1)
    rival = (X - hard_top_k(fista(X, D, 0.01), 2) @ D).square().sum(-1)
    assert (error <= rival + 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_hard_top_k_keeps_the_k_largest(k: int, seed: int):
    S = torch.rand(5, 9, generator=torch.Generator().manual_seed(seed))
    kept = hard_top_k(S, k)
    assert ((kept > 0).sum(-1) == k).all() and torch.equal(kept[kept > 0], S[kept > 0])
    dropped, smallest = torch.where(kept > 0, 0.0, S).amax(-1), torch.where(kept > 0, kept, 1.0).amin(-1)
    assert (dropped <= smallest).all()
    assert torch.equal(hard_top_k(S, k, out=S), kept) and torch.equal(S, kept)


X0, D0 = torch.ones(4, 3), torch.eye(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_codes(X0 * 1e3, D0, 0.01, 300, 200.0), "lower lr, now 200"),
        (lambda: log_codes(X0, D0, 0.01, 10, 0.0), "lr=0"),
        (lambda: log_codes(X0, D0, 0.01, 10, 0.1, init=-X0), "starting codes"),
        (lambda: log_codes(X0, D0, 0.01, 10, 0.1, mask_k=4), "k=4: between 1 and the 3"),
        (lambda: relu_codes(X0, D0, 0.01, 10, 0.1, [0, 1]), "2 seeds for 1 runs"),
        (lambda: fista(X0, D0, -1.0), "l1=-1"),
        (lambda: fista(X0, D0, [0.1, 0.1]), "one for each of 1 runs"),
        (lambda: fista(X0, D0, 0.1, iterations=0), "iterations=0"),
        (lambda: fista(X0[:, :2], D0, 0.1), r"X \[4, 2\], D \[3, 3\]"),
        (lambda: fista(X0.expand(2, 4, 3), D0.expand(3, 3, 3), 0.1), "equally many runs"),
        (lambda: fista(X0 / 0, D0, 0.1), "not finite"),
        (lambda: fista(X0, D0 * 0, 0.1), "dictionary of zeros"),
        (lambda: fista(X0.double(), D0, 0.1), "same dtype"),
        (lambda: rozell_lca(X0, D0, 0.0, rate=30.0), "lower rate, now 30"),
        (lambda: l0_oracle(X0, D0, 4), r"K=4: between 1 and min\(N, M\)"),
        (lambda: hard_top_k(X0, 0), "k=0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message: str):
    with pytest.raises(UserError, match=message):
        call()


def test_an_enumeration_that_is_too_large_is_refused_with_its_size():
    with pytest.raises(UserError, match=r"25,706,996 supports \(up to K=5 of N=80 atoms\) on 1,000 samples: .* limit"):
        l0_oracle(torch.ones(1000, 8), torch.ones(80, 8), 5)
