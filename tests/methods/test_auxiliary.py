"""The AuxK loss by hand, and which of its variants bring dead latents back."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from core.methods.auxiliary import aux_loss
from core.methods.topk import TopK

D, M = 6, 10
SETTINGS = {
    "d_model": D,
    "dict_size": M,
    "k": 2,
    "use_enc_bias": False,
    "enc_init_norm": None,
    "aux_coefficient": 1 / 32,
    "lr": 1e-3,
    "betas": [0.9, 0.999],
    "input_norm": "none",
    "seed": 0,
    "decoder_norm": "none",
    "dead_after_tokens": 100,
    "grad_clip": 1.0,
    "b_dec_init": "zeros",
    "warmup_steps": 0,
    "decay_fraction": 0.0,
    "path": "auto",
}


class Problem(NamedTuple):
    """A dictionary whose last three latents are dead, and activations with a reconstruction."""

    method: TopK
    x: Tensor
    x_hat: Tensor

    def loss(self) -> Tensor:
        return aux_loss(self.method, self.x, self.x_hat)

    def by_hand(self, k: int, error: Tensor) -> Tensor:
        m = self.method
        z = ((self.x - m.b_dec) @ m.W_enc.T + (m.b_enc if m.settings.use_enc_bias else 0)).relu() * m.dead
        kept = z * (z >= z.topk(k, dim=1).values[:, -1:])
        return (error - kept @ m.W_dec).square().mean()


def problem(aux: str, k_aux: int | None = 3, **changed: bool) -> Problem:
    g, method = torch.Generator().manual_seed(0), TopK(aux=aux, k_aux=k_aux, **SETTINGS | changed)
    W, x, x_hat = (torch.randn(n, D, generator=g) for n in (M, 20, 20))
    with torch.no_grad():
        for parameter, value in ((method.W_enc, W), (method.W_dec, W), (method.b_dec, torch.randn(D, generator=g))):
            parameter.copy_(value)
        method.b_enc.copy_(torch.randn(M, generator=g))
    method.tokens_since_fired[7:] = 100
    return Problem(method, x, x_hat.requires_grad_())


@pytest.mark.parametrize("use_enc_bias", [False, True])
@pytest.mark.parametrize("k_aux", [1, 2, 512, None])
def test_r1_is_the_mean_squared_rest_that_dead_latents_leave(k_aux: int | None, use_enc_bias: bool):
    p = problem("r1", k_aux, use_enc_bias=use_enc_bias)
    torch.testing.assert_close(p.loss(), p.by_hand(min(k_aux or D // 2, 3), p.x - p.x_hat))


def test_normalized_divides_by_the_variance_of_the_error_and_detaches_it():
    p = problem("normalized", 2)
    loss, e = p.loss(), p.x - p.x_hat.detach()
    torch.testing.assert_close(loss, p.by_hand(2, e) / e.var(0, correction=0).mean())
    loss.backward()
    assert p.x_hat.grad is None


def test_r1_keeps_the_gradient_of_the_error():
    p = problem("r1", 2)
    p.loss().backward()
    assert p.x_hat.grad.any()


@pytest.mark.parametrize(("kind", "revives"), [("r1", True), ("normalized", True), ("r2_compat", False)])
def test_dead_latents_get_a_gradient_from_all_variants_but_r2_compat(kind: str, revives: bool):
    p = problem(kind)
    p.loss().backward()
    for gradient in (p.method.W_enc.grad, p.method.W_dec.grad):
        assert (gradient is not None and bool(gradient[p.method.dead].any())) == revives
        assert gradient is None or not gradient[~p.method.dead].any()


def test_r2_compat_adds_the_squared_error_while_a_latent_is_dead():
    p = problem("r2_compat")
    torch.testing.assert_close(p.loss(), (p.x - p.x_hat).square().mean())


@pytest.mark.parametrize("kind", ["r1", "normalized", "r2_compat", "none"])
def test_without_dead_latents_the_term_is_zero(kind: str):
    p = problem(kind)
    p.method.tokens_since_fired.zero_()
    assert p.loss() == 0
