"""Gemma Scope: `params.npz` (Lieberum et al. 2024). JumpReLU dictionaries of the raw activations.

f = z where z > threshold_i, z = x W_enc + b_enc; x_hat = f W_dec + b_dec; W_enc is `[d, m]`, W_dec `[m, d]`. b_dec is
not subtracted before encoding. The site and the model are in the names of the repository and the folder, not in the
file. BOS, EOS and padding were left out of the training, on contexts of 1024 tokens (sec. 3.2).
"""

from __future__ import annotations

import re
from pathlib import Path

from core.errors import UserError
from core.methods.pretrained import Pretrained
from core.tensor_files import read_npz

PARAMS = "params.npz"
KINDS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def read(file: Path, repo: str = "", path: str = "") -> Pretrained:
    """The dictionary in a `params.npz`. `repo` and `path` are names from which the site may be known.

    Raises UserError if the file is incomplete or lacks an array.
    """
    weights = read_npz(file).unwrapped()
    shape = weights.shape("W_enc")
    if len(shape) != 2:
        raise UserError(f"{file}: W_enc has the shape {list(shape)}, not [d_model, dict_size].")
    d, m = shape
    W_enc, W_dec = weights.take("W_enc", d, m), weights.take("W_dec", m, d)
    b_enc, b_dec, threshold = weights.take("b_enc", m), weights.take("b_dec", d), weights.take("threshold", m)
    weights.done()
    return Pretrained.of(
        W_enc.T,
        W_dec,
        b_enc,
        b_dec,
        activation="jumprelu",
        threshold=threshold,
        subtract_b_dec=False,
        source={
            "format": "gemma_scope",
            "hook": hook(repo, path),
            "model": model(repo),
            "trained": {"left_out": "special tokens", "context_size": 1024},
        },
    )


def hook(repo: str, path: str) -> str | None:
    """TransformerLens' name of the site: `google/gemma-scope-2b-pt-res`, `layer_12/...` -> `blocks.12.hook_resid_post`.
    None if the names do not contain it."""
    kind = re.search(r"-(res|mlp|att)(?:-|/|$)", repo)
    layer = re.search(r"(?:^|/)layer_([0-9]{1,4})(?:/|$)", path)
    return f"blocks.{layer[1]}.{KINDS[kind[1]]}" if kind and layer else None


def model(repo: str) -> str | None:
    """The model's name on the hub: `google/gemma-scope-2b-pt-res` -> `google/gemma-2-2b`."""
    match = re.search(r"gemma-scope-(\d{1,3}b)-(pt|it)-", repo)
    return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}" if match else None
