"""A dictionary made elsewhere: its three activation functions by hand, and trained ones in that form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from core.errors import UserError
from core.methods.base import DictionaryMethod
from core.methods.pretrained import Pretrained, at_inference
from core.methods.saved import load_dictionary, save_dictionary

CONF = Path(__file__).parents[2] / "conf" / "method"
X = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)) * 2 + 1


def built(name: str, **changes: Any) -> DictionaryMethod:
    """The method of a YAML with random weights, as if trained."""
    node = OmegaConf.create({"seed": 0, "model": {"d_model": 12}, "method": OmegaConf.load(CONF / f"{name}.yaml")})
    method = instantiate(OmegaConf.to_container(node, resolve=True)["method"] | {"dict_size": 40} | changes)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=g) / 3)
        if hasattr(method, "threshold_ema"):
            method.threshold.fill_(0.4)
        method.norm.fit(X)
    return method.eval()


def weights(**changes: Tensor) -> dict[str, Tensor]:
    base = {"W_enc": torch.eye(2), "W_dec": torch.eye(2), "b_enc": torch.zeros(2), "b_dec": torch.tensor([1.0, 0.0])}
    return base | changes


def test_the_three_activation_functions_by_hand():
    x = torch.tensor([[3.0, 1.0], [1.5, -1.0]])  # minus b_dec: [2, 1], [0.5, -1]
    relu = Pretrained.of(**weights(), activation="relu", subtract_b_dec=True)
    assert relu.encode(x).dense().tolist() == [[2, 1], [0.5, 0]]
    top = Pretrained.of(**weights(), activation="topk", k=1, subtract_b_dec=True)
    assert top.encode(x).dense().tolist() == [[2, 0], [0.5, 0]]
    theta = torch.tensor([2.0, 0.5])  # an entry at its threshold is not active
    jump = Pretrained.of(**weights(), activation="jumprelu", threshold=theta, subtract_b_dec=True)
    assert jump.encode(x).dense().tolist() == [[0, 1], [0, 0]]
    raw = Pretrained.of(**weights(), activation="relu", subtract_b_dec=False)
    assert raw.encode(x).dense().tolist() == [[3, 1], [1.5, 0]]
    assert raw.decode(raw.encode(x)).tolist() == [[4, 1], [2.5, 0]]


def test_a_negative_threshold_is_that_of_a_relu():
    jump = Pretrained.of(**weights(), activation="jumprelu", threshold=torch.tensor(-3.0), subtract_b_dec=False)
    assert jump.encode(torch.tensor([[1.0, -1.0]])).dense().tolist() == [[1, 0]]


@pytest.mark.parametrize("norm", ["token_std", "token_center", "scalar", "none"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("relu_l1", {}), ("oneill_sae", {}), ("topk", {"k": 3}), ("topk", {"k": 3, "use_enc_bias": True}),
     ("batchtopk", {"k": 3}), ("batchtopk", {"k": 3, "use_enc_bias": True}), ("jumprelu", {})],
)  # fmt: skip
def test_a_trained_dictionary_in_this_form_gives_the_same_codes_and_reconstructions(name, changes, norm):
    method = built(name, input_norm=norm, **changes)
    found = at_inference(method)
    x_n, _ = method.norm(X)
    assert torch.equal(found.encode(x_n).dense(), method.encode(x_n).dense())
    assert torch.equal(found.reconstruct(X), method.reconstruct(X))
    assert 0 < float(found.encode(x_n).l0()) < 40


def test_it_is_saved_and_loaded_as_any_other_and_infers_in_training_mode_too(tmp_path):
    found = at_inference(built("jumprelu"))
    found.source["repo"] = "someone/something"
    save_dictionary(found, {}, tmp_path / "d")
    again = load_dictionary(tmp_path / "d")
    assert isinstance(again, Pretrained) and again.hyperparameters() == found.hyperparameters()
    assert torch.equal(again.train().reconstruct(X), found.reconstruct(X))
    assert not again.dead.any() and not list(filter(lambda p: p.requires_grad, again.parameters()))


def test_a_batchtopk_dictionary_without_threshold_and_an_encoder_of_another_form_are_refused():
    method = built("batchtopk", k=3)
    method.threshold.fill_(torch.nan)
    with pytest.raises(UserError, match="threshold of this BatchTopK"):
        at_inference(method)
    for name in ("lca", "oneill_mlp"):
        with pytest.raises(UserError, match="no encoder of one matrix"):
            at_inference(built(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"W_dec": torch.eye(3)}, r"W_dec has the shape \[3, 3\], not \[2, 2\]"),
     ({"b_enc": torch.zeros(3)}, r"b_enc has the shape"),
     ({"b_dec": torch.tensor([0.0, torch.nan])}, "b_dec holds numbers that are NaN"),
     ({"W_enc": torch.full((2, 2), torch.inf)}, "W_enc holds numbers")],
)  # fmt: skip
def test_weights_that_do_not_fit_or_are_not_finite_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        Pretrained.of(**weights(**changes), activation="relu", subtract_b_dec=False)
    with pytest.raises(UserError, match=r"dictionary\.k: null"):
        Pretrained.of(**weights(), activation="topk", subtract_b_dec=False)
