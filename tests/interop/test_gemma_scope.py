"""Gemma Scope's `params.npz`: by hand, and errors for bad files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import UserError
from core.interop import gemma_scope

ARRAYS: dict[str, Any] = {
    "W_enc": np.array([[1, 0, 1], [0, 1, 1]], np.float32),
    "W_dec": np.array([[1, 0], [0, 1], [1, 1]], np.float32),
    "b_enc": np.zeros(3, np.float32),
    "b_dec": np.array([1, 0], np.float32),
    "threshold": np.array([0.5, 1, 3.5], np.float32),
}


def file_of(folder: Path, **changes: Any) -> Path:
    np.savez(folder / "params.npz", **{name: a for name, a in (ARRAYS | changes).items() if a is not None})
    return folder / "params.npz"


def test_the_encoder_sees_the_raw_input_and_every_latent_has_its_threshold(tmp_path):
    method = gemma_scope.read(file_of(tmp_path))
    x = torch.tensor([[3.0, 1.0]])  # pre-activations 3, 1, 4; an entry at its threshold is not active
    assert method.encode(x).dense().tolist() == [[3, 0, 4]] and method.reconstruct(x).tolist() == [[8, 4]]


@pytest.mark.parametrize(
    ("repo", "path", "hook"),
    [("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_41", "blocks.12.hook_resid_post"),
     ("google/gemma-scope-9b-pt-mlp", "layer_3/width_16k/average_l0_5/params.npz", "blocks.3.hook_mlp_out"),
     ("google/gemma-scope-9b-pt-res-canonical", "layer_3/width_16k/canonical", "blocks.3.hook_resid_post"),
     ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", None), ("/tmp/x", "", None)],
)  # fmt: skip
def test_the_site_is_read_from_the_names(repo, path, hook):
    assert gemma_scope.hook(repo, path) == hook


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"threshold": None}, r"params\.npz has no threshold; it contains W_dec, W_enc, b_dec, b_enc\."),
     ({"W_enc": None}, r"params\.npz has no W_enc; it contains W_dec, b_dec"),
     ({"W_enc": np.zeros(3)}, r"W_enc has the shape \[3\]"),
     ({"W_dec": np.zeros((2, 3))}, r"W_dec has the shape \[2, 3\], not \[3, 2\]"),
     ({"b_dec": np.array([np.nan, 0])}, "b_dec contains numbers that are NaN"),
     ({"b_dec": np.array([{"a": 1}, None], object)}, r"b_dec\.npy holds object, not numbers"),
     ({"b_dec": np.array(["a", "b"])}, "holds <U1, not numbers"),
     ({"more": np.zeros(2)}, "unknown tensors: more")],
)  # fmt: skip
def test_the_error_for_a_bad_file_has_the_reason(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        gemma_scope.read(file_of(tmp_path, **changes))


def test_truncated_wrong_and_missing_files_are_named_in_the_error(tmp_path):
    file = file_of(tmp_path)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x93NUMPY", b"text"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"params\.npz is not a complete \.npz of numbers"):
            gemma_scope.read(file)
    file.unlink()
    with pytest.raises(UserError, match=r"params\.npz is missing"):
        gemma_scope.read(file)
