"""Meta-SAEs as their authors released them: the layout of the files, both rules for codes, errors for bad files."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.analysis.meta_sae import score
from core.errors import UserError
from core.interop import meta_saes
from core.interop.loading import load
from core.methods.batchtopk import BatchTopK

CFG: dict[str, Any] = {  # keys of the released file
    "seed": 49, "epochs": 5000, "batch_size": 16384, "lr": 0.001, "l1_coeff": 0, "beta1": 0.9, "beta2": 0.99,
    "max_grad_norm": 100000, "dtype": "torch.float32", "model_name": "gpt2-small", "site": "resid_pre", "layer": 8,
    "act_size": 2, "dict_size": 3, "input_unit_norm": False, "sae_type": "topk", "architecture": "standard",
    "n_batches_to_dead": 100, "top_k": 1, "top_k_aux": 512, "aux_penalty": 0.0625,
    "hook_point": "blocks.8.hook_resid_pre", "threshold": None, "cosine_penalty": 0.0,
}  # fmt: skip
TENSORS = {
    "b_dec": torch.tensor([1.0, 0]),
    "b_enc": torch.full((3,), 100.0),  # not used by codes
    "W_enc": torch.tensor([[1.0, 0, 1], [0, 1, 1]]),
    "W_dec": torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]),
}


def folder_of(folder: Path, cfg: dict[str, Any] = CFG, tensors: dict[str, Tensor] = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Config.json").write_text(json.dumps(cfg))
    torch.save(OrderedDict(tensors), folder / "SAE.pt")
    return folder


def test_codes_with_a_threshold_and_over_the_whole_batch_by_hand(tmp_path):
    method = load(2, str(folder_of(tmp_path)), threshold=1.5, site="resid_pre.8")
    x = torch.tensor([[3.0, 1.0], [1.5, 0.0]])  # minus b_dec: [2, 1], [.5, 0]; pre-activations 2, 1, 3; .5, 0, .5
    assert isinstance(method, BatchTopK)
    assert method.encode(x).dense().tolist() == [[2, 0, 3], [0, 0, 0]]
    torch.testing.assert_close(method.reconstruct(x), torch.tensor([[1 + 2 + 1.8, 2.4], [1, 0]]))
    assert method.encode_batch(x).dense().tolist() == [[2, 0, 3], [0, 0, 0]]  # k = 1 on average: two of six
    assert method.hyperparameters()["dead_after_tokens"] == 1_638_400 and method.hyperparameters()["k"] == 1


def test_a_released_meta_sae_can_be_scored_like_our_own(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 2, generator=g), dim=1)
    meta = meta_saes.read(folder_of(tmp_path, CFG, TENSORS | {"b_dec": torch.zeros(2)}), threshold=0.5)
    metrics = score(meta, rows).metrics()
    together = meta.decode(meta.encode_batch(rows)).detach()
    assert metrics["ve_uncentred"] == pytest.approx(1 - float((rows - together).square().sum() / rows.square().sum()))


def test_the_threshold_comes_from_the_file_or_must_be_set(tmp_path):
    assert float(meta_saes.read(folder_of(tmp_path, CFG | {"threshold": 0.25})).threshold) == 0.25
    folder = folder_of(tmp_path)
    assert meta_saes.read(folder).threshold.isnan()
    with pytest.raises(UserError, match=r"method\.threshold: .* without the threshold .* 0\.153"):
        load(2, str(folder))
    with pytest.raises(UserError, match=r"method\.norm_scaling_factor: the format meta_saes does not use it"):
        load(2, str(folder), threshold=0.1, norm_scaling_factor=2.0)
    with pytest.raises(UserError, match=r"Set stream\.site=resid_pre\.8"):
        load(2, str(folder), threshold=0.1, site="resid_pre.4")


def test_per_token_standardisation_is_read(tmp_path):
    method = meta_saes.read(folder_of(tmp_path, CFG | {"input_unit_norm": True}), threshold=0.0)
    x = torch.tensor([[3.0, 1.0]])  # mean 2, standard deviation sqrt(2)
    normalised, shift = method.norm(x)
    torch.testing.assert_close(normalised, torch.tensor([[1.0, -1.0]]) / 2**0.5)
    torch.testing.assert_close(method.norm.undo(normalised, shift), x)


@pytest.mark.parametrize(
    ("cfg", "tensors", "message"),
    [({"sae_type": "jumprelu"}, {}, "sae_type='jumprelu', architecture='standard' is not supported"),
     ({"architecture": "gated"}, {}, "architecture='gated'"),
     ({"top_k": None}, {}, "top_k is null, not a whole number"),
     ({"top_k": 4}, {}, "top_k is 4, but there are only 3 latents"),
     ({"dict_size": 4}, {}, r"W_enc has the shape \[2, 3\], not \[2, 4\]"),
     ({"lr": "fast"}, {}, "lr is 'fast', not a finite number"),
     ({}, {"log_threshold": torch.zeros(3)}, "unknown tensors: log_threshold"),
     ({}, {"W_dec": torch.full((3, 2), torch.nan)}, "W_dec contains numbers")],
)  # fmt: skip
def test_the_error_for_a_bad_folder_has_the_reason(cfg, tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        meta_saes.read(folder_of(tmp_path, CFG | cfg, TENSORS | tensors))


def test_a_file_with_more_than_tensors_is_not_unpickled(tmp_path):
    folder = folder_of(tmp_path)
    torch.save({"W_enc": Path("/")}, folder / "SAE.pt")
    with pytest.raises(UserError, match="pickled objects are not read"):
        meta_saes.read(folder)
