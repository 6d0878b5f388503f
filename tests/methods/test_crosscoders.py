"""Crosscoders of two models, against values worked by hand and dense autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from core.batch import Batch
from core.errors import UserError
from core.kernels.codes import DenseCodes
from core.methods.crosscoder import BatchTopKCrosscoder, L1Crosscoder, error_of, latent_sizes

D, M, B = 5, 12, 32
COMMON: dict[str, Any] = {
    "d_model": D, "n_models": 2, "dict_size": M, "lr": 1e-3, "betas": [0.9, 0.999], "input_norm": "none", "seed": 3,
    "b_dec_init": "zeros",
    "decoder_norm": "none", "dead_after_tokens": 1000, "grad_clip": 1.0, "warmup_steps": 0, "decay_fraction": 0.0,
    "initial_norm": 0.5, "error": "norm", "code_norm": "sum", "path": "auto",
}  # fmt: skip
L1 = COMMON | {"l1_coefficient": 0.1, "l1_warmup_steps": 0}
BTK = COMMON | {
    "k": 1.5, "aux_coefficient": 0.03125, "k_aux": 4, "threshold_rule": "ema", "threshold_ema_rate": 0.1,
    "threshold_start": 0.0,
}  # fmt: skip


def rows(seed: int, n: int = B) -> Tensor:
    return torch.randn(n, 2, D, generator=torch.Generator().manual_seed(seed))


def with_random_weights(method: Any, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return method


def by_hand(method: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU pre-activations and v, `[B, m]` each."""
    f = (torch.einsum("bnd,mnd->bm", x, method.W_enc) + method.b_enc).relu()
    return f, f * latent_sizes(method.W_dec.detach(), method.settings.code_norm)


@pytest.mark.parametrize(("kind", "settings"), [(L1Crosscoder, L1), (BatchTopKCrosscoder, BTK)])
def test_both_models_start_with_the_same_rows_of_the_initial_norm(kind: Any, settings: dict[str, Any]):
    method = kind(**settings)
    assert torch.equal(method.W_enc[:, 0], method.W_enc[:, 1]) and torch.equal(method.W_enc, method.W_dec)
    torch.testing.assert_close(method.W_dec.norm(dim=2), torch.full((M, 2), 0.5))
    assert not method.b_enc.any() and method.b_dec.shape == (2, D)


def test_the_size_of_a_decoder_by_hand():
    """Rows (3, 4) and (0, 12): norms 5 and 12, together 13."""
    W = torch.tensor([[[3.0, 4.0], [0.0, 12.0]]])
    sizes = {"sum": 17.0, "joint": 13.0, "mixed": 14.7, "none": 1.0}
    for code_norm, size in sizes.items():
        assert latent_sizes(W, code_norm).tolist() == pytest.approx([size])


def test_the_error_is_the_mean_over_models_of_a_norm_or_of_its_square():
    x = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    assert float(error_of(x, torch.zeros(1, 2, 2), "norm")) == pytest.approx(3.0)
    assert float(error_of(x, torch.zeros(1, 2, 2), "squared")) == pytest.approx(13.0)


def test_an_error_of_zero_has_a_gradient_of_zero():
    x = torch.ones(3, 2, 4, requires_grad=True)
    error_of(x, torch.ones(3, 2, 4), "norm").backward()
    assert not x.grad.any()


@pytest.mark.parametrize("code_norm", ["sum", "joint", "mixed", "none"])
def test_the_l1_loss_equals_dense_autograd(code_norm: str):
    method = with_random_weights(L1Crosscoder(**(L1 | {"code_norm": code_norm})))
    x = rows(0)
    sum(method.losses(x, method.encode(x)).values()).backward()
    sparse = {name: parameter.grad.clone() for name, parameter in method.named_parameters()}
    method.zero_grad()
    f = (torch.einsum("bnd,mnd->bm", x, method.W_enc) + method.b_enc).relu()
    x_hat = torch.einsum("bm,mnd->bnd", f, method.W_dec) + method.b_dec
    loss = (x - x_hat).norm(dim=2).sum(1).mean() / 2 + 0.1 * (f * latent_sizes(method.W_dec, code_norm)).sum(1).mean()
    loss.backward()
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(sparse[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("code_norm", ["sum", "joint", "mixed", "none"])
def test_batchtopk_keeps_the_largest_scaled_activations_of_the_batch(code_norm: str, path: str):
    method = with_random_weights(BatchTopKCrosscoder(**(BTK | {"code_norm": code_norm, "path": path})))
    x = rows(1)
    f, v = by_hand(method, x)
    kept = v >= v.flatten().topk(round(1.5 * B)).values[-1]
    codes = method.encode(x).dense()
    torch.testing.assert_close(codes, f.where(kept, 0))
    x_hat = torch.einsum("bm,mnd->bnd", f.where(kept, 0), method.W_dec) + method.b_dec
    expected = torch.autograd.grad((x - x_hat).norm(dim=2).mean(), [method.W_enc, method.W_dec, method.b_enc])
    actual = torch.autograd.grad(
        method.losses(x, method.encode(x))["reconstruction"], [method.W_enc, method.W_dec, method.b_enc]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_auxiliary_loss_by_hand():
    """All latents dead: the k_aux largest v of each row explain the error, without biases."""
    method = with_random_weights(BatchTopKCrosscoder(**BTK))
    x = rows(2)
    x_hat = method.decode(method.encode(x)).detach()
    assert float(method.aux_loss(x, x_hat)) == 0.0  # no latent is dead
    method.tokens_since_fired.fill_(1000)
    f, v = by_hand(method, x)
    f = f.where(v >= v.topk(4, dim=1).values[:, -1:], 0)
    e = x - x_hat
    left = (e - torch.einsum("bm,mnd->bnd", f, method.W_dec)).square().sum((1, 2)).mean()
    expected = left / (e - e.mean(0)).square().sum((1, 2)).mean()
    torch.testing.assert_close(method.aux_loss(x, x_hat), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("b_dec_init", ["zeros", "mean", "geometric_median"])
@pytest.mark.parametrize(("kind", "settings"), [(L1Crosscoder, L1), (BatchTopKCrosscoder, BTK)])
def test_a_batch_of_identical_rows_has_a_finite_loss(kind: Any, settings: dict[str, Any], b_dec_init: str):
    method = with_random_weights(kind(**(settings | {"b_dec_init": b_dec_init})))
    method.tokens_since_fired.fill_(1000)
    x = rows(3, 1).expand(8, 2, D)
    method.n_steps = 1
    assert torch.isfinite(method.update(Batch(x), method.configure_optimizers())["loss"])
    assert all(parameter.isfinite().all() for parameter in method.parameters())
    if b_dec_init != "zeros":
        torch.testing.assert_close(method.b_dec.data, x[0], rtol=0, atol=2e-3)  # but for one step of Adam


def test_a_matched_threshold_has_k_active_latents_per_row_on_its_batches():
    method = with_random_weights(BatchTopKCrosscoder(**(BTK | {"threshold_rule": "matched_l0"})))
    batches = [Batch(rows(seed)) for seed in range(10, 14)]
    method.eval()
    method.finish(batches)
    x = torch.cat([batch.x for batch in batches])
    assert float(method.encode(x).l0()) == pytest.approx(1.5)
    f, v = by_hand(method, x)
    torch.testing.assert_close(method.encode(x).dense(), f.where(v > method.threshold, 0))


def test_the_moving_average_starts_at_its_share_of_the_training_and_averages_the_smallest_kept():
    method = BatchTopKCrosscoder(**(BTK | {"threshold_start": 0.5, "lr": 1e-9}))
    method.n_steps = 4
    optimizer, smallest = method.configure_optimizers(), []
    for step in range(4):
        v = by_hand(method, rows(step))[1].detach()
        smallest.append(float(v.flatten().topk(round(1.5 * B)).values[-1]))
        method.update(Batch(rows(step)), optimizer)
        assert method.threshold.isnan() == (step < 2)
    assert float(method.threshold) == pytest.approx(0.9 * smallest[2] + 0.1 * smallest[3], rel=1e-4)


def test_a_threshold_that_was_never_measured_is_named():
    with pytest.raises(UserError, match="threshold was never measured"):
        BatchTopKCrosscoder(**BTK).eval().encode(rows(0))
    with pytest.raises(UserError, match=r"stream\.calibration_batches"):
        BatchTopKCrosscoder(**(BTK | {"threshold_rule": "matched_l0"})).finish([])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"decoder_norm": "after_step"}, "Set it to none"), ({"k": 13.0}, "dict_size = 12"), ({"k": 0}, "be positive")],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        BatchTopKCrosscoder(**(BTK | change))


def test_codes_are_dense_or_sparse_by_path_alone():
    x = rows(5)
    dense = with_random_weights(BatchTopKCrosscoder(**(BTK | {"path": "dense"}))).encode(x)
    sparse = with_random_weights(BatchTopKCrosscoder(**(BTK | {"path": "sparse"}))).encode(x)
    assert isinstance(dense, DenseCodes) and not isinstance(sparse, DenseCodes)
    torch.testing.assert_close(dense.dense(), sparse.dense())
