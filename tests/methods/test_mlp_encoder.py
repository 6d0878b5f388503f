"""The MLP encoder and the SAE of O'Neill et al.: losses and gradients by hand, the axis slip, resampling."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from core.batch import Batch
from core.errors import UserError
from core.kernels.mean_square import normalised_mse
from core.methods.base import DictionaryMethod
from core.methods.mlp_encoder import MLPEncoder
from core.methods.relu_l1 import ReluL1
from core.methods.saved import load_dictionary, save_dictionary
from core.synthetic.planted import PlantedEntities

COMMON: dict[str, Any] = {
    "d_model": 64,
    "dict_size": 96,
    "l1_coefficient": 0.01,
    "resample_every": 0,
    "lr": 3e-3,
    "betas": [0.9, 0.999],
    "input_norm": "none",
    "seed": 0,
    "decoder_norm": "after_step",
    "dead_after_tokens": 4 * 128,
    "grad_clip": 1e5,
    "b_dec_init": "zeros",
    "warmup_steps": 0,
    "decay_fraction": 0.0,
    "path": "auto",
}
OWN: dict[type[DictionaryMethod], dict[str, Any]] = {
    MLPEncoder: {"hidden_per_latent": 0.5},
    ReluL1: {
        "l1_warmup_steps": 0,
        "reconstruction": "normalised_mse",
        "subtract_b_dec": False,
    },
}
BOTH = pytest.mark.parametrize("cls", list(OWN))


def build(cls: type[DictionaryMethod], **changes: Any) -> DictionaryMethod:
    return cls(**(COMMON | OWN[cls] | changes))


def batches(seed: int = 0) -> Iterator[Batch]:
    return PlantedEntities(seed=0).batches(128, seed, "train")


def train(method: DictionaryMethod, n_steps: int) -> list[dict[str, Tensor]]:
    optimizer = method.configure_optimizers()
    return [method.update(batch, optimizer) for batch in islice(batches(), n_steps)]


def test_the_normalised_error_is_1_for_the_mean_and_a_quarter_half_way_to_it():
    x = torch.tensor([[0.0, 4.0], [2.0, 0.0]])  # mean (1, 2): squares 1 + 4 + 1 + 4
    mean = x.mean(0).expand_as(x)
    assert normalised_mse(x, mean) == 1.0 and normalised_mse(x, x) == 0.0
    assert normalised_mse(x, (x + mean) / 2) == 0.25
    assert normalised_mse(3 * x, 3 * (x + mean) / 2) == 0.25


def test_both_losses_by_hand():
    """d 2, h 1, m 1: hidden ReLU(3 - 1) = 2 and 0; codes ReLU(2 * 2 - 1) = 3 and 0."""
    x = torch.tensor([[3.0, 2.0], [0.0, 1.0]])  # mean (1.5, 1.5): mean square (2.25 + .25 + 2.25 + .25) / 4 = 1.25
    mlp = build(MLPEncoder, d_model=2, dict_size=1, hidden_per_latent=1.0, l1_coefficient=0.5)
    sae = build(ReluL1, d_model=2, dict_size=1, l1_coefficient=0.5)
    with torch.no_grad():
        for method in (mlp, sae):
            method.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
            method.b_dec.copy_(torch.tensor([0.0, 1.0]))
            method.b_enc.fill_(-1.0)
        mlp.W_hid.copy_(torch.tensor([[1.0, 0.0]]))
        mlp.b_hid.fill_(-1.0)
        mlp.W_enc.fill_(2.0)
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0]]))
    terms = mlp.losses(x, mlp.encode(x))  # x_hat = (3, 1), (0, 1): error 1 of 4 entries
    assert terms["reconstruction"] == 0.25 / 1.25 and terms["l1"] == 0.5 * (3 + 0) / 2
    terms = sae.losses(x, sae.encode(x))  # codes 2, 0 (b_dec is not subtracted); x_hat = (2, 1), (0, 1): error 1 + 1
    assert terms["reconstruction"] == 0.5 / 1.25 and terms["l1"] == 0.5 * (2 + 0) / 2


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_a_step_of_the_mlp_equals_one_of_torchs_adam_on_plain_autograd(path: str):
    """After a first step, since Adam's first one forgets all but signs; the decoder's gradient is projected in both."""
    method = build(MLPEncoder, path=path)
    first, second = islice(batches(), 2)
    optimizer = method.configure_optimizers()
    twin = {name: p.detach().clone().requires_grad_() for name, p in method.named_parameters()}
    plain = torch.optim.Adam(twin.values(), lr=3e-3, betas=(0.9, 0.999))
    for batch in (first, second):
        method.update(batch, optimizer)
        x = batch.x
        hidden = linear(x, twin["W_hid"], twin["b_hid"]).relu()
        codes = linear(hidden, twin["W_enc"], twin["b_enc"]).relu()
        error = (codes @ twin["W_dec"] + twin["b_dec"] - x).square().mean()
        loss = error / (x - x.mean(0)).square().mean() + 0.01 * codes.sum(1).mean()
        plain.zero_grad()
        loss.backward()
        W, g = twin["W_dec"].detach(), twin["W_dec"].grad
        g -= (g * W).sum(1, keepdim=True) * W
        plain.step()
        twin["W_dec"].data = normalize(W, dim=1)
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter, twin[name], atol=1e-5, rtol=1e-4, msg=name)


@BOTH
@pytest.mark.parametrize("decoder_norm", ["after_step", "rows_compat"])
def test_the_axis_slip_normalises_coordinates_and_the_default_atoms(cls: type[DictionaryMethod], decoder_norm: str):
    method = build(cls, decoder_norm=decoder_norm)
    train(method, 3)
    atoms, coordinates = method.W_dec.detach().norm(dim=1), method.W_dec.detach().norm(dim=0)
    unit, free = (atoms, coordinates) if decoder_norm == "after_step" else (coordinates, atoms)
    torch.testing.assert_close(unit, torch.ones_like(unit))
    assert (free - 1).abs().max() > 0.05
    if decoder_norm == "rows_compat":
        torch.testing.assert_close(atoms.square().mean(), torch.tensor(64 / 96))


def test_the_axis_slip_leaves_the_gradient_whole_and_equals_the_authors_order_of_axes():
    """torch's Linear(m, d) has a weight [d, m]; normalising its dim 1 is the slip."""
    method = build(ReluL1, decoder_norm="rows_compat")
    [batch] = islice(batches(), 1)
    decoder = method.W_dec.detach().T.clone().requires_grad_()  # [d, m]
    codes = linear(batch.x, method.W_enc, method.b_enc).relu().detach()
    normalised_mse(batch.x, linear(codes, decoder)).backward()
    plain = torch.optim.Adam([decoder], lr=3e-3, betas=(0.9, 0.999))
    plain.step()
    method.update(batch, method.configure_optimizers())
    torch.testing.assert_close(method.W_dec.detach().T, normalize(decoder.detach(), dim=1), atol=1e-5, rtol=1e-4)


@BOTH
def test_dead_latents_start_anew_and_the_others_do_not_notice(cls: type[DictionaryMethod]):
    def one_step_after(resample_every: int) -> tuple[DictionaryMethod, Any]:
        method = build(cls, resample_every=resample_every, dead_after_tokens=3 * 128)
        with torch.no_grad():
            method.b_enc[:5] = -1e6  # these never fire
        optimizer = method.configure_optimizers()
        for batch in islice(batches(), 3):
            method.update(batch, optimizer)
        return method, optimizer

    plain, _ = one_step_after(0)
    method, optimizer = one_step_after(3)
    dead = plain.dead
    assert dead[:5].all() and not dead.all() and not method.dead.any()
    for name in ("W_dec", "W_enc", "b_enc"):
        parameter = getattr(method, name)
        assert torch.equal(parameter[~dead], getattr(plain, name)[~dead]), name
        state = optimizer.state[parameter]
        assert not state["exp_avg"][dead].any() and not state["exp_avg_sq"][dead].any()
        assert state["exp_avg"][~dead].any() and state["step"] == 3
    torch.testing.assert_close(method.W_dec[dead].norm(dim=1), torch.ones(int(dead.sum())))
    torch.testing.assert_close(method.W_enc[dead].norm(dim=1), torch.full((int(dead.sum()),), 0.2))
    assert not method.b_enc[dead].any() and not method.tokens_since_fired[dead].any()
    if cls is ReluL1:
        torch.testing.assert_close(method.W_enc[dead], 0.2 * method.W_dec[dead])
    assert not torch.allclose(method.W_dec[0], method.W_dec[1])


@BOTH
def test_resampling_comes_at_its_steps_only_and_with_other_vectors_each_time(cls: type[DictionaryMethod]):
    method = build(cls, resample_every=4, dead_after_tokens=128)
    optimizer = method.configure_optimizers()
    seen = []
    for step, batch in enumerate(islice(batches(), 9), 1):
        with torch.no_grad():
            method.b_enc[0] = -1e6
        before = method.W_dec[0].detach().clone()
        method.update(batch, optimizer)
        if not torch.equal(before, method.W_dec[0]):
            seen.append((step, method.W_dec[0].detach().clone()))
    assert [step for step, _ in seen] == [4, 8]
    assert not torch.allclose(seen[0][1], seen[1][1])


@BOTH
def test_a_training_that_resamples_goes_on_from_a_checkpoint_to_the_same_bits(cls: type[DictionaryMethod]):
    whole, half, resumed = (build(cls, resample_every=3, dead_after_tokens=128, l1_coefficient=0.3) for _ in range(3))
    with torch.no_grad():
        for method in (whole, half, resumed):
            method.b_enc[:5] = -1e6
    stream = list(islice(batches(), 12))
    optimizer = whole.configure_optimizers()
    n_dead = [float(whole.update(batch, optimizer)["n_dead"]) for batch in stream]
    assert any(n > 0 for n in n_dead[2::3])
    optimizer = half.configure_optimizers()
    for batch in stream[:7]:
        half.update(batch, optimizer)
    resumed.load_state_dict(half.state_dict())
    resumed.n_updates = half.n_updates
    second = resumed.configure_optimizers()
    second.load_state_dict(optimizer.state_dict())
    for batch in stream[7:]:
        resumed.update(batch, second)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@BOTH
def test_training_lowers_the_loss_and_a_stored_dictionary_reconstructs_identically(
    cls: type[DictionaryMethod], tmp_path: Path
):
    method = build(cls, seed=3)
    steps = train(method, 100)
    assert steps[-1]["reconstruction"] < 0.5 * steps[0]["reconstruction"]
    arguments = json.loads(json.dumps(method.hyperparameters()))
    assert set(arguments) == set(COMMON | OWN[cls])
    save_dictionary(method, {}, tmp_path)
    x = next(batches(seed=7)).x
    assert torch.equal(load_dictionary(tmp_path).reconstruct(x), method.eval().reconstruct(x))


def test_the_mlp_has_the_papers_shapes_and_torchs_initialisation():
    method = build(MLPEncoder, d_model=768, dict_size=1024)
    assert method.W_hid.shape == (512, 768) and method.W_enc.shape == (1024, 512) and method.W_dec.shape == (1024, 768)
    for W in (method.W_hid, method.W_enc):
        bound = W.shape[1] ** -0.5
        assert W.abs().max() <= bound and abs(W.std() - bound / 3**0.5) < 0.01 * bound
    assert not method.b_hid.any() and not method.b_enc.any()


def test_mlps_of_two_sizes_with_one_seed_share_no_row():
    small, large, again = (build(MLPEncoder, dict_size=m) for m in (32, 64, 32))
    assert torch.equal(small.W_hid, again.W_hid) and torch.equal(small.W_enc, again.W_enc)
    hidden = normalize(small.W_hid, dim=1) @ normalize(large.W_hid, dim=1).T
    assert hidden.abs().max() < 0.7 and (small.W_dec @ large.W_dec.T).abs().max() < 0.7


@pytest.mark.parametrize(
    ("cls", "changes", "named"),
    [
        (MLPEncoder, {"hidden_per_latent": 0.0}, "method.hidden_per_latent"),
        (MLPEncoder, {"l1_coefficient": -1}, "method.l1_coefficient"),
        (MLPEncoder, {"resample_every": -1}, "method.resample_every"),
        (MLPEncoder, {"path": "fast"}, "method.path"),
        (MLPEncoder, {"decoder_norm": "rows"}, "method.decoder_norm.*rows_compat"),
        (ReluL1, {"reconstruction": "mse"}, "method.reconstruction"),
        (ReluL1, {"resample_every": -1}, "method.resample_every"),
    ],
)
def test_a_bad_setting_is_named(cls: type[DictionaryMethod], changes: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        build(cls, **changes)
