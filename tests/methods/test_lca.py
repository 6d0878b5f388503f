"""LCA: its codes against scikit-learn's LASSO, and a dictionary that is learned, stored and resumed."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.nn.functional import normalize

from core.batch import Batch
from core.errors import UserError
from core.kernels.codes import DenseCodes
from core.kernels.mean_square import normalised_mse
from core.methods.lca import LCA, Rule, lca_codes
from core.methods.saved import load_dictionary, save_dictionary
from core.synthetic.planted import PlantedEntities

SETTINGS: dict[str, Any] = {
    "d_model": 64,
    "dict_size": 96,
    "l1": 0.1,
    "rule": "objective",
    "dictionary_gradient": "converged",
    "n_iterations": 40,
    "n_iterations_inference": 60,
    "tolerance": 1e-6,
    "rows_per_step": 64,
    "rows_at_once": 1000,
    "lr": 3e-3,
    "betas": [0.9, 0.999],
    "input_norm": "none",
    "seed": 0,
    "decoder_norm": "after_step",
    "dead_after_tokens": 640,
    "grad_clip": 1e5,
    "b_dec_init": "zeros",
    "warmup_steps": 0,
    "decay_fraction": 0.0,
}


def build(**changes: Any) -> LCA:
    return LCA(**(SETTINGS | changes))


def batches(seed: int = 0) -> Iterator[Batch]:
    return PlantedEntities(seed=0).batches(128, seed, "train")


def problem(m: int = 32, d: int = 16, n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows made of few atoms `[n, d]`, and the atoms `[m, d]`, in fp64."""
    random = torch.Generator().manual_seed(seed)
    D = normalize(torch.randn(m, d, generator=random, dtype=torch.float64), dim=1)
    active = torch.rand(n, m, generator=random) < 0.15
    return (active * torch.randn(n, m, generator=random, dtype=torch.float64).abs() * 3) @ D, D


def lasso(x: Tensor, D: Tensor, l1: float) -> np.ndarray:
    """The nonnegative LASSO by scikit-learn: |x - a D|^2 / (2 d) + alpha sum a, alpha = l1 / d."""
    model = Lasso(alpha=l1 / D.shape[1], positive=True, fit_intercept=False, tol=1e-12, max_iter=100_000)
    return np.stack([model.fit(D.T.numpy(), row.numpy()).coef_ for row in x])


def objective(a: Tensor | np.ndarray, x: Tensor, D: Tensor, l1: float) -> Tensor:
    codes = torch.as_tensor(a)
    return (x - codes @ D).square().sum(1) / 2 + l1 * codes.sum(1)


@pytest.mark.parametrize("l1", [0.05, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_fixed_point_is_the_solution_of_the_lasso(l1: float, seed: int):
    x, D = problem(seed=seed)
    found = lca_codes(x, D, l1, 2000, 1e-9, "objective")
    np.testing.assert_allclose(found, lasso(x, D, l1), atol=1e-5)


def test_every_iteration_lowers_the_objective():
    x, D = problem()
    values = torch.stack([objective(lca_codes(x, D, 0.1, n, 0.0, "objective"), x, D, 0.1) for n in range(0, 60, 6)])
    assert (values.diff(dim=0) <= 0).all() and (values[-1] < 0.3 * values[0]).all()


def test_two_iterations_by_hand():
    """One atom e_1 in R^2, x = (2, 1), l1 = 0.5, m = 1, so the first step is 1. du = -2 + 0.5 = -1.5; trials 0.75 and
    3; F = (1.25^2 + 1) / 2 + 0.375 = 1.65625 and (1 + 1) / 2 + 1.5 = 2.5: 0.75 it is, the step 0.5. du = -0.75; trials
    0.75 + 0.1875 and 0.75 + 0.75; the second is the minimum, 2 - 0.5."""
    x, D = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert lca_codes(x, D, 0.5, 1, 0.0, "objective") == 0.75
    assert lca_codes(x, D, 0.5, 2, 0.0, "objective") == 1.5
    assert lca_codes(x, D, 0.5, 50, 1e-7, "objective") == 1.5


def test_the_authors_rule_by_hand():
    """The same problem with d 2 and m 1: cost |x - a D|^2 / 2 + 0.5 a, so 0.75 costs 1.28 + 0.375 and 3 costs 2.5.
    Below zero u goes on falling where a latent is of no use, and the others' codes do not notice."""
    x, D = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert lca_codes(x, D, 0.5, 1, 0.0, "authors_compat") == 0.75
    x, D = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    codes = lca_codes(x, D, 0.5, 200, 1e-9, "authors_compat")
    torch.testing.assert_close(codes, torch.tensor([[1.5, 0.0]]), atol=1e-3, rtol=0)


def test_the_authors_rule_can_stop_far_from_the_minimum():
    x, D = problem(m=64, d=24)
    best = objective(lasso(x, D, 0.1), x, D, 0.1)
    for rule, n, far in (("objective", 3000, False), ("authors_compat", 20_000, True)):
        gap = objective(lca_codes(x, D, 0.1, n, 1e-6, rule), x, D, 0.1) / best - 1
        assert bool(gap.max() > 0.02) == far, rule
        assert gap.min() > -1e-9


def test_a_rows_code_depends_on_its_batch_only_under_the_authors_rule():
    x, D = problem(n=40)

    def differ(rule: Rule) -> bool:
        together = lca_codes(x, D, 0.1, 300, 1e-4, rule)
        alone = torch.cat([lca_codes(row, D, 0.1, 300, 1e-4, rule) for row in x.split(1)])
        return not torch.allclose(together, alone, atol=1e-9)

    assert not differ("objective") and differ("authors_compat")


def test_a_batch_taken_in_parts_gives_the_same_codes():
    method = build(rows_at_once=50).eval()
    x = next(batches()).x
    torch.testing.assert_close(method.encode(x).dense(), build().eval().encode(x).dense(), atol=1e-4, rtol=1e-4)


def test_the_dictionarys_gradient_is_that_of_the_loss_at_fixed_codes():
    method = build()
    x = next(batches()).x[:64]
    codes = method.encode(x)
    assert not codes.dense().requires_grad
    normalised_mse(x, method.decode(codes)).backward()
    a, D = codes.dense(), method.W_dec.detach()
    by_hand = 2 * a.T @ (a @ D - x) / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(method.W_dec.grad, by_hand, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", ["objective", "authors_compat"])
def test_the_unrolled_gradient_is_that_of_finite_differences(rule: str):
    method = build(d_model=8, dict_size=12, n_iterations=6, dictionary_gradient="unrolled", rule=rule, tolerance=0.0)
    method.double()
    x, _ = problem(m=12, d=8, n=5)

    def loss(W: Tensor) -> Tensor:
        method.W_dec.data = W
        return normalised_mse(x, method.decode(method.encode(x)))

    W, random = method.W_dec.data.clone(), torch.Generator().manual_seed(0)
    loss(W).backward()
    for _ in range(3):
        v = torch.randn(W.shape, generator=random, dtype=torch.float64) * 1e-6
        numerical = (loss(W + v) - loss(W - v)) / 2
        torch.testing.assert_close((method.W_dec.grad * v).sum(), numerical.detach(), rtol=1e-4, atol=0)
    assert not method.eval().encode(x).dense().requires_grad


def test_training_looks_at_the_first_rows_and_learns_the_dictionary():
    method = build(rows_per_step=64)
    optimizer = method.configure_optimizers()
    stream = list(islice(batches(), 30))
    steps = [method.update(batch, optimizer) for batch in stream]
    twin = build(rows_per_step=128)
    second = twin.configure_optimizers()
    for batch in stream:
        twin.update(Batch(batch.x[:64]), second)
    assert torch.equal(method.W_dec, twin.W_dec)
    assert steps[-1]["reconstruction"] < 0.8 * steps[0]["reconstruction"] and steps[-1]["l0"] < 48
    torch.testing.assert_close(method.W_dec.norm(dim=1), torch.ones(96))
    assert not method.b_dec.any() and set(dict(method.named_parameters())) == {"W_dec", "b_dec"}
    assert int(method.tokens_since_fired.max()) <= 30 * 64


def test_a_stored_dictionary_reconstructs_identically_and_a_resumed_one_has_the_same_bits(tmp_path: Path):
    stream = list(islice(batches(), 10))
    whole, half, resumed = build(), build(), build()
    optimizer = whole.configure_optimizers()
    for batch in stream:
        whole.update(batch, optimizer)
    optimizer = half.configure_optimizers()
    for batch in stream[:6]:
        half.update(batch, optimizer)
    resumed.load_state_dict(half.state_dict())
    second = resumed.configure_optimizers()
    second.load_state_dict(optimizer.state_dict())
    for batch in stream[6:]:
        resumed.update(batch, second)
    assert torch.equal(resumed.W_dec, whole.W_dec)
    assert json.loads(json.dumps(whole.hyperparameters())) == SETTINGS
    save_dictionary(whole, {}, tmp_path)
    x = next(batches(seed=4)).x
    assert torch.equal(load_dictionary(tmp_path).reconstruct(x), whole.eval().reconstruct(x))


def test_inference_has_a_number_of_iterations_of_its_own_and_evaluation_changes_nothing():
    method = build(n_iterations=1, n_iterations_inference=40)
    x = next(batches()).x
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    in_training, after = method.encode(x), method.eval().encode(x)
    assert isinstance(after, DenseCodes)
    errors = [float((x - method.decode(codes).detach()).square().sum()) for codes in (in_training, after)]
    assert errors[1] < 0.5 * errors[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"l1": -1.0}, "method.l1"),
        ({"rule": "authors"}, "method.rule.*authors_compat"),
        ({"dictionary_gradient": "implicit"}, "method.dictionary_gradient"),
        ({"n_iterations": 0}, "method.n_iterations"),
        ({"n_iterations_inference": 0}, "method.n_iterations_inference"),
        ({"tolerance": -1e-9}, "method.tolerance"),
        ({"rows_per_step": 0}, "method.rows_per_step"),
        ({"rows_at_once": 0}, "method.rows_at_once"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        build(**changes)
