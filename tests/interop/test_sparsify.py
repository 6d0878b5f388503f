"""sparsify folders: what the library saves, and errors for bad ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import UserError
from core.interop import sparsify

SCRIPT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from sparsify import SaeConfig
from sparsify.sparse_coder import SparseCoder
arguments = json.loads(sys.argv[1])
x, folder, out = load_file(arguments["rows"])["x"], Path(arguments["folder"]), {}
for name, options in arguments["cases"].items():
    torch.manual_seed(0)
    sae = SparseCoder(x.shape[1], SaeConfig(**options))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape) / 4)
    sae.save_to_disk(folder / name)
    sae = SparseCoder.load_from_disk(folder / name)
    with torch.no_grad():
        top = sae.encode(x)
        codes = torch.zeros(len(x), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
        out[f"{name}/codes"], out[f"{name}/x_hat"] = codes, sae(x).sae_out
save_file({key: value.contiguous() for key, value in out.items()}, arguments["out"])
"""
CASES = {"layers.5": {"k": 5, "num_latents": 80}, "h.2.mlp": {"k": 7, "expansion_factor": 4}}


@pytest.mark.slow
def test_dictionaries_saved_by_the_library_give_the_same_codes_and_reconstructions_here(tmp_path, rows, in_peers):
    save_file({"x": rows}, tmp_path / "rows.safetensors")
    arguments = {"rows": tmp_path / "rows.safetensors", "folder": tmp_path, "cases": CASES}
    in_peers(SCRIPT, {**arguments, "out": tmp_path / "out.safetensors"})
    outputs = load_file(tmp_path / "out.safetensors")
    for name, options in CASES.items():
        method = sparsify.read(tmp_path / name)
        assert method.settings.k == options["k"] and method.source["hook"] == name
        codes = method.encode(rows).dense()
        assert torch.equal(codes > 0, outputs[f"{name}/codes"] > 0)
        torch.testing.assert_close(codes, outputs[f"{name}/codes"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(method.reconstruct(rows), outputs[f"{name}/x_hat"], rtol=1e-5, atol=1e-5)


CFG = {"d_in": 2, "k": 1, "num_latents": 3}
TENSORS = {
    "encoder.weight": torch.tensor([[1.0, 0], [0, 1], [1, 1]]),
    "encoder.bias": torch.zeros(3),
    "W_dec": torch.tensor([[1.0, 0], [0, 1], [1, 1]]),
    "b_dec": torch.tensor([1.0, 0]),
}


def folder_of(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor] = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "sae.safetensors")
    return folder


def test_a_topk_by_hand(tmp_path):
    method = sparsify.read(folder_of(tmp_path, CFG))
    x = torch.tensor([[3.0, 1.0]])  # minus b_dec: [2, 1]; pre-activations 2, 1, 3
    assert method.encode(x).dense().tolist() == [[0, 0, 3]] and method.reconstruct(x).tolist() == [[4, 3]]


@pytest.mark.parametrize(
    ("cfg", "tensors", "message"),
    [(CFG | {"transcode": True}, {}, "transcode=True is not supported"),
     (CFG | {"skip_connection": True}, {}, "skip_connection=True"),
     (CFG | {"activation": "groupmax"}, {}, "activation=groupmax"),
     (CFG | {"signed": True}, {}, "signed=True"),
     (CFG | {"k": None}, {}, "k is null, not a whole number"),
     ({"d_in": 2, "k": 1, "num_latents": 0}, {}, "has no expansion_factor"),
     (CFG | {"num_latents": 4}, {}, r"encoder\.weight has the shape \[3, 2\], not \[4, 2\]"),
     (CFG | {"k": 9}, {}, "k is 9, but the dictionary has only 3 latents"),
     (CFG, {"W_skip": torch.zeros(2, 2)}, "unknown tensors: W_skip"),
     (CFG, {"W_dec": torch.full((3, 2), torch.inf)}, "W_dec contains numbers")],
)  # fmt: skip
def test_the_error_for_a_bad_folder_has_the_reason(cfg, tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sparsify.read(folder_of(tmp_path, cfg, TENSORS | tensors))
