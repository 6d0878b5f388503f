"""The AuxK loss by hand, and which of its variants bring dead latents back."""

import pytest
import torch
from torch import Tensor

from core.methods.auxiliary import aux_loss

D, M = 6, 10


def problem() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(M, D, generator=g)
    return {
        "x": torch.randn(20, D, generator=g),
        "x_hat": torch.randn(20, D, generator=g).requires_grad_(),
        "dead": torch.arange(M) >= 7,
        "W_enc": W.clone().requires_grad_(),
        "b_dec": torch.randn(D, generator=g),
        "W_dec": W.clone().requires_grad_(),
    }


def by_hand(p: dict[str, Tensor], k: int, error: Tensor) -> Tensor:
    z = ((p["x"] - p["b_dec"]) @ p["W_enc"].T).relu() * p["dead"]
    kept = z * (z >= z.topk(k, dim=1).values[:, -1:])
    return (error - kept @ p["W_dec"]).square().mean()


@pytest.mark.parametrize("k_aux", [1, 2, 512])
def test_r1_is_the_mean_squared_rest_that_dead_latents_leave(k_aux: int):
    p = problem()
    loss = aux_loss("r1", k_aux=k_aux, b_enc=None, **p)
    torch.testing.assert_close(loss, by_hand(p, min(k_aux, 3), p["x"] - p["x_hat"]))


def test_normalized_divides_by_the_variance_of_the_error_and_detaches_it():
    p = problem()
    loss = aux_loss("normalized", k_aux=2, b_enc=None, **p)
    e = p["x"] - p["x_hat"].detach()
    torch.testing.assert_close(loss, by_hand(p, 2, e) / e.var(0, correction=0).mean())
    loss.backward()
    assert p["x_hat"].grad is None


def test_r1_keeps_the_gradient_of_the_error():
    p = problem()
    aux_loss("r1", k_aux=2, b_enc=None, **p).backward()
    assert p["x_hat"].grad.any()


@pytest.mark.parametrize(("kind", "revives"), [("r1", True), ("normalized", True), ("r2_compat", False)])
def test_dead_latents_get_a_gradient_from_all_variants_but_r2_compat(kind: str, revives: bool):
    p = problem()
    aux_loss(kind, k_aux=3, b_enc=None, **p).backward()
    for name in ("W_enc", "W_dec"):
        gradient = p[name].grad
        assert (gradient is not None and bool(gradient[p["dead"]].any())) == revives
        assert gradient is None or not gradient[~p["dead"]].any()


def test_r2_compat_adds_the_squared_error_while_a_latent_is_dead():
    p = problem()
    torch.testing.assert_close(aux_loss("r2_compat", k_aux=3, b_enc=None, **p), (p["x"] - p["x_hat"]).square().mean())


@pytest.mark.parametrize("kind", ["r1", "normalized", "r2_compat", "none"])
def test_without_dead_latents_the_term_is_zero(kind: str):
    p = problem() | {"dead": torch.zeros(M, dtype=torch.bool)}
    assert aux_loss(kind, k_aux=3, b_enc=None, **p) == 0
