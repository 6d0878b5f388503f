"""What every dictionary takes: any real numbers, any leading axes, none at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.methods.pretrained import Pretrained
from core.methods.stitched import Stitched
from tests.composing import CONF

D, M = 6, 20
METHODS = sorted(
    path.stem
    for path in (CONF / "method").glob("*.yaml")
    if str(OmegaConf.load(path).get("_target_", "")).startswith("core.methods.")
    and not path.stem.startswith("crosscoder")  # these take pairs: tests/methods/test_crosscoders.py
)
KINDS = ("relu", "topk", "jumprelu")


def trained(name: str) -> Dictionary:
    """The method of a YAML with random weights, as after a training."""
    node = {"seed": 0, "model": {"d_model": D}, "method": OmegaConf.load(CONF / f"method/{name}.yaml")}
    options: Any = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    small = {"dict_size": M} | {key: 4 for key in ("k", "k_aux") if key in options["method"]}
    method: Dictionary = instantiate(options["method"] | small)
    method.norm.fit(torch.randn(50, D, generator=torch.Generator().manual_seed(0)))
    for name, buffer in method.named_buffers():
        if name.startswith("threshold"):
            buffer.fill_(0.1)
    return method.eval()


def loaded(activation: Any) -> Dictionary:
    """A dictionary made elsewhere."""
    g = torch.Generator().manual_seed(0)
    rule: dict[str, Any] = {"k": 4} if activation == "topk" else {}
    rule |= {"threshold": torch.rand(M, generator=g)} if activation == "jumprelu" else {}
    W_enc, W_dec, b_enc, b_dec = (torch.randn(shape, generator=g) for shape in ((M, D), (M, D), (M,), (D,)))
    return Pretrained.of(
        W_enc, W_dec, b_enc, b_dec, activation=activation, subtract_b_dec=True, input_norm="token_std", **rule
    )


def stitched() -> Dictionary:
    return Stitched.of([(loaded(kind), torch.arange(M) % 2 == 0) for kind in KINDS], torch.zeros(D))


DICTIONARIES: dict[str, Dictionary] = {
    **{name: trained(name) for name in METHODS},
    **{f"loaded {kind}": loaded(kind) for kind in KINDS},
    "stitched": stitched(),
}
NUMBERS = {
    torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 0.02, torch.float16: 0.002,
    torch.int64: None, torch.int32: None, torch.int8: None, torch.uint8: None, torch.bool: None,
}  # fmt: skip


def some_rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4
    return numbers.abs().to(dtype) if dtype in (torch.uint8, torch.bool) else numbers.to(dtype)


@pytest.mark.parametrize("name", DICTIONARIES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(sorted(NUMBERS, key=str)),
    order=st.sampled_from(["plain", "strided", "expanded"]),
    seed=st.integers(0, 9),
)
def test_any_real_numbers_with_any_leading_axes_are_reconstructed_as_their_rows_in_fp32(
    name: str, leading: list[int], dtype: torch.dtype, order: str, seed: int
) -> None:
    """Whole numbers give what `x.float()` gives, in float32; other floats the same in their own dtype."""
    dictionary, x = DICTIONARIES[name], some_rows((*leading, D), dtype, seed)
    if order == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    elif order == "expanded":
        x = x[..., :1].expand(x.shape)
    x_hat = dictionary.reconstruct(x)
    assert x_hat.shape == x.shape
    assert x_hat.dtype == (dtype if dtype.is_floating_point else torch.float32)
    flat = dictionary.reconstruct(x.float().reshape(-1, D).contiguous())
    assert torch.equal(x_hat, flat.view(x.shape).to(x_hat.dtype))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_no_rows_have_no_codes_and_whole_numbers_have_the_codes_of_the_same_floats(name: str, training: bool) -> None:
    dictionary = DICTIONARIES[name]
    dictionary.train(training)
    try:
        nothing = dictionary.encode(torch.zeros(0, D))
        assert nothing.shape == (0, dictionary.dict_size) and dictionary.decode(nothing).shape == (0, D)
        assert nothing.dense().shape == (0, dictionary.dict_size)
        whole = torch.arange(3 * D).view(3, D)
        for x in (whole, whole.double(), whole.bfloat16(), whole.float().T.contiguous().T):
            assert torch.equal(dictionary.encode(x).dense(), dictionary.encode(whole.float()).dense())
    finally:
        dictionary.eval()


@pytest.mark.parametrize("name", DICTIONARIES)
@pytest.mark.parametrize(
    "x", [torch.zeros(3, D + 1), torch.zeros(D - 1), torch.tensor(1.0), torch.zeros(2, D, dtype=torch.complex64)]
)
def test_another_width_and_complex_numbers_are_refused(name: str, x: Tensor) -> None:
    for use in (DICTIONARIES[name].reconstruct, DICTIONARIES[name].encode):
        with pytest.raises(UserError, match=r"The dictionary takes real activations \[.*6\], not torch\."):
            use(x)


def test_every_method_that_can_be_trained_is_among_them() -> None:
    assert {"topk", "batchtopk", "jumprelu", "relu_l1", "lca", "oneill_mlp", "oneill_sae"} <= set(METHODS)
    assert Path(CONF / "method/pretrained.yaml").is_file()
