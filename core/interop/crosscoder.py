"""Crosscoders of two models: the files of Minder et al. 2025, of their library's later versions, and of Kissane et al.

Facts (dictionary_learning of jkminder, crosscoder_learning): `model.safetensors` on the hub, `model_final.pt` from a
training. encoder.weight `[2, d, m]`, encoder.bias `[m]`, decoder.weight `[2, m, d]`, decoder.bias `[2, d]`; index 0 is
the base model, 1 the chat model. BatchTopK files also have k and the threshold of v, -1 until it is measured.
code_normalization_id says what v is: 1 crosscoder (f_j times the sum of its decoders' norms; also where there is no
id), 2 sae (their joint norm), 3 mixed (a sae + b crosscoder, by default 1 and 0.1), 4 none, 5 decoupled (for each model
f_j |d_j^m| and a threshold of its own). In a state saved from a compiled model every name starts with `_orig_mod.`.
Newer files hold activation_mean and activation_std `[2, d]` (NaN: no normalisation), target_rms and
activation_global_scale c (`[]`, later `[2]`): the crosscoder reads (h - mean) c. By an option that files do not tell it
reads (h - mean) / std, with c = 1. `config.json` on the hub has the class's arguments, later its name as dict_class;
`trainer_config.json`, or `config.json` beside a training, has the trainer's settings under `trainer`.

Kissane: `cc_weights.pt` with W_enc `[2, d, m]`, W_dec `[m, 2, d]`, b_enc, b_dec `[2, d]`; ReLU, of activations times a
factor of each model's own that makes their mean norm sqrt(d). The factors are not in the files.

Shapes here: W_enc and W_dec `[m, 2, d]`, one latent per row, as for pairs in `core.kernels.sparse`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.atomic import atomically, write_atomically
from core.checked import shown
from core.errors import UserError
from core.input_norm import AFFINE, CONSTANT
from core.methods.crosscoder import MIXED_SHARE, BatchTopKCrosscoder, CodeNorm, L1Crosscoder
from core.methods.dictionary import Dictionary
from core.methods.pretrained_crosscoder import PretrainedCrosscoder
from core.reading import optional_field, read_object
from core.tensor_files import Weights, read_pt, read_safetensors

WEIGHTS = ("model.safetensors", "model_final.pt", "model.pt", "ae.pt", "cc_weights.pt")  # the first that exists is read
TRAINER, CONFIG = "trainer_config.json", "config.json"
PUBLISHED_FACTORS = "[0.27589615, 0.24422853]"  # of the published one, in its authors' notebook
AnyCodeNorm = CodeNorm | Literal["decoupled"]
CODE_NORMS: dict[int, tuple[str, AnyCodeNorm]] = {  # their id -> their name and ours
    1: ("CROSSCODER", "sum"),
    2: ("SAE", "joint"),
    3: ("MIXED", "mixed"),
    4: ("NONE", "none"),
    5: ("DECOUPLED", "decoupled"),
}
ALPHAS = {"code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": MIXED_SHARE}
NORMALISER = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
BATCHTOPK = "BatchTopKCrossCoder"


def read(path: Path, norm_scaling_factor: Sequence[float] | None = None) -> PretrainedCrosscoder:
    """The crosscoder in a folder or a file.

    norm_scaling_factor  what activations of the base and of the chat model were multiplied with, for files that do not
                         say it (Kissane's); what they were divided by travels in the crosscoder's `norm`

    Raises UserError for shapes that do not fit a crosscoder, for a threshold that is missing or was never measured, and
    for files that are incomplete or contain more than tensors.
    """
    file = weights_file(path)
    weights = read_safetensors(file) if file.suffix == ".safetensors" else read_pt(file)
    weights = weights.unwrapped()
    facts = Facts(file.parent)
    matrices = "W_enc" in weights
    if not matrices and norm_scaling_factor is not None:
        raise UserError(f"method.norm_scaling_factor: {file} says how activations are normalised. Set it to null.")
    options = _of_matrices(weights, norm_scaling_factor) if matrices else _of_modules(weights, facts)
    weights.done()
    m, _, d = options["W_dec"].shape
    for key, size in (("activation_dim", d), ("dict_size", m), ("num_layers", 2)):
        if (stated := facts.get(key, int)) not in (None, size):
            raise UserError(f"{facts}: {key} is {stated}, but {file} has {size}.")
    try:
        return PretrainedCrosscoder.of(**options, source=facts.source("matrices" if matrices else "modules"))
    except UserError as error:  # of a number that float32 cannot hold
        raise UserError(f"{file}: {error}") from error


def weights_file(path: Path) -> Path:
    """The checkpoint of a folder, or the file itself."""
    file = path if path.is_file() else next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path} contains no crosscoder: it has none of {', '.join(WEIGHTS)}.")
    return file


class Facts:
    """What the files beside the weights say, where there are any."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / name for name in (TRAINER, CONFIG) if (folder / name).is_file()]
        self.nodes = []
        for path in self.paths:
            content = read_object(path)
            self.nodes += [optional_field(content, "trainer", dict, path) or {}, content]

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))

    def get(self, key: str, kind: type) -> Any:
        """The value in the first file that has it, or None."""
        return next((v for node in self.nodes if (v := optional_field(node, key, kind, self)) is not None), None)

    def source(self, layout: str) -> dict[str, Any]:
        layer, module = self.get("layer", int), self.get("submodule_name", str)
        hook = module if module and not module.endswith("_out") else None
        return {
            "format": "crosscoder",
            "layout": layout,
            "class": self.get("dict_class", str),
            "k": self.get("k_target", int) or self.get("k", int),
            "hook": hook or (f"resid_post_layer_{layer}" if layer is not None else None),
            "model": self.get("lm_name", str),
            "trained": {},
        }


def _of_modules(weights: Weights, facts: Facts) -> dict[str, Any]:
    d, m = _sizes(weights, "encoder.weight")
    W_enc, W_dec = weights.take("encoder.weight", 2, d, m), weights.take("decoder.weight", 2, m, d)
    code_norm = _code_norm(weights, facts)
    return {
        "W_enc": W_enc.permute(2, 0, 1).contiguous(),
        "W_dec": W_dec.transpose(0, 1).contiguous(),
        "b_enc": weights.take("encoder.bias", m),
        "b_dec": weights.take("decoder.bias", 2, d),
        "code_norm": code_norm,
        "threshold": _threshold(weights, facts, code_norm),
        **_normaliser(weights, d),
    }


def _of_matrices(weights: Weights, factors: Sequence[float] | None) -> dict[str, Any]:
    d, m = _sizes(weights, "W_enc")
    W_enc, W_dec = weights.take("W_enc", 2, d, m), weights.take("W_dec", m, 2, d)
    if factors is None or len(factors) != 2 or not all(factor > 0 for factor in factors):
        raise UserError(
            f"method.norm_scaling_factor: {shown(factors)} is not two numbers above 0. {weights.path} was trained on "
            "activations that were scaled to a mean norm of sqrt(d_model), by a factor for the base model and one for "
            f"the chat model, which the file does not hold. For ckkissane/crosscoder-gemma-2-2b-model-diff set it to "
            f"{PUBLISHED_FACTORS}, and to [1, 1] if they are folded into the weights."
        )
    return {
        "W_enc": W_enc.permute(2, 0, 1).contiguous(),
        "W_dec": W_dec,
        "b_enc": weights.take("b_enc", m),
        "b_dec": weights.take("b_dec", 2, d),
        "threshold": None,
        "input_norm": "scalar",
        "scale": torch.tensor([[1 / factor] for factor in factors]),
    }


def _sizes(weights: Weights, name: str) -> tuple[int, int]:
    shape = weights.shape(name)
    if len(shape) != 3 or shape[0] != 2:
        raise UserError(
            f"{weights.path}: {name} has the shape {list(shape)}, not [2, d_model, dict_size] as in a crosscoder."
        )
    return shape[1], shape[2]


def _code_norm(weights: Weights, facts: Facts) -> AnyCodeNorm:
    """What v is, by the file's id, else by the name beside it, else the paper's."""
    names = dict(CODE_NORMS.values())
    name = facts.get("code_normalization", str)
    if name is not None and name.upper() not in names:
        raise UserError(f"{facts}: code_normalization {shown(name)} is none of {', '.join(names)}.")
    stated = None if name is None else names[name.upper()]
    held = None
    if "code_normalization_id" in weights:
        number = weights.take_whole("code_normalization_id")
        if number not in CODE_NORMS:
            known = ", ".join(f"{i} {theirs}" for i, (theirs, _) in CODE_NORMS.items())
            raise UserError(f"{weights.path}: code_normalization_id is {number}, which is none of {known}.")
        held = CODE_NORMS[number][1]
    if None not in (held, stated) and held != stated:
        raise UserError(f"{facts}: code_normalization is {name}, but {weights.path} has another: {held}.")
    found: AnyCodeNorm = held or stated or "sum"
    for key, usual in ALPHAS.items():
        if found == "mixed" and (alpha := facts.get(key, float)) not in (None, usual):
            raise UserError(f"{facts}: {key} is {alpha:g}; only {usual:g} is read.")
    return found


def _threshold(weights: Weights, facts: Facts, code_norm: AnyCodeNorm) -> Tensor | None:
    """Of a BatchTopK crosscoder; None for a plain one."""
    weights.drop("k")
    if "threshold" not in weights:
        if facts.get("dict_class", str) == BATCHTOPK:
            raise UserError(f"{facts}: a {BATCHTOPK}, but {weights.path} has no threshold, which inference needs.")
        return None
    if code_norm == "decoupled":
        threshold = weights.take("threshold", 2)
    else:
        threshold = torch.tensor(weights.take_number("threshold"))
    if (threshold < 0).any():
        raise UserError(
            f"{weights.path}: the threshold is {threshold.tolist()}, so it was never measured (the library begins at "
            "step 1000). Without it all positive latents would be active at inference."
        )
    return threshold


def _normaliser(weights: Weights, d: int) -> dict[str, Any]:
    """The normalisation as options of `PretrainedCrosscoder.of`; none where the file has none or has it off."""
    if "activation_mean" not in weights:
        weights.drop(*NORMALISER)
        return {}
    mean, std = (weights.take(name, 2, d, or_nan=True) for name in NORMALISER[:2])
    target = weights.take_number("target_rms") if "target_rms" in weights else 1.0
    c = weights.take("activation_global_scale", *weights.shape("activation_global_scale"))
    if mean.isnan().any() or std.isnan().any():
        return {}
    if c.shape not in ((), (2,)) or not (c > 0).all():
        raise UserError(f"{weights.path}: activation_global_scale is {c.tolist()}, not one or two numbers above 0.")
    variance = std.square().sum() if c.shape == () else std.square().sum(1)
    if (c == 1).all() and not torch.allclose(c, target / (variance + 1e-8).sqrt(), rtol=1e-3):
        raise UserError(
            f"{weights.path}: activation_global_scale is 1, which does not follow from activation_std: activations "
            "were divided by the deviation of each coordinate (keep_relative_variance=False), which is not read."
        )
    return {"input_norm": "affine", "offset": mean, "scale": (1 / c).expand(2)[:, None].contiguous()}


# ---- writing


def check_writable(method: type[Dictionary], input_norm: str) -> None:
    """Raises UserError for what `write` cannot write. Call it before hours of training."""
    if not issubclass(method, L1Crosscoder | BatchTopKCrosscoder | PretrainedCrosscoder):
        raise UserError(f"method: {method.__name__} is no crosscoder of two models.")
    if input_norm not in ("none", AFFINE, *CONSTANT):
        raise UserError(
            f"method.input_norm={input_norm}: the layout has no such normalisation. Train with none, scalar or "
            "shared_scalar."
        )


def write(crosscoder: Dictionary, folder: Path, *, site: str | None = None, models: Sequence[str] = ()) -> None:
    """Write a trained or loaded crosscoder so that crosscoder_learning computes the same codes and reconstructions:
    `BatchTopKCrossCoder.from_pretrained(folder, from_hub=True)`, or `CrossCoder` for one without a threshold.

    site, models  our name of the site, and the names of the base and the chat model, for the metadata

    Raises UserError as `check_writable` does, and for a threshold that was never measured."""
    check_writable(type(crosscoder), crosscoder.norm.kind)
    m, M, d = crosscoder.W_dec.shape
    if M != 2:
        raise UserError(f"method.n_models: {M} models; the format is written for two.")
    assert isinstance(crosscoder, L1Crosscoder | BatchTopKCrosscoder | PretrainedCrosscoder)
    code_norm: AnyCodeNorm = crosscoder.settings.code_norm
    number, name = next((i, theirs) for i, (theirs, ours) in CODE_NORMS.items() if ours == code_norm)
    state: dict[str, Tensor] = {
        "encoder.weight": crosscoder.W_enc.permute(1, 2, 0),
        "encoder.bias": crosscoder.b_enc,
        "decoder.weight": crosscoder.W_dec.transpose(0, 1),
        "decoder.bias": crosscoder.b_dec,
        "code_normalization_id": torch.tensor(number),
        **_normaliser_state(crosscoder),
    }
    config: dict[str, Any] = {"activation_dim": d, "dict_size": m, "num_layers": 2, "code_normalization": name}
    kind = "CrossCoder"
    if (threshold := threshold_of(crosscoder)) is not None:
        kind, k = BATCHTOPK, mean_active(crosscoder)
        if threshold.isnan().any():
            raise UserError("method.threshold_rule: the crosscoder's threshold was never measured: train it longer.")
        state |= {"threshold": threshold, "k": torch.tensor(k, dtype=torch.int32)}
        config["k"] = k
    layer = int(site.partition(".")[2]) if site and site.startswith("resid_post.") else None
    trainer = {"dict_class": kind, "lm_name": "-".join(reversed(models)) or None, "layer": layer, **config}
    with atomically(folder / WEIGHTS[0]) as temporary:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, temporary)
    write_atomically(folder / CONFIG, json.dumps(config, indent=1))  # with dict_class, older versions refuse it
    write_atomically(folder / TRAINER, json.dumps({"trainer": trainer}, indent=1))


def threshold_of(crosscoder: Dictionary) -> Tensor | None:
    """The threshold of v at inference; None for a plain ReLU."""
    if isinstance(crosscoder, PretrainedCrosscoder) and crosscoder.settings.rule == "relu":
        return None
    return crosscoder.threshold if isinstance(crosscoder, BatchTopKCrosscoder | PretrainedCrosscoder) else None


def mean_active(crosscoder: Dictionary) -> int:
    """k as a whole number, as the format has it; inference does not use it."""
    k = crosscoder.settings.k if isinstance(crosscoder, BatchTopKCrosscoder) else None
    k = crosscoder.source.get("k") if isinstance(crosscoder, PretrainedCrosscoder) else k
    return max(1, round(k)) if k else 1


def _normaliser_state(crosscoder: Dictionary) -> Mapping[str, Tensor]:
    """The tensors of the normalisation, consistent: c is target_rms over the root of the summed variances."""
    norm, d = crosscoder.norm, crosscoder.d_model
    if norm.kind == "none":
        return {}
    scale = norm.scale.flatten().expand(2)
    mean = norm.offset if norm.kind == "affine" else torch.zeros(2, d)
    std = scale[:, None].expand(2, d) / d**0.5
    c = 1 / scale
    return dict(zip(NORMALISER, (mean, std, c, torch.tensor(1.0)), strict=True))
