"""Crosscoders of two models: the checkpoints published by Minder et al. 2025 (chat-tuning) and by Kissane et al.

Facts (Minder et al., authors' code): `model.safetensors` or `.pt` with encoder.weight `[2, d, m]`, encoder.bias `[m]`,
decoder.weight `[2, m, d]`, decoder.bias `[2, d]`; BatchTopK files also have k, threshold and code_normalization_id.
Index 0 is the base model, 1 the chat model. In a state saved from a compiled model every name starts with `_orig_mod.`.
With v_j = f_j (|d_j^base| + |d_j^chat|), a BatchTopK crosscoder keeps f_j at inference where v_j > threshold; other ids
mean other definitions of v. Kissane: `cc_weights.pt` with W_enc `[2, d, m]`, W_dec `[m, 2, d]`, b_enc, b_dec `[2, d]`;
ReLU, of activations that are scaled to a mean norm of sqrt(d) in each model.

Shapes here: W_enc and W_dec `[m, 2, d]`, one latent per row, as for pairs in `core.kernels.sparse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from torch import Tensor

from core.errors import UserError
from core.inputs import note_commit, note_file
from core.interop import hub
from core.tensor_files import Weights, read_pt, read_safetensors

FILES = ("model.safetensors", "model.pt", "ae.pt", "cc_weights.pt")  # the first that exists is read
FORMATS: hub.Formats = {name: ((name,), ()) for name in FILES}


@dataclass(frozen=True)
class CrosscoderWeights:
    """f = ReLU(sum over models of W_enc h + b_enc), h_hat = f W_dec + b_dec, for base (0) and chat (1).

    threshold              of v (see above), for BatchTopK; None for a plain ReLU
    k                      mean active latents per row in the training of a BatchTopK crosscoder
    code_normalization_id  the authors' number for the definition of v; None if the file has none (the paper's)
    layout                 `modules` (encoder.weight, ...) or `matrices` (W_enc, ...): names in the file
    source                 the repository or folder, the folder within it and the commit, if `load` read it
    """

    W_enc: Tensor  # [m, 2, d]
    W_dec: Tensor  # [m, 2, d]
    b_enc: Tensor  # [m]
    b_dec: Tensor  # [2, d]
    threshold: float | None
    k: int | None
    code_normalization_id: int | None
    layout: str
    source: Mapping[str, str | None] = field(default_factory=dict)


def load(
    repo: str, path: str | None = None, revision: str | None = None, d_model: int | None = None
) -> CrosscoderWeights:
    """Load a crosscoder.

    repo, path  a name on the hub or a local folder, and the folder (or file) within it
    revision    commit, tag or branch on the hub, `main` if None; ignored for a local folder
    d_model     checked, if given

    Only the checkpoint is fetched from a repository. Raises UserError if it cannot be read or does not fit `d_model`.
    """
    name = PurePosixPath(path or "").name
    formats = {name: FORMATS[name]} if name in FILES else FORMATS
    folder, commit = hub.dictionary_folder(repo, path, revision, formats, node="crosscoder", only_first=True)
    file = _file(folder / name if name in FILES else folder)
    if commit is None:
        note_file(file)
    else:
        note_commit(repo, revision or "main", commit)
    weights = read(file)
    if d_model not in (None, weights.W_dec.shape[2]):
        raise UserError(
            f"model.d_model is {d_model}, but the crosscoder in {file} has {weights.W_dec.shape[2]}. Choose the models "
            "that it was trained on."
        )
    return replace(weights, source={"repo": repo, "path": path, "revision": commit})


def read(path: Path) -> CrosscoderWeights:
    """The crosscoder in a folder or a file.

    Raises UserError for shapes that do not fit a crosscoder, for a threshold that was never measured, and for files
    that are incomplete or contain more than tensors.
    """
    file = _file(path)
    weights = read_safetensors(file) if file.suffix == ".safetensors" else read_pt(file)
    weights = weights.unwrapped()
    crosscoder = _of_matrices(weights) if "W_enc" in weights else _of_modules(weights)
    weights.done()
    return crosscoder


def _file(path: Path) -> Path:
    """The checkpoint of a folder, or the file itself."""
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path} contains no crosscoder: it has none of {', '.join(FILES)}.")
    return file


def _of_modules(weights: Weights) -> CrosscoderWeights:
    d, m = _sizes(weights, "encoder.weight")
    W_enc, W_dec = weights.take("encoder.weight", 2, d, m), weights.take("decoder.weight", 2, m, d)
    b_enc, b_dec = weights.take("encoder.bias", m), weights.take("decoder.bias", 2, d)
    threshold = weights.take_number("threshold") if "threshold" in weights else None
    if threshold is not None and threshold < 0:
        raise UserError(f"{weights.path}: the threshold is {threshold:g}, so it was never measured.")
    return CrosscoderWeights(
        W_enc.permute(2, 0, 1).contiguous(),
        W_dec.transpose(0, 1).contiguous(),
        b_enc,
        b_dec,
        threshold,
        weights.take_whole("k", 1) if "k" in weights else None,
        weights.take_whole("code_normalization_id") if "code_normalization_id" in weights else None,
        "modules",
    )


def _of_matrices(weights: Weights) -> CrosscoderWeights:
    d, m = _sizes(weights, "W_enc")
    W_enc, W_dec = weights.take("W_enc", 2, d, m), weights.take("W_dec", m, 2, d)
    b_enc, b_dec = weights.take("b_enc", m), weights.take("b_dec", 2, d)
    return CrosscoderWeights(W_enc.permute(2, 0, 1).contiguous(), W_dec, b_enc, b_dec, None, None, None, "matrices")


def _sizes(weights: Weights, name: str) -> tuple[int, int]:
    shape = weights.shape(name)
    if len(shape) != 3 or shape[0] != 2:
        raise UserError(
            f"{weights.path}: {name} has the shape {list(shape)}, not [2, d_model, dict_size] as in a crosscoder."
        )
    return shape[1], shape[2]
