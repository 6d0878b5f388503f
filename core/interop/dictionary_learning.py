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

from core.errors import UserError, shown
from core.interop.hooks import INPUT
from core.interop.training_facts import TrainingFacts
from core.methods.pretrained import Pretrained
from core.reading import optional_field, read_object
from core.tensor_files import Weights, read_pt

CONFIG, WEIGHTS = "config.json", "ae.pt"


def read(folder: Path) -> Pretrained:
    """The dictionary in a folder.

    Raises UserError for other classes, for a threshold that was never measured (-1), and for files that are incomplete
    or contain more than tensors.
    """
    path = folder / CONFIG
    config = read_object(path)
    trainer = optional_field(config, "trainer", dict, path) or {}
    kind = optional_field(trainer, "dict_class", str, path)
    if kind not in READERS:
        raise UserError(f"{path}: trainer.dict_class {kind!r:.80} is not supported; these are: {', '.join(READERS)}.")
    source = _source(config, trainer, path)
    weights = read_pt(folder / WEIGHTS).unwrapped()
    options = READERS[kind](weights)
    weights.done()
    for key, size in zip(("dict_size", "activation_dim"), options["W_dec"].shape, strict=True):
        if (stated := optional_field(trainer, key, int, path)) not in (None, size):
            raise UserError(f"{path}: trainer.{key} is {stated}, but {weights.path} has {size}.")
    if options["activation"] == "topk":
        options["k"] = _k(options["k"], optional_field(trainer, "k", int, path), weights.path, path)
    return Pretrained.of(**options, source=source)


def _k(held: int | None, stated: int | None, weights: Path, config: Path) -> int:
    """k of a TopK dictionary: newer files have it beside the weights, all should have it in the configuration."""
    if held is not None and stated not in (None, held):
        raise UserError(f"{config}: trainer.k is {stated}, but {weights} has k={held}.")
    k = stated if held is None else held
    if k is None:
        raise UserError(f"{config} has no trainer.k, and {weights} no k: write the number of kept latents into one.")
    return k


def _source(config: Mapping[str, Any], trainer: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Where it was trained. Raises UserError for a dictionary whose input and output are not one place."""
    hook, layer = optional_field(trainer, "submodule_name", str, path), optional_field(trainer, "layer", int, path)
    if not hook and layer is not None:
        hook = f"resid_post_layer_{layer}"  # the library's default
    buffer = optional_field(config, "buffer", dict, path) or {}
    io = optional_field(buffer, "io", str, path) or "out"
    if io not in ("in", "out"):
        raise UserError(
            f"{path}: buffer.io is {shown(io)}: its input and its output are not one place of the model, so it is a "
            "transcoder and no dictionary."
        )
    facts: TrainingFacts = {}
    if (context_size := optional_field(buffer, "ctx_len", int, path)) is not None:
        facts["context_size"] = context_size
    if optional_field(buffer, "remove_bos", bool, path):
        facts["left_out"] = "the first token of each context"
    return {
        "format": "dictionary_learning",
        "hook": f"{hook}{INPUT}" if hook and io == "in" else hook,
        "model": optional_field(trainer, "lm_name", str, path),
        "trained": facts,
    }


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
    k = weights.take_whole("k", 1) if "k" in weights else None  # older files have it only in config.json
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
