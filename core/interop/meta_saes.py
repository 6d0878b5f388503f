"""Meta-SAEs as Leask et al. released them: `Config.json` and `SAE.pt`. BatchTopK dictionaries of decoder rows.

Facts (the files of `pleask/gpt2-small_blocks.8.hook_resid_pre_2304_topk_4_0.001_2000` on the hub; the authors' package
meta_saes): SAE.pt is a state dict of W_enc `[d, m]`, W_dec `[m, d]`, b_enc `[m]` and b_dec `[d]`. Codes are the N k
largest entries of ReLU((x - b_dec) W_enc) over all N rows, or those above a threshold that the caller gives; b_enc is
not used. Config.json has act_size d, dict_size m, top_k k, the site of the dictionary that the rows come from
(hook_point), and the settings of the training. Its `sae_type` is `topk`, the package's default, although the scripts
load it as BatchTopK. Its `threshold` is null; for the released one (2304 meta-latents of 49152 rows) the authors use
0.153. input_unit_norm, which is false there, is a per-token standardisation that is undone without the 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from core.errors import UserError
from core.methods.batchtopk import BatchTopK
from core.reading import field, optional_field, read_object
from core.tensor_files import read_pt

CONFIG, WEIGHTS = "Config.json", "SAE.pt"
TYPES = ("topk", "batchtopk")

T = TypeVar("T")


def read(folder: Path, threshold: float | None = None) -> BatchTopK:
    """The dictionary in a folder, with the settings of its training.

    threshold  for inference; None takes that of Config.json. If both are None, `finish` can still measure it on rows

    Raises UserError for unknown settings, and for files that are incomplete or contain more than tensors.
    """
    path = folder / CONFIG
    cfg = read_object(path)
    kind, architecture = field(cfg, "sae_type", str, path), optional_field(cfg, "architecture", str, path)
    if kind not in TYPES or architecture not in (None, "standard"):
        what = f"sae_type={kind!r:.80}, architecture={architecture!r:.80}"
        raise UserError(f"{path}: {what} is not supported; sae_type {' and '.join(TYPES)} are.")
    d, m, k = (_above_zero(cfg, key, path) for key in ("act_size", "dict_size", "top_k"))
    if k > m:
        raise UserError(f"{path}: top_k is {k}, but there are only {m} latents.")
    weights = read_pt(folder / WEIGHTS).unwrapped()
    state = {
        "W_enc": weights.take("W_enc", d, m).T,
        "W_dec": weights.take("W_dec", m, d),
        "b_enc": weights.take("b_enc", m),
        "b_dec": weights.take("b_dec", d),
    }
    weights.done()
    method = BatchTopK(**_options(cfg, d, m, k, path))
    threshold = optional_field(cfg, "threshold", float, path) if threshold is None else threshold
    state["threshold"] = torch.tensor(torch.nan if threshold is None else threshold)
    method.load_state_dict(method.state_dict() | state)
    return method.eval()


def hook(folder: Path) -> str | None:
    """TransformerLens' name of the site of the dictionary that the rows come from; None if it is not given."""
    path = folder / CONFIG
    return optional_field(read_object(path), "hook_point", str, path)


def _options(cfg: Mapping[str, Any], d: int, m: int, k: int, path: Path) -> dict[str, Any]:
    """The arguments of `BatchTopK`. Missing settings of the training get the package's defaults."""

    def given(key: str, default: T) -> T:
        value = optional_field(cfg, key, type(default), path)
        return default if value is None else value

    return {
        "d_model": d,
        "dict_size": m,
        "k": k,
        "use_enc_bias": False,
        "enc_init_norm": None,
        "threshold_rule": "posthoc_mean",
        "threshold_ema_rate": 0.01,
        "aux": "r2_compat",
        "aux_coefficient": given("aux_penalty", 1 / 32),
        "k_aux": given("top_k_aux", 512),
        "lr": given("lr", 3e-4),
        "betas": (given("beta1", 0.9), given("beta2", 0.99)),
        "input_norm": "layer_norm" if given("input_unit_norm", False) else "none",
        "seed": given("seed", 49),
        "b_dec_init": "zeros",
        "decoder_norm": "before_step",
        "dead_after_tokens": given("n_batches_to_dead", 5) * given("batch_size", 4096),
        "grad_clip": given("max_grad_norm", 1e5),
        "warmup_steps": 0,
        "decay_fraction": 0.0,
        "path": "auto",
    }


def _above_zero(cfg: Mapping[str, Any], key: str, path: Path) -> int:
    value = field(cfg, key, int, path)
    if value < 1:
        raise UserError(f"{path}: {key} is {value}, not a whole number above 0.")
    return value
