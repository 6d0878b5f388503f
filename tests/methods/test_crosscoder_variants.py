"""Variants of crosscoders, against the plain ones, explicit shared parameters, and losses by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.analysis.latent_scaling import LatentScaling
from core.batch import Batch
from core.errors import UserError
from core.methods.crosscoder import BatchTopKCrosscoder, latent_sizes
from core.methods.crosscoder_variants import BridgeCrosscoder, DedicatedCrosscoder, TiedCrosscoder
from core.seeding import generator
from core.synthetic.planted_pair import PlantedPair
from tests.methods.test_crosscoders import BTK, L1, D, M, rows, with_random_weights

SQUARED = BTK | {"error": "squared", "k": 3.0}
DEDICATED = BTK | {"base_share": 0.25, "chat_share": 0.5, "k": 3.0}  # 3 and 6 of 12 latents
TIED = L1 | {"tied_share": 0.5, "tied_penalty": 0.2, "grad_clip": 1e5}


def gradients(method: Any, x: Tensor) -> list[Tensor]:
    method.zero_grad()
    sum(method.losses(x, method.encode(x)).values()).backward()
    return [parameter.grad.clone() for parameter in method.parameters()]


@pytest.mark.parametrize("n_dead", [0, M])
def test_a_bridge_of_0_is_the_crosscoder(n_dead: int):
    plain = with_random_weights(BatchTopKCrosscoder(**SQUARED))
    bridge = with_random_weights(BridgeCrosscoder(**SQUARED, bridge=0.0))
    for method in (plain, bridge):
        method.tokens_since_fired[:n_dead] = 1000
    torch.testing.assert_close(gradients(bridge, rows(0)), gradients(plain, rows(0)))


def test_the_bridges_loss_by_hand():
    """Errors (1, 2) and (3, -1): squares 5 and 10, product 1. Bridge -0.5: (5 + 10 - 1) / 2; -1: (5 + 10 - 2) / 2, half
    the square of their difference (2, -3)."""
    e = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    for bridge, expected in ((0.0, 7.5), (-0.5, 7.0), (-1.0, 6.5)):
        method = BridgeCrosscoder(**SQUARED, bridge=bridge)
        assert float(method.square(e)) / 2 == pytest.approx(expected)
    assert 6.5 == (2**2 + 3**2) / 2


def test_a_bridge_of_minus_1_does_not_see_what_both_models_have():
    method = with_random_weights(BridgeCrosscoder(**SQUARED, bridge=-1.0))
    x = rows(1)
    codes, common = method.encode(x), rows(2)[:, :1]
    here, there = method.losses(x, codes), method.losses(x + common, codes)
    torch.testing.assert_close(here["reconstruction"], there["reconstruction"], rtol=1e-4, atol=1e-5)


def test_latents_of_one_model_never_get_weights_in_the_other():
    method = DedicatedCrosscoder(**(DEDICATED | {"lr": 1e-2}))
    method.n_steps = 5
    optimizer = method.configure_optimizers()
    start = method.W_dec.detach().clone()
    for step in range(5):
        method.update(Batch(rows(step)), optimizer)
    for W in (method.W_enc, method.W_dec):
        assert not W[:3, 1].any() and not W[3:9, 0].any()
        assert W[:3, 0].any() and W[3:9, 1].any() and W[9:].any()
    assert not torch.equal(method.W_dec, start)
    full = gradients(with_random_weights(BatchTopKCrosscoder(**(BTK | {"k": 3.0}))), rows(0))
    own = gradients(
        with_random_weights(DedicatedCrosscoder(**DEDICATED)), rows(0)
    )  # the same weights, also where masked
    for a, b in zip(full[:2], own[:2], strict=True):
        torch.testing.assert_close(b, a * method.mask())


@pytest.mark.parametrize("error", ["norm", "squared"])
def test_tied_latents_learn_as_one_decoder_would(error: str):
    """Beside a crosscoder whose first 6 decoders are one parameter, with dense products and autograd."""
    method = TiedCrosscoder(**(TIED | {"error": error, "lr": 1e-2}))
    method.n_steps = 8
    tied = nn.Parameter(method.W_dec[:6, 0].detach().clone())
    free = nn.Parameter(method.W_dec[6:].detach().clone())
    W_enc, b_enc, b_dec = (nn.Parameter(p.detach().clone()) for p in (method.W_enc, method.b_enc, method.b_dec))
    other = torch.optim.Adam([tied, free, W_enc, b_enc, b_dec], lr=1e-2, betas=(0.9, 0.999))
    own = method.configure_optimizers()
    for step in range(8):
        x = rows(step)
        W_dec = torch.cat([tied[:, None].expand(6, 2, D), free])
        f = (torch.einsum("bnd,mnd->bm", x, W_enc) + b_enc).relu()
        e = (x - torch.einsum("bm,mnd->bnd", f, W_dec) - b_dec).square().sum(2)
        v = f * latent_sizes(W_dec, "sum")
        penalty = 0.1 * (0.2 * v[:, :6].sum(1) + v[:, 6:].sum(1)).mean()
        other.zero_grad()
        ((e.sqrt() if error == "norm" else e).mean() + penalty).backward()
        other.step()
        method.update(Batch(x), own)
    assert torch.equal(method.W_dec[:6, 0], method.W_dec[:6, 1])
    assert not torch.equal(method.W_dec[6:, 0], method.W_dec[6:, 1])
    torch.testing.assert_close(method.W_dec[:6, 0], tied, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(method.W_dec[6:], free, rtol=1e-3, atol=1e-4)


def test_of_a_model_beside_itself_latents_of_one_model_are_in_the_other_too():
    """Blocks for one model alone are filled with what both have. Latent Scaling sees it: nu is near 1."""
    pair = PlantedPair(24, {"shared": 12}, 0.1, 1.0, 1.0, 0.05, seed=0)
    settings = DEDICATED | {"d_model": 24, "k": 1.2, "lr": 1e-2, "base_share": 0.5, "chat_share": 0.5}
    method = DedicatedCrosscoder(**(settings | {"dict_size": 24, "initial_norm": 1.0}))
    method.n_steps = 300
    optimizer = method.configure_optimizers()
    for step in range(300):
        method.update(pair.rows(128, generator(0, "rows", step)), optimizer)
    method.eval()
    x = pair.rows(4000, generator(0, "heldout")).x
    sums = LatentScaling(method)
    sums.add(x, method.encode(x))
    for probe, block in (("base", slice(0, 12)), ("chat", slice(12, 24))):
        result = sums.result(probe)  # type: ignore[arg-type]
        nu = result.nu("activation")[block][result.n_active[block] >= 100]
        assert len(nu) >= 4 and float(nu.median()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (BridgeCrosscoder, BTK | {"bridge": -0.5}, "method.error: 'norm' will not do with method.bridge"),
        (BridgeCrosscoder, SQUARED | {"bridge": -1.5}, "method.bridge: -1.5 must lie between -1 and 1"),
        (
            BridgeCrosscoder,
            SQUARED | {"bridge": 0.0, "n_models": 3},
            "method.n_models: this crosscoder compares 2 models",
        ),
        (DedicatedCrosscoder, DEDICATED | {"chat_share": 0.8}, r"method.base_share \+ method.chat_share: 0.25 \+ 0.8"),
        (TiedCrosscoder, TIED | {"n_models": 3}, "method.n_models"),
    ],
)
def test_settings_that_do_not_fit_are_named(kind: Any, settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        kind(**settings)
