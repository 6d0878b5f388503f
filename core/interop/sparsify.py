"""sparsify folders (EleutherAI): `cfg.json` and `sae.safetensors`. TopK dictionaries.

Facts, from the library (1.3.3): f = the k largest entries of ReLU(encoder.weight (x - b_dec) + encoder.bias), x_hat =
f W_dec + b_dec, with encoder.weight and W_dec both `[m, d]`. The name of the folder is the site; with several seeds it
is the name of the folder above (`layers.3/seed1`). The folder of the run holds `config.json`: model, dataset, ctx_len
and exclude_tokens, ids that the dictionary never saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.interop.hooks import site_of
from core.interop.training_facts import TrainingFacts
from core.methods.pretrained import Pretrained
from core.reading import field, optional_field, read_object
from core.tensor_files import read_safetensors

CFG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"


def read(folder: Path) -> Pretrained:
    """The dictionary in a folder. Raises UserError for transcoders, GroupMax and incomplete files."""
    path = folder / CFG
    cfg = read_object(path)
    for key in ("transcode", "skip_connection", "signed"):
        if optional_field(cfg, key, bool, path):
            raise UserError(f"{path}: {key}=True is not supported; only TopK dictionaries are.")
    if (activation := optional_field(cfg, "activation", str, path) or "topk") != "topk":
        raise UserError(f"{path}: activation={activation:.80} is not supported; only TopK dictionaries are.")
    d, k, m = _above_zero(cfg, "d_in", path), _above_zero(cfg, "k", path), optional_field(cfg, "num_latents", int, path)
    m = m or d * _above_zero(cfg, "expansion_factor", path)
    weights = read_safetensors(folder / WEIGHTS).unwrapped()
    W_enc, W_dec = weights.take("encoder.weight", m, d), weights.take("W_dec", m, d)
    b_enc, b_dec = weights.take("encoder.bias", m), weights.take("b_dec", d)
    weights.done()
    source = {"format": "sparsify", "hook": hook(folder), **_of_run(folder)}
    return Pretrained.of(W_enc, W_dec, b_enc, b_dec, activation="topk", k=k, subtract_b_dec=True, source=source)


def hook(folder: Path) -> str:
    """The site as the library calls it: the first of the folder's name, that of what it links to, and those of the
    folders above, that is a name of a site; the folder's own name if there is none."""
    names = [place.name for place in _places(folder)]
    return next((name for name in names if site_of(name)), names[0])


def run_config(folder: Path) -> Path | None:
    """The file with the settings of the run that the dictionary is from, if it is there."""
    above = (place.parent / RUN for place in _places(folder))
    return next((path for path in above if path.is_file()), None)


def _places(folder: Path) -> Iterator[Path]:
    named, real = folder.absolute(), folder.resolve()
    yield from (named, real, named.parent, real.parent)


def _of_run(folder: Path) -> dict[str, Any]:
    """The model and the facts of the training, from the run's folder."""
    path = run_config(folder)
    run = {} if path is None else read_object(path)
    if path is None or not isinstance(run.get("sae"), dict):  # another file of this name
        return {"model": None, "trained": {}}
    facts: TrainingFacts = {}
    for ours, theirs, kind in (("dataset", "dataset", str), ("context_size", "ctx_len", int)):
        if (value := optional_field(run, theirs, kind, path)) is not None:
            facts[ours] = value
    left_out = optional_field(run, "exclude_tokens", list, path) or []
    if left_out:
        facts["left_out"] = [field({"exclude_tokens": token}, "exclude_tokens", int, path) for token in left_out]
    return {"model": optional_field(run, "model", str, path), "trained": facts}


def _above_zero(cfg: dict[str, Any], key: str, path: Path) -> int:
    value = field(cfg, key, int, path)
    if value < 1:
        raise UserError(f"{path}: {key} is {value}, not a whole number above 0.")
    return value
