"""dictionary_learning folders: what the library saves, cases by hand, and errors for bad ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import UserError
from core.interop import dictionary_learning

CLASSES = [*dictionary_learning.READERS, "AutoEncoder of unit rows"]
SCRIPT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from dictionary_learning import dictionary, trainers
from dictionary_learning.utils import load_dictionary
arguments = json.loads(sys.argv[1])
x, folder, out = load_file(arguments["rows"])["x"], Path(arguments["folder"]), {}
d, m, k = x.shape[1], 80, 5
make = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(d, m),
    "AutoEncoder of unit rows": lambda: dictionary.AutoEncoder(d, m),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(d, m),
    "AutoEncoderTopK": lambda: trainers.top_k.AutoEncoderTopK(d, m, k),
    "BatchTopKSAE": lambda: trainers.batch_top_k.BatchTopKSAE(d, m, k),
    "MatryoshkaBatchTopKSAE": lambda: trainers.matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(d, m, k, [30, 50]),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(d, m),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(d, m),
}
for name in arguments["classes"]:
    torch.manual_seed(len(name))
    ae, kind = make[name](), name.split()[0]
    with torch.no_grad():
        for key, p in ae.named_parameters():
            p.copy_(torch.rand(p.shape) if key == "threshold" else torch.randn(p.shape) / 4)
        if "unit" in name:
            ae.decoder.weight /= ae.decoder.weight.norm(dim=0)
        if "BatchTopK" in name:
            ae.threshold.fill_(0.4)
    place = folder / name
    place.mkdir()
    torch.save(ae.state_dict(), place / "ae.pt")
    trainer = {"dict_class": kind, "layer": 8, "lm_name": "EleutherAI/pythia-160m-deduped", "submodule_name": None}
    if "TopK" in kind:
        trainer["k"] = k
    (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    ae = load_dictionary(str(place), "cpu")[0]
    with torch.no_grad():
        out[f"{name}/codes"] = ae.encode(x)
        out[f"{name}/x_hat"] = ae.decode(out[f"{name}/codes"])
save_file({key: value.contiguous() for key, value in out.items()}, arguments["out"])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, rows, in_peers) -> tuple[Path, dict[str, Tensor]]:
    """Folders that the library saved, and the codes and reconstructions that it computes from them."""
    folder = tmp_path_factory.mktemp("saved")
    save_file({"x": rows}, folder / "rows.safetensors")
    arguments = {"rows": folder / "rows.safetensors", "folder": folder, "classes": CLASSES}
    in_peers(SCRIPT, {**arguments, "out": folder / "out.safetensors"})
    return folder, load_file(folder / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_dictionaries_saved_by_the_library_give_the_same_codes_and_reconstructions_here(name, saved, rows):
    folder, outputs = saved
    method = dictionary_learning.read(folder / name)
    codes = method.encode(rows).dense()
    assert 0 < int((codes > 0).sum()) < 0.9 * codes.numel()
    assert torch.equal(codes > 0, outputs[f"{name}/codes"] > 0)
    torch.testing.assert_close(codes, outputs[f"{name}/codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method.reconstruct(rows), outputs[f"{name}/x_hat"], rtol=1e-5, atol=1e-5)
    assert method.source["hook"] == "resid_post_layer_8"


TENSORS = {
    "encoder.weight": torch.tensor([[1.0, 0], [0, 1], [1, 1]]),
    "encoder.bias": torch.zeros(3),
    "decoder.weight": torch.tensor([[1.0, 0, 1], [0, 1, 1]]),
    "b_dec": torch.tensor([1.0, 0]),
}


def folder_of(folder: Path, state: Any, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


def test_batchtopk_and_topk_by_hand(tmp_path):
    x = torch.tensor([[3.0, 1.0]])  # minus b_dec: [2, 1]; pre-activations 2, 1, 3
    state = TENSORS | {"k": torch.tensor(1), "threshold": torch.tensor(1.5)}
    top = dictionary_learning.read(folder_of(tmp_path / "top", state, dict_class="AutoEncoderTopK", k=1))
    assert top.encode(x).dense().tolist() == [[0, 0, 3]] and top.reconstruct(x).tolist() == [[4, 3]]
    batch = dictionary_learning.read(folder_of(tmp_path / "batch", state, dict_class="BatchTopKSAE", k=1))
    assert batch.encode(x).dense().tolist() == [[2, 0, 3]] and batch.reconstruct(x).tolist() == [[6, 3]]


def test_k_of_older_files_comes_from_the_configuration(tmp_path):
    method = dictionary_learning.read(folder_of(tmp_path, TENSORS, dict_class="AutoEncoderTopK", k=2))
    assert method.settings.k == 2


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm-was-done",)


@pytest.mark.parametrize(
    ("state", "trainer", "message"),
    [(TENSORS, {"dict_class": "CrossCoder"}, "dict_class 'CrossCoder' is not supported"),
     (TENSORS, {}, "dict_class None is not supported"),
     (TENSORS | {"k": torch.tensor(1)}, {"dict_class": "AutoEncoderTopK", "k": 3}, r"trainer\.k is 3, but .* has k=1"),
     (TENSORS | {"k": torch.tensor(1), "threshold": torch.tensor(-1.0)}, {"dict_class": "BatchTopKSAE"},
      "the threshold is -1, so it was never measured"),
     (TENSORS, {"dict_class": "AutoEncoder"}, "has no bias; it contains b_dec"),
     (TENSORS | {"b_dec": torch.ones(5)}, {"dict_class": "AutoEncoderTopK", "k": 1}, r"b_dec has the shape \[5\]"),
     (TENSORS | {"b_dec": torch.ones(2) * torch.nan}, {"dict_class": "AutoEncoderTopK", "k": 1},
      "b_dec contains numbers"),
     (TENSORS | {"more": torch.ones(1)}, {"dict_class": "AutoEncoderTopK", "k": 1}, "unknown tensors: more"),
     (torch.ones(3), {"dict_class": "AutoEncoder"}, "contains Tensor, not a dictionary"),
     ({"encoder.weight": "text"}, {"dict_class": "AutoEncoder"}, "contains more than tensors: encoder.weight"),
     (TENSORS | {"b_dec": Harmful()}, {"dict_class": "AutoEncoderTopK", "k": 1}, r"contains a pickled \w+\.mkdir"),
     (Harmful(), {"dict_class": "AutoEncoderTopK", "k": 1}, "pickled objects are not read, since they can run code")],
)  # fmt: skip
def test_the_error_for_a_bad_folder_has_the_reason(state, trainer, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        dictionary_learning.read(folder_of(tmp_path / "a", state, **trainer))
    assert not Path("harm-was-done").exists()


def test_truncated_and_missing_files_are_named_in_the_error(tmp_path):
    folder = folder_of(tmp_path, TENSORS, dict_class="AutoEncoderTopK", k=1)
    whole = (folder / "ae.pt").read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 50):
        (folder / "ae.pt").write_bytes(whole[:n])
        with pytest.raises(UserError, match=r"ae\.pt is not a complete file of tensors only"):
            dictionary_learning.read(folder)
    (folder / "ae.pt").unlink()
    with pytest.raises(UserError, match=r"ae\.pt is missing"):
        dictionary_learning.read(folder)
