"""sparsify folders (EleutherAI): `cfg.json` and `sae.safetensors`. TopK dictionaries.

Facts, from the library (1.3.3): f = the k largest entries of ReLU(encoder.weight (x - b_dec) + encoder.bias), x_hat =
f W_dec + b_dec, with encoder.weight and W_dec both `[m, d]`. The name of the folder is the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import UserError
from core.methods.pretrained import Pretrained
from core.reading import read_object
from core.tensor_files import read_safetensors

CFG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(folder: Path) -> Pretrained:
    """The dictionary in a folder. Raises UserError for transcoders, GroupMax and incomplete files."""
    path = folder / CFG
    cfg = read_object(path)
    for key, plain in (("transcode", False), ("skip_connection", False), ("signed", False), ("activation", "topk")):
        if cfg.get(key, plain) != plain:
            raise UserError(f"{path}: {key}={cfg[key]} is not supported; only TopK dictionaries are.")
    weights = read_safetensors(folder / WEIGHTS)
    d, k = _whole(cfg, "d_in", path), _whole(cfg, "k", path)
    m = _whole(cfg, "num_latents", path) if cfg.get("num_latents") else d * _whole(cfg, "expansion_factor", path)
    W_enc, W_dec = weights.take("encoder.weight", m, d), weights.take("W_dec", m, d)
    b_enc, b_dec = weights.take("encoder.bias", m), weights.take("b_dec", d)
    weights.done()
    source = {"format": "sparsify", "hook": folder.resolve().name, "model": None}
    return Pretrained.of(W_enc, W_dec, b_enc, b_dec, activation="topk", k=k, subtract_b_dec=True, source=source)


def _whole(cfg: dict[str, Any], key: str, path: Path) -> int:
    value = cfg.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key} is {value!r}, not a whole number above 0.")
    return value
