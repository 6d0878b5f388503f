"""SAELens folders (`cfg.json`, `sae_weights.safetensors`): versions 0 to 6 are read, version 6 is written.

Facts, from the library (6.54): W_enc is `[d, m]`, W_dec `[m, d]`. Codes are act((norm(x) [- b_dec]) W_enc + b_enc) and
reconstructions unnorm(f W_dec + b_dec), where
  standard           ReLU
  topk               ReLU of the k largest entries; with `rescale_acts_by_decoder_norm` entries are multiplied by the
                     norms of their decoder rows before the selection, and divided by them in decoding
  jumprelu           z where z > threshold_i and z > 0
  batchtopk          (a training checkpoint) at inference jumprelu with one threshold
  gated              ReLU(pi e^r + b_mag) where pi + b_gate > 0, pi = x W_enc. That is jumprelu with encoder W_enc e^r,
                     bias b_mag and threshold max(0, b_mag - b_gate e^r) (Rajamanoharan et al. 2024)
and norm is
  none                      the identity
  layer_norm                per token, minus the mean over d, over (unbiased standard deviation + 1e-5); undone without
                            the 1e-5
  constant_norm_rescale     per token, scaled to the norm sqrt(d)
  expected_average_only_in  x times a constant c that is not in cfg.json. The library folds it into the weights at the
                            end of training (and then says `none`): W_enc c, W_dec / c, b_dec / c
Before version 6, the metadata are in the same object as the settings, under older names, and a factor per latent from
fine-tuning (`scaling_factor`) multiplies codes in decoding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.atomic import atomically, write_atomically
from core.errors import UserError, shown
from core.input_norm import CONSTANT, Normalisation
from core.interop.hooks import hook_of
from core.interop.training_facts import TrainingFacts
from core.methods.dictionary import Dictionary
from core.methods.pretrained import Activation, Pretrained, at_inference
from core.reading import field, optional_field, read_object
from core.tensor_files import Weights, read_safetensors

CFG, WEIGHTS, SPARSITY, SCALER = (
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "activation_scaler.json",
)
WRITTEN_AS = "6.0.0"  # the version of the format; a cfg.json without one is read as an older version
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}
NORMS: dict[str, Normalisation] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "token_norm",
    "expected_average_only_in": "none",  # folded
}
THEIR_NORMS: dict[Normalisation, str] = {
    "none": "none",
    "scalar": "none",  # folded
    "shared_scalar": "none",  # folded
    "token_center": "none",  # of activations that are centred
    "token_std": "layer_norm",
    "layer_norm": "layer_norm",
    "token_norm": "constant_norm_rescale",
}
KEY = "exclude_special_tokens"  # true, or a list of ids
KINDS: dict[str, type] = {  # of the settings that are looked at, where they are given
    **dict.fromkeys(("architecture", "activation_fn", "hook_name", "model_name", "dataset_path"), str),
    **dict.fromkeys(("hook_name_out", "out_hook_point", "hook_point_out", "reshape_activations"), str),
    **dict.fromkeys(("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"), bool),
    **dict.fromkeys(("is_transcoder", "prepend_bos"), bool),
    **dict.fromkeys(("d_in", "d_sae", "d_out", "k", "hook_layer", "hook_head_index", "context_size"), int),
    **dict.fromkeys(("activation_fn_kwargs", "model_from_pretrained_kwargs"), dict),
    "seqpos_slice": list,
}
NEWEST = 6
THRESHOLDED = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", *THRESHOLDED)


def read(folder: Path, norm_scaling_factor: float | None = None) -> Pretrained:
    """The dictionary in a folder.

    norm_scaling_factor  c of `expected_average_only_in`, needed if it is neither folded into the weights nor given in
                         `activation_scaler.json`

    Raises UserError for unknown architectures, versions and settings, and for incomplete files.
    """
    path = folder / CFG
    cfg = _cfg(read_object(path), path)
    d, m = _size(cfg, "d_in", path), _size(cfg, "d_sae", path)
    weights = read_safetensors(folder / WEIGHTS).unwrapped()
    W_enc, W_dec, b_dec = weights.take("W_enc", d, m).T, weights.take("W_dec", m, d), weights.take("b_dec", d)
    W_dec = W_dec * _finetuning_factor(weights, cfg, m)[:, None]
    W_enc, b_enc, activation, threshold = _activation(cfg["architecture"], W_enc, weights, m)
    weights.done()
    if cfg["rescale_acts_by_decoder_norm"]:
        if cfg["architecture"] not in ("topk", *THRESHOLDED):
            raise UserError(f"{path}: rescale_acts_by_decoder_norm is not supported for {cfg['architecture']}.")
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms.clamp(min=1e-8)[:, None]
    if cfg["normalize_activations"] == "expected_average_only_in":
        c = _scaling_factor(folder, norm_scaling_factor)
        W_enc, W_dec, b_dec = W_enc * c, W_dec / c, b_dec / c
    elif norm_scaling_factor is not None:
        raise UserError(
            f"method.norm_scaling_factor: {path} has normalize_activations={cfg['normalize_activations']}, which does "
            "not use it. Set it to null."
        )
    return Pretrained.of(
        W_enc,
        W_dec,
        b_enc,
        b_dec,
        activation=activation,
        threshold=threshold,
        k=_size(cfg, "k", path) if activation == "topk" else None,
        subtract_b_dec=cfg["apply_b_dec_to_input"] is not False,
        input_norm=_norm(cfg, path),
        source=_source(cfg, path),
    )


def read_log_sparsity(folder: Path) -> Tensor | None:
    """log10 of the share of tokens on which each latent fires `[m]`, as measured in training; None without the file."""
    if not (folder / SPARSITY).is_file():
        return None
    weights = read_safetensors(folder / SPARSITY)
    return weights.take("sparsity", *weights.shape("sparsity"))


def write_log_sparsity(log_sparsity: Tensor, folder: Path) -> None:
    """Write `[m]` next to a dictionary, for `read_log_sparsity`."""
    _save({"sparsity": log_sparsity}, folder / SPARSITY)


def check_writable(method: type[Dictionary], input_norm: str, centred_model: bool) -> None:
    """Raises UserError for what `write` cannot write. Call it before hours of training."""
    method.require_inference_rule()
    if input_norm == "token_center" and not centred_model:
        raise UserError(
            "method.input_norm=token_center: SAELens has no such normalisation. Set export.centred_model=true to write "
            "the dictionary for a model with centred writing weights (TransformerLens' default for GPT-2)."
        )


def write(
    method: Dictionary,
    folder: Path,
    *,
    site: str | None = None,
    model: str | None = None,
    centred_model: bool = False,
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write a trained or loaded dictionary so that SAELens computes the same codes and reconstructions.

    site, model     our names, for the metadata
    trained         how the rows of the training were made, for the metadata: `prepend_bos`, `context_size`, `packing`;
                    what the files of a loaded dictionary say of it if None
    centred_model   required for `input_norm=token_center`, which the format does not have. Codes are then the same for
                    any activations, but reconstructions only for those of a model with centred writing weights, whose
                    tokens have mean zero over d

    `input_norm=token_std` becomes `layer_norm`, with the same codes; a reconstruction's deviation from the token's mean
    is then smaller by a fraction of 1e-5 / std.
    Raises UserError as `check_writable` does.
    """
    check_writable(type(method), method.norm.kind, centred_model)
    dictionary = at_inference(method)
    facts = dictionary.source.get("trained", {}) if trained is None else trained
    metadata = {
        "sae_lens_version": WRITTEN_AS,
        "sae_lens_training_version": None,
        "model_name": model or dictionary.source.get("model"),
        "hook_name": hook_of(site) if site else dictionary.source.get("hook"),
        "hook_head_index": None,
        "prepend_bos": True,  # SAELens' own word where nothing else is known
        **{name: facts[name] for name in ("prepend_bos", "context_size", "packing") if name in facts},
    }
    if dictionary.norm.kind == "token_center":
        metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    cfg = {
        "architecture": "standard" if dictionary.settings.activation == "relu" else dictionary.settings.activation,
        "d_in": dictionary.d_model,
        "d_sae": dictionary.dict_size,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.settings.subtract_b_dec,
        "normalize_activations": THEIR_NORMS[dictionary.settings.input_norm],
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if dictionary.settings.k is not None:
        cfg |= {"k": dictionary.settings.k, "rescale_acts_by_decoder_norm": False}
    _save(_folded(dictionary), folder / WEIGHTS)
    write_atomically(folder / CFG, json.dumps(cfg, indent=1))


def _folded(dictionary: Pretrained) -> dict[str, Tensor]:
    """The tensors of the format. Settings that it does not have are folded into them."""
    W_enc, W_dec, c = dictionary.W_enc.data, dictionary.W_dec.data, dictionary.norm.scale
    b_enc, b_dec = dictionary.b_enc.data, dictionary.b_dec.data
    if dictionary.norm.kind in CONSTANT:
        W_enc, W_dec, b_dec = W_enc / c, W_dec * c, b_dec * c
    elif dictionary.norm.kind == "token_center":
        if dictionary.settings.subtract_b_dec:  # the encoder's input keeps the mean of b_dec
            b_enc = b_enc - W_enc.sum(1) * b_dec.mean()
        W_enc = W_enc - W_enc.mean(1, keepdim=True)
    state = {"W_enc": W_enc.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    return state | ({"threshold": dictionary.threshold} if dictionary.settings.activation == "jumprelu" else {})


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    with atomically(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)


def _cfg(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings and the used metadata of a cfg.json of any version, under version 6's names, with the right types.

    Raises UserError for what is not one place's dictionary, and for what is not supported."""
    metadata: dict[str, Any] = optional_field(raw, "metadata", dict, path) or {}
    version = optional_field(metadata, "sae_lens_version", str, path) or optional_field(
        raw, "sae_lens_version", str, path
    )
    major = str(version or "0").partition(".")[0]
    if not (major.isascii() and major.isdecimal() and len(major) < 4) or int(major) > NEWEST:
        raise UserError(
            f"{path} is of SAELens {shown(version)}; only versions up to {NEWEST} are supported. Save it with SAELens "
            f"{NEWEST}."
        )
    cfg = {OLD_NAMES.get(key, key): value for key, value in {**metadata, **raw}.items()}
    if int(major) == NEWEST:
        field(cfg, "architecture", str, path)
    for key, kind in KINDS.items():
        cfg[key] = optional_field(cfg, key, kind, path)
    _require_one_place(cfg, path)
    cfg["architecture"] = cfg["architecture"] or "standard"
    if cfg["architecture"] == "standard" and cfg["activation_fn"] == "topk":
        k = optional_field(cfg["activation_fn_kwargs"] or {}, "k", int, path)
        cfg |= {"architecture": "topk", "k": k if cfg["k"] is None else cfg["k"]}
    elif cfg["activation_fn"] not in (None, "relu", "topk"):
        raise UserError(f"{path}: activation_fn {cfg['activation_fn']!r:.80} is not supported; relu and topk are.")
    elif cfg["architecture"] == "standard" and cfg["k"] is not None:
        raise UserError(f"{path} has k={cfg['k']}, but the architecture standard keeps all latents: which is it?")
    if cfg["architecture"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path}: the architecture {cfg['architecture']!r:.80} is not supported; these are: {known}.")
    norm = cfg.get("normalize_activations") or "none"
    cfg["normalize_activations"] = "expected_average_only_in" if norm is True else norm
    if not isinstance(norm, str | bool) or cfg["normalize_activations"] not in NORMS:
        raise UserError(f"{path}: normalize_activations {norm!r:.80} is not supported; these are: {', '.join(NORMS)}.")
    return cfg


def _require_one_place(cfg: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for a transcoder, and for a dictionary of one attention head or of reshaped activations."""
    for key in ("hook_name_out", "out_hook_point", "hook_point_out"):
        if cfg[key] not in (None, "", cfg["hook_name"]):
            raise UserError(
                f"{path}: {key} is {shown(cfg[key])} and hook_name {shown(cfg['hook_name'])}: it reads one place "
                "of the model and writes another, so it is a transcoder and no dictionary."
            )
    if cfg["is_transcoder"] or cfg["d_out"] not in (None, cfg["d_in"]):
        raise UserError(f"{path}: it is a transcoder (d_out, is_transcoder) and no dictionary.")
    if cfg["hook_head_index"] is not None:
        raise UserError(f"{path}: hook_head_index={cfg['hook_head_index']}: one attention head is no site here.")
    if cfg["reshape_activations"] not in (None, "none"):
        raise UserError(f"{path}: reshape_activations={shown(cfg['reshape_activations'])} is not supported; none is.")


def _source(cfg: Mapping[str, Any], path: Path) -> dict[str, Any]:
    hook = cfg["hook_name"]
    if hook and cfg["hook_layer"] is not None:
        hook = hook.replace("{layer}", str(cfg["hook_layer"]))
    named = (("dataset", "dataset_path"), ("context_size", "context_size"), ("prepend_bos", "prepend_bos"))
    facts: TrainingFacts = {ours: cfg[theirs] for ours, theirs in named if cfg[theirs] is not None}
    left_out = cfg.get("exclude_special_tokens")
    if isinstance(left_out, list):
        facts |= {"left_out": [field({KEY: token}, KEY, int, path) for token in left_out]} if left_out else {}
    elif optional_field(cfg, KEY, bool, path):
        facts["left_out"] = "special tokens"
    bounds = [optional_field({"seqpos_slice": n}, "seqpos_slice", int, path) for n in cfg["seqpos_slice"] or ()]
    if any(n is not None for n in bounds):
        facts["positions"] = [None, *bounds] if len(bounds) == 1 else bounds
    return {"format": "saelens", "hook": hook or None, "model": cfg["model_name"], "trained": facts}


def _size(cfg: Mapping[str, Any], key: str, path: Path) -> int:
    value = field(cfg, key, int, path)
    if value < 1:
        raise UserError(f"{path}: {key} is {value}, not a whole number above 0.")
    return value


def _finetuning_factor(weights: Weights, cfg: Mapping[str, Any], m: int) -> Tensor:
    """The factors of the codes in decoding `[m]`; ones in almost all files."""
    name = next((n for n in ("finetuning_scaling_factor", "scaling_factor") if n in weights), None)
    if name is None:
        return torch.ones(m)
    factor = weights.take(name, m)
    if not cfg["finetuning_scaling_factor"] and not torch.allclose(factor, torch.ones(m)):
        raise UserError(f"{weights.path}: {name} is not all ones, but cfg.json lacks finetuning_scaling_factor=true.")
    return factor if cfg["finetuning_scaling_factor"] else torch.ones(m)


def _activation(
    architecture: str, W_enc: Tensor, weights: Weights, m: int
) -> tuple[Tensor, Tensor, Activation, Tensor | None]:
    """W_enc `[m, d]`, b_enc `[m]`, the activation function and its threshold."""
    if architecture == "gated":
        r, b_gate, b_mag = weights.take("r_mag", m).exp(), weights.take("b_gate", m), weights.take("b_mag", m)
        return W_enc * r[:, None], b_mag, "jumprelu", b_mag - b_gate * r
    b_enc = weights.take("b_enc", m)
    if architecture == "jumprelu":
        log = "log_threshold" in weights  # in training checkpoints of some versions
        return W_enc, b_enc, "jumprelu", weights.take("log_threshold", m).exp() if log else weights.take("threshold", m)
    if architecture in THRESHOLDED:
        return W_enc, b_enc, "jumprelu", torch.tensor(weights.take_number("topk_threshold"))
    return W_enc, b_enc, "topk" if architecture == "topk" else "relu", None


def _norm(cfg: Mapping[str, Any], path: Path) -> Normalisation:
    """Our name of the normalisation. Centred writing weights subtract each token's mean, as `token_center` does."""
    norm = NORMS[cfg["normalize_activations"]]
    kwargs = cfg["model_from_pretrained_kwargs"] or {}
    if optional_field(kwargs, "center_writing_weights", bool, path) and norm != "layer_norm":
        if norm == "token_norm":
            raise UserError(f"{path}: constant_norm_rescale of centred activations is not supported.")
        return "token_center"
    return norm


def _scaling_factor(folder: Path, given: float | None) -> float:
    path = folder / SCALER
    stored = optional_field(read_object(path), "scaling_factor", float, path) if path.is_file() else None
    c = given if stored is None else stored
    if c is None or not 0 < c < math.inf:
        raise UserError(
            f"{folder / CFG} has normalize_activations=expected_average_only_in, but its factor is neither folded into "
            f"the weights nor in {SCALER}. Set method.norm_scaling_factor: sqrt(d) over the mean norm of activations."
        )
    return c
