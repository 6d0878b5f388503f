"""Crosscoder checkpoints of both layouts, by hand, and errors for bad ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.errors import UserError
from core.interop import crosscoder

D, M = 3, 5
g = torch.Generator().manual_seed(0)
W_ENC, W_DEC = torch.randn(2, D, M, generator=g), torch.randn(2, M, D, generator=g)  # base, chat
B_ENC, B_DEC, H = torch.randn(M, generator=g), torch.randn(2, D, generator=g), torch.randn(7, 2, D, generator=g)
MINDER = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC, "decoder.bias": B_DEC}
BTK = {"k": torch.tensor(100), "threshold": torch.tensor(0.5), "code_normalization_id": torch.tensor(0)}
KISSANE = {"W_enc": W_ENC, "W_dec": W_DEC.transpose(0, 1).contiguous(), "b_enc": B_ENC, "b_dec": B_DEC}


def forward(c: crosscoder.CrosscoderWeights, h: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[B, m]` and reconstructions `[B, 2, d]`, without the threshold."""
    f = (h.flatten(1) @ c.W_enc.flatten(1).T + c.b_enc).relu()
    return f, torch.einsum("bm,mpd->bpd", f, c.W_dec) + c.b_dec


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "cc_weights.pt"])
def test_both_layouts_give_the_same_codes_as_their_equations(name, prefix, tmp_path):
    state = KISSANE if name == "cc_weights.pt" else MINDER | BTK
    state = {prefix + key: tensor for key, tensor in state.items()}
    save_file(state, tmp_path / name) if name.endswith("s") else torch.save(state, tmp_path / name)
    loaded = crosscoder.read(tmp_path)
    f = torch.relu(H[:, 0] @ W_ENC[0] + H[:, 1] @ W_ENC[1] + B_ENC)
    h_hat = torch.stack([f @ W_DEC[0] + B_DEC[0], f @ W_DEC[1] + B_DEC[1]], 1)
    torch.testing.assert_close(forward(loaded, H), (f, h_hat))
    if name == "cc_weights.pt":
        assert (loaded.layout, loaded.threshold, loaded.k) == ("matrices", None, None)
    else:
        assert (loaded.layout, loaded.threshold, loaded.k, loaded.code_normalization_id) == ("modules", 0.5, 100, 0)


def test_numbers_that_are_not_tensors_are_read_too_and_a_relu_crosscoder_has_no_threshold(tmp_path):
    torch.save(MINDER | {"k": 100, "threshold": 0.5}, tmp_path / "model.pt")
    loaded = crosscoder.read(tmp_path / "model.pt")
    assert (loaded.k, loaded.threshold, loaded.code_normalization_id) == (100, 0.5, None)
    torch.save(MINDER, tmp_path / "model.pt")
    assert crosscoder.read(tmp_path).threshold is None


@pytest.mark.parametrize(
    ("state", "message"),
    [(MINDER | {"decoder.weight": W_ENC}, r"decoder\.weight has the shape \[2, 3, 5\], not \[2, 5, 3\]"),
     (MINDER | {"encoder.weight": W_ENC[0]}, r"encoder\.weight has the shape \[3, 5\], not \[2, d_model, dict_size\]"),
     (MINDER | BTK | {"threshold": torch.tensor(-1.0)}, "threshold is -1, so it was never measured"),
     ({"decoder.weight": W_DEC}, r"has no encoder\.weight"),
     (MINDER | {"decoder.bias": B_DEC * torch.nan}, r"decoder\.bias contains numbers"),
     (MINDER | {"more": B_DEC}, "unknown tensors: more"),
     (KISSANE | {"W_dec": W_DEC}, r"W_dec has the shape \[2, 5, 3\], not \[5, 2, 3\]")],
)  # fmt: skip
def test_the_error_for_a_bad_checkpoint_has_the_reason(state, message, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message):
        crosscoder.read(tmp_path)


def test_a_folder_without_a_crosscoder_and_a_truncated_file_are_named_in_the_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"contains no crosscoder: it has none of model\.safetensors"):
        crosscoder.read(tmp_path)
    save_file(MINDER, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        crosscoder.read(tmp_path)
