"""dictionary_learning folders (`ae.pt`, `config.json`); only tensors are read.

Facts, from the library (0.1.0), by `trainer.dict_class` of config.json; `Linear` weights are [out, in]:
  AutoEncoder             ReLU(encoder(x - bias)); the library's loader scales latents so that decoder rows have norm 1
  AutoEncoderNew          ReLU(encoder(x)), decoder with a bias
  AutoEncoderTopK         the k largest entries of ReLU(encoder(x - b_dec))
  BatchTopKSAE            ReLU(encoder(x - b_dec)) where it is above one threshold
  MatryoshkaBatchTopKSAE  the same, with matrices W_enc `[d, m]` and W_dec `[m, d]`
  JumpReluAutoEncoder     z where z > threshold_i, z = x W_enc + b_enc, W_enc `[d, m]`
  GatedAutoEncoder        as in `core.interop.saelens`, of x - decoder_bias
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.methods.pretrained import Pretrained
from core.reading import read_object
from core.tensor_files import Weights, read_pt

CONFIG, WEIGHTS = "config.json", "ae.pt"


def read(folder: Path) -> Pretrained:
    """The dictionary in a folder.

    Raises UserError for other classes, for a threshold that was never measured (-1), and for files that are incomplete
    or contain more than tensors.
    """
    path = folder / CONFIG
    trainer = read_object(path).get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in READERS:
        kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise UserError(f"{path}: trainer.dict_class {kind!r} is not supported; these are: {', '.join(READERS)}.")
    weights = read_pt(folder / WEIGHTS)
    options = READERS[trainer["dict_class"]](weights)
    weights.done()
    if options["activation"] == "topk" and options["k"] != trainer.get("k", options["k"]):
        if options["k"] is not None:
            raise UserError(f"{path}: trainer.k is {trainer['k']}, but {weights.path} has k={options['k']}.")
        options["k"] = trainer["k"]
    return Pretrained.of(**options, source={"format": "dictionary_learning", **_where(trainer)})


def _where(trainer: Mapping[str, Any]) -> dict[str, Any]:
    hook, layer = trainer.get("submodule_name"), trainer.get("layer")
    if not hook and isinstance(layer, int):
        hook = f"resid_post_layer_{layer}"  # the library's default
    return {"hook": hook, "model": trainer.get("lm_name")}


def _linear(weights: Weights) -> tuple[Tensor, Tensor, int, int]:
    """encoder.weight `[m, d]`, the decoder's rows `[m, d]`, d and m."""
    shape = weights.shape("encoder.weight")
    if len(shape) != 2:
        raise UserError(f"{weights.path}: encoder.weight has the shape {list(shape)}, not [dict_size, d_model].")
    m, d = shape
    return weights.take("encoder.weight", m, d), weights.take("decoder.weight", d, m).T.contiguous(), d, m


def _matrices(weights: Weights) -> dict[str, Tensor]:
    shape = weights.shape("W_enc")
    if len(shape) != 2:
        raise UserError(f"{weights.path}: W_enc has the shape {list(shape)}, not [d_model, dict_size].")
    d, m = shape
    return {
        "W_enc": weights.take("W_enc", d, m).T,
        "W_dec": weights.take("W_dec", m, d),
        "b_enc": weights.take("b_enc", m),
        "b_dec": weights.take("b_dec", d),
    }


def _relu(weights: Weights) -> dict[str, Any]:
    W_enc, W_dec, d, m = _linear(weights)
    b_enc, b_dec = weights.take("encoder.bias", m), weights.take("bias", d)
    norms = W_dec.norm(dim=1)
    if not torch.allclose(norms, torch.ones(m)):  # as in the library's loader
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms.clamp(min=1e-8)[:, None]
    weights_ = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    return {**weights_, "activation": "relu", "subtract_b_dec": True}


def _new_relu(weights: Weights) -> dict[str, Any]:
    W_enc, W_dec, d, m = _linear(weights)
    biases = {"b_enc": weights.take("encoder.bias", m), "b_dec": weights.take("decoder.bias", d)}
    return {"W_enc": W_enc, "W_dec": W_dec, **biases, "activation": "relu", "subtract_b_dec": False}


def _topk(weights: Weights) -> dict[str, Any]:
    W_enc, W_dec, d, m = _linear(weights)
    biases = {"b_enc": weights.take("encoder.bias", m), "b_dec": weights.take("b_dec", d)}
    k = int(weights.take_number("k")) if "k" in weights else None  # older files have it only in config.json
    weights.drop("threshold")
    return {"W_enc": W_enc, "W_dec": W_dec, **biases, "activation": "topk", "k": k, "subtract_b_dec": True}


def _batchtopk(weights: Weights) -> dict[str, Any]:
    W_enc, W_dec, d, m = _linear(weights)
    biases = {"b_enc": weights.take("encoder.bias", m), "b_dec": weights.take("b_dec", d)}
    return {"W_enc": W_enc, "W_dec": W_dec, **biases, **_one_threshold(weights)}


def _matryoshka(weights: Weights) -> dict[str, Any]:
    weights.drop("group_sizes")
    return {**_matrices(weights), **_one_threshold(weights)}


def _one_threshold(weights: Weights) -> dict[str, Any]:
    weights.drop("k")
    threshold = weights.take_number("threshold")
    if threshold < 0:
        raise UserError(
            f"{weights.path}: the threshold is {threshold:g}, so it was never measured (the library starts at step "
            "1000). Without it all positive latents would be active at inference."
        )
    return {"activation": "jumprelu", "threshold": torch.tensor(threshold), "subtract_b_dec": True}


def _jumprelu(weights: Weights) -> dict[str, Any]:
    matrices = _matrices(weights)
    threshold = weights.take("threshold", len(matrices["b_enc"]))
    return {**matrices, "activation": "jumprelu", "threshold": threshold, "subtract_b_dec": False}


def _gated(weights: Weights) -> dict[str, Any]:
    W_enc, W_dec, d, m = _linear(weights)
    r, gate, magnitude = (weights.take(name, m) for name in ("r_mag", "gate_bias", "mag_bias"))
    return {
        "W_enc": W_enc * r.exp()[:, None],
        "W_dec": W_dec,
        "b_enc": magnitude,
        "b_dec": weights.take("decoder_bias", d),
        "activation": "jumprelu",
        "threshold": magnitude - gate * r.exp(),
        "subtract_b_dec": True,
    }


READERS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _new_relu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
    "GatedAutoEncoder": _gated,
}
