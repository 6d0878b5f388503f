"""What holds for every method, and for each of the k-sparse ones, on planted data."""

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from core.batch import Batch
from core.errors import NonFiniteLoss, UserError
from core.methods.base import DictionaryMethod
from core.methods.batchtopk import BatchTopK
from core.methods.jumprelu import JumpReLU
from core.methods.relu_l1 import ReluL1
from core.methods.topk import TopK
from core.synthetic.planted import PlantedEntities

COMMON: dict[str, Any] = {
    "d_model": 64,
    "dict_size": 96,
    "lr": 3e-3,
    "betas": [0.9, 0.99],
    "input_norm": "token_std",
    "seed": 0,
    "decoder_norm": "before_step",
    "dead_after_tokens": 5 * 128,
    "grad_clip": 1e5,
    "b_dec_init": "zeros",
    "warmup_steps": 0,
    "decay_fraction": 0.0,
}
AUX: dict[str, Any] = {
    "k": 4,
    "use_enc_bias": False,
    "enc_init_norm": None,
    "aux": "r1",
    "aux_coefficient": 1 / 32,
    "k_aux": 16,
    "path": "auto",
}
OWN: dict[type[DictionaryMethod], dict[str, Any]] = {
    TopK: AUX,
    BatchTopK: AUX | {"threshold_rule": "posthoc_mean", "threshold_ema_rate": 0.01},
    JumpReLU: {
        "l0_coefficient": 0.01,
        "l0_warmup_steps": 10,
        "bandwidth": 0.1,
        "ste": "correct",
        "initial_threshold": 0.5,
        "subtract_b_dec": True,
        "lr_threshold": 0.03,
        "path": "auto",
    },
    ReluL1: {
        "l1_coefficient": 0.5,
        "l1_warmup_steps": 10,
        "reconstruction": "squared_error",
        "subtract_b_dec": True,
        "b_dec_init": "geometric_median",
        "resample_every": 0,
        "path": "auto",
    },
}


METHODS = pytest.mark.parametrize("cls", list(OWN))
K_SPARSE = pytest.mark.parametrize("cls", [TopK, BatchTopK])


def build(cls: type[DictionaryMethod], **changes: Any) -> DictionaryMethod:
    return cls(**(COMMON | OWN[cls] | changes))


def batches(seed: int = 0, n_rows: int = 128) -> Iterator[Batch]:
    return PlantedEntities(seed=0).batches(n_rows, seed, "train")


def train(method: DictionaryMethod, n_steps: int = 60) -> list[dict[str, Tensor]]:
    optimizer = method.configure_optimizers()
    steps = [method.update(batch, optimizer) for batch in islice(batches(), n_steps)]
    method.finish(islice(batches(seed=1), 20))
    return steps


def heldout(n: int = 500) -> Tensor:
    return next(batches(seed=2, n_rows=n)).x


@METHODS
def test_training_lowers_the_loss_and_reports_finite_scalars(cls: type[DictionaryMethod]):
    steps = train(build(cls), 100)
    assert steps[-1]["reconstruction"] < 0.5 * steps[0]["reconstruction"]
    for name, value in steps[-1].items():
        assert value.shape == () and value.isfinite() and not value.requires_grad, name


@METHODS
def test_the_same_seed_gives_the_same_weights_and_another_seed_gives_others(cls: type[DictionaryMethod]):
    first, second, other = build(cls), build(cls), build(cls, seed=1)
    for method in (first, second, other):
        train(method, 20)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.W_enc, other.W_enc)


@METHODS
def test_dictionaries_of_two_sizes_with_one_seed_share_no_row(cls: type[DictionaryMethod]):
    """Shared rows would look like latents that both sizes have found."""
    small, again, large, other = (build(cls, dict_size=m, seed=s) for m, s in ((32, 0), (32, 0), (64, 0), (64, 1)))
    assert torch.equal(small.W_enc, again.W_enc) and torch.equal(small.W_dec, again.W_dec)
    cosines, by_chance = ((small.W_dec @ method.W_dec.T).abs().max() for method in (large, other))
    assert cosines < 0.7 and abs(cosines - by_chance) < 0.2  # of 2,048 pairs in 64 dimensions: about .45


@METHODS
def test_a_method_rebuilt_from_its_hyperparameters_and_state_gives_identical_codes(cls: type[DictionaryMethod]):
    method = build(cls)
    train(method, 20)
    arguments = json.loads(json.dumps(method.hyperparameters()))
    assert set(arguments) == {field.name for field in fields(cls.settings_class)}
    twin = cls(**arguments)
    twin.load_state_dict(method.state_dict())
    x = method.norm(heldout())[0]
    assert torch.equal(twin.eval().encode(x).dense(), method.eval().encode(x).dense())


@METHODS
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_no_state(cls: type[DictionaryMethod], training: bool):
    method = build(cls)
    train(method, 10)
    method.train(training)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with torch.no_grad():
        method.reconstruct(heldout())
        x = method.norm(heldout())[0]
        method.losses(x, method.encode(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


@METHODS
def test_reconstruct_takes_any_leading_axes_and_returns_to_raw_space(cls: type[DictionaryMethod]):
    method = build(cls)
    train(method)
    method.eval()
    x = heldout(12) * 7 + 3
    with torch.no_grad():
        flat, stacked = method.reconstruct(x), method.reconstruct(x.view(3, 4, -1))
        assert method.reconstruct(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(stacked.view(12, -1), flat)
    assert (flat - x).square().sum() < 0.8 * (x - x.mean(1, keepdim=True)).square().sum()


@METHODS
def test_initial_norms_are_those_of_the_authors_code(cls: type[DictionaryMethod]):
    method = build(cls, d_model=256, dict_size=512)
    torch.testing.assert_close(
        method.W_enc.norm(dim=1).mean(), torch.tensor(math.sqrt(2 * 256 / 512)), rtol=0.02, atol=0
    )
    torch.testing.assert_close(method.W_dec.norm(dim=1), torch.ones(512))
    torch.testing.assert_close(method.W_dec, torch.nn.functional.normalize(method.W_enc, dim=1))
    assert not method.b_enc.any() and not method.b_dec.any()


@METHODS
@pytest.mark.parametrize("decoder_norm", ["before_step", "after_step", "none"])
def test_decoder_rows_keep_unit_norm_and_the_gradient_is_orthogonal_to_them(
    cls: type[DictionaryMethod], decoder_norm: str
):
    method = build(cls, decoder_norm=decoder_norm, lr=1e-4, dead_after_tokens=10**9)
    seen = []
    optimizer = method.configure_optimizers()
    plain_prepare = optimizer.prepare

    def prepare(factor: float) -> Tensor:
        cosine = torch.nn.functional.cosine_similarity(method.W_dec.grad, method.W_dec, dim=1)
        seen.append(float(cosine.detach().abs().max()))
        return plain_prepare(factor)

    optimizer.prepare = prepare
    for batch in islice(batches(), 5):
        method.update(batch, optimizer)
    off = float((method.W_dec.detach().norm(dim=1) - 1).abs().max())
    if decoder_norm == "none":
        assert max(seen) > 1e-3
    else:
        assert max(seen) < 1e-4
        assert off < (1e-6 if decoder_norm == "after_step" else 20 * 1e-4)


def test_topk_keeps_exactly_k_in_every_row():
    method = build(TopK)
    train(method, 20)
    codes = method.eval().encode(method.norm(heldout())[0])
    assert (codes.l0_per_row() == 4).all()


def test_batchtopk_keeps_exactly_k_per_row_on_average_and_varies_between_rows():
    method = build(BatchTopK)
    steps = train(method, 40)
    assert all(step["l0"] == 4 for step in steps)
    assert method.encode(method.norm(heldout())[0]).l0_per_row().float().std() > 0.3 * 4


@pytest.mark.parametrize("rule", ["posthoc_mean", "ema"])
def test_l0_under_the_threshold_is_within_5_percent_of_k_on_heldout_rows(rule: str):
    method = build(BatchTopK, threshold_rule=rule, threshold_ema_rate=0.05, dict_size=128)
    train(method, 300)
    l0 = method.eval().encode(method.norm(heldout(4000))[0]).l0_per_row().float().mean()
    assert abs(l0 - 4) < 0.05 * 4


def test_the_posthoc_threshold_is_the_mean_of_the_smallest_entries_kept():
    method = build(BatchTopK)
    train(method, 10)
    chosen = list(islice(batches(seed=5), 3))
    method.eval().finish(chosen)
    smallest = [method.encode_batch(method.norm(b.x)[0]).values.min() for b in chosen]
    torch.testing.assert_close(method.threshold, torch.stack(smallest).mean().detach())
    x = method.norm(chosen[0].x)[0]
    z = ((x - method.b_dec) @ method.W_enc.T).relu()
    torch.testing.assert_close(method.encode(x).dense(), z * (z > method.threshold))


def test_a_rows_inference_code_does_not_depend_on_its_batch():
    method = build(BatchTopK)
    train(method, 20)
    x = method.eval().norm(heldout(50))[0]
    torch.testing.assert_close(method.encode(x[:1]).dense(), method.encode(x).dense()[:1])


def test_batchtopk_without_a_threshold_refuses_to_infer():
    with pytest.raises(RuntimeError, match="finish"):
        build(BatchTopK).eval().encode(torch.randn(3, 64))


def test_the_moving_average_of_the_threshold_follows_training_steps_only():
    method = build(BatchTopK, threshold_rule="ema", threshold_ema_rate=0.25)
    optimizer = method.configure_optimizers()
    smallest = []
    for batch in islice(batches(), 3):
        smallest.append(method.encode_batch(method.norm(batch.x)[0]).values.min().detach())
        method.update(batch, optimizer)
    by_hand = smallest[0].lerp(smallest[1], 0.25).lerp(smallest[2], 0.25)
    torch.testing.assert_close(method.threshold, by_hand)


@METHODS
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_the_path_of_the_products_does_not_matter(cls: type[DictionaryMethod], path: str):
    method, reference = build(cls, path=path), build(cls, path="auto")
    for one in (method, reference):
        train(one, 10)
    torch.testing.assert_close(method.W_dec, reference.W_dec, atol=1e-4, rtol=1e-3)


@K_SPARSE
def test_the_encoder_bias_takes_part_only_if_asked_to(cls: type[DictionaryMethod]):
    without, with_bias = build(cls), build(cls, use_enc_bias=True)
    for method in (without, with_bias):
        train(method, 5)
    assert not without.b_enc.any() and with_bias.b_enc.any()


def test_latents_die_after_their_tokens_and_live_again_when_they_fire():
    method = build(TopK, dead_after_tokens=256)
    x = method.norm(heldout(128))[0]
    codes = method.encode(x)
    for expected in (False, True, True):
        method.observe(codes)
        assert torch.equal(method.dead, ~codes.fired() & expected)
    method.tokens_since_fired.fill_(1000)
    method.observe(codes)
    assert torch.equal(method.dead, ~codes.fired())


@METHODS
def test_gradient_clipping_equals_that_of_pytorch(cls: type[DictionaryMethod]):
    """Adam forgets the gradient's scale, so one step of each kind after a step without clipping is compared."""
    method, twin = (build(cls, grad_clip=1e-3, decoder_norm="none") for _ in range(2))
    first, second = islice(batches(), 2)
    a = method.configure_optimizers()
    b = torch.optim.Adam(twin.parameter_groups(), lr=3e-3, betas=(0.9, 0.99))
    norms = []
    for scale, batch in ((1.0, first), (5.0, second)):
        batch = Batch(batch.x * scale)
        method.update(batch, a)
        if twin.n_updates == 0:
            twin.start(twin.norm(batch.x)[0])
        x = twin.norm(batch.x)[0]
        codes = twin.encode(x)
        twin.observe(codes)
        b.zero_grad()
        torch.stack(list(twin.losses(x, codes).values())).sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e-3))
        b.step()
        twin.n_updates += 1
    assert min(norms) > 1e-3
    for (name, p), q in zip(method.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4, msg=name)


def test_the_learning_rate_rises_and_falls_linearly():
    method = build(TopK, warmup_steps=4, decay_fraction=0.5)
    with pytest.raises(RuntimeError, match="n_steps"):
        method.lr_factor()
    method.n_steps = 20
    factors = []
    for step in range(20):
        method.n_updates = step
        factors.append(method.lr_factor())
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:11] == [1.0] * 7 and factors[15] == 0.5 and factors[19] == pytest.approx(0.1)


def test_jumprelu_gives_thresholds_their_own_learning_rate():
    method = build(JumpReLU)
    rates = {len(group["params"]): group["base_lr"] for group in method.configure_optimizers().param_groups}
    assert rates == {4: 3e-3, 1: 0.03}


def test_larger_l0_coefficients_give_fewer_active_latents():
    l0 = []
    for coefficient in (0.001, 0.02, 0.2):
        l0.append(float(train(build(JumpReLU, l0_coefficient=coefficient), 100)[-1]["l0"]))
    assert l0[0] > l0[1] > l0[2]


def test_larger_l1_coefficients_give_fewer_active_latents():
    l0 = [float(train(build(ReluL1, l1_coefficient=c), 80)[-1]["l0"]) for c in (0.1, 1.0, 4.0)]
    assert l0[0] > l0[1] > l0[2]


def test_relu_l1_loss_by_hand():
    method = build(ReluL1, d_model=2, dict_size=1, l1_coefficient=0.5, l1_warmup_steps=0, input_norm="none")
    with torch.no_grad():
        method.W_enc.copy_(torch.tensor([[1.0, 0.0]]))
        method.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
        method.b_enc.fill_(-1.0)
    x = torch.tensor([[3.0, 2.0], [0.0, 1.0]])
    terms = method.losses(x, method.encode(x))  # f = 2, 0; x_hat = (2, 0), (0, 0)
    assert terms["reconstruction"] == (1 + 4 + 0 + 1) / 2 and terms["l1"] == 0.5 * (2 + 0) / 2


@METHODS
def test_nan_in_the_activations_stops_the_training_and_leaves_the_parameters_finite(cls: type[DictionaryMethod]):
    method = build(cls)
    optimizer = method.configure_optimizers()
    method.train_on(list(islice(batches(), 4)), optimizer)
    chunk = list(islice(batches(), 4))
    chunk[2].x[5, 7] = torch.nan
    with pytest.raises(NonFiniteLoss, match="step 6 "):
        method.train_on(chunk, optimizer)
    assert all(parameter.isfinite().all() for parameter in method.parameters())


@K_SPARSE
@pytest.mark.parametrize("norm", [None, 0.3, 2.0])
def test_rows_of_the_encoder_start_along_those_of_the_decoder_at_their_norm(
    cls: type[DictionaryMethod], norm: float | None
):
    method, drawn = build(cls, enc_init_norm=norm), build(cls)
    assert torch.equal(method.W_dec, drawn.W_dec)
    expected = drawn.W_enc if norm is None else norm * method.W_dec
    torch.testing.assert_close(method.W_enc, expected)


@K_SPARSE
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 97}, "method.k: 97 is too much.*method.dict_size = 96"),
        ({"k": 0}, "method.k"),
        ({"aux": "ghost"}, "method.aux"),
        ({"k_aux": 0}, "method.k_aux"),
        ({"enc_init_norm": 0}, "method.enc_init_norm"),
        ({"b_dec_init": "median"}, "method.b_dec_init"),
        ({"path": "fast"}, "method.path"),
        ({"lr": 0.0}, "method.lr"),
        ({"decoder_norm": "sometimes"}, "method.decoder_norm"),
        ({"input_norm": "layer"}, "method.input_norm"),
        ({"dict_size": 0}, "method"),
        ({"decay_fraction": 1.5}, "method.decay_fraction"),
    ],
)
def test_a_bad_setting_is_named(cls: type[DictionaryMethod], changes: dict, named: str):
    with pytest.raises(UserError, match=named):
        build(cls, **changes)


@pytest.mark.parametrize(
    ("cls", "changes", "named"),
    [
        (BatchTopK, {"threshold_rule": "median"}, "method.threshold_rule"),
        (BatchTopK, {"threshold_ema_rate": 0}, "method.threshold_ema_rate"),
        (JumpReLU, {"ste": "exact"}, "method.ste"),
        (JumpReLU, {"bandwidth": 0}, "method.bandwidth"),
        (JumpReLU, {"initial_threshold": 0}, "method.initial_threshold"),
        (ReluL1, {"b_dec_init": "median"}, "method.b_dec_init"),
        (ReluL1, {"l1_coefficient": -1}, "method.l1_coefficient"),
    ],
)
def test_a_bad_setting_of_one_method_is_named(cls: type[DictionaryMethod], changes: dict, named: str):
    with pytest.raises(UserError, match=named):
        build(cls, **changes)


def test_parameters_in_half_precision_are_refused():
    method = build(TopK)
    optimizer = method.configure_optimizers()
    with pytest.raises(UserError, match="fp32"):
        method.bfloat16().update(next(batches()), optimizer)


@METHODS
def test_lightning_trains_as_plain_steps_do_and_resumes_its_counters(cls: type[DictionaryMethod], tmp_path: Path):
    def trainer(n_chunks: int) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            max_steps=n_chunks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )

    stream = list(islice(batches(), 12))
    chunks = DataLoader([stream[:4], stream[4:8], stream[8:]], batch_size=None)
    alone = build(cls)
    optimizer = alone.configure_optimizers()
    for batch in stream:
        alone.update(batch, optimizer)
    method = build(cls)
    half = trainer(2)
    half.fit(method, chunks)
    assert half.global_step == 2 and method.n_updates == 8
    assert {"loss", "l0"} <= set(half.progress_bar_metrics)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = build(cls)
    trainer(3).fit(resumed, DataLoader([stream[8:]], batch_size=None), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.n_updates == 12
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
