"""SAELens folders: round trips through the library itself, cases by hand, and errors for bad ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import UserError
from core.interop import saelens
from core.methods.base import DictionaryMethod
from core.methods.pretrained import Pretrained

OURS: dict[str, tuple[str, dict[str, Any]]] = {  # dictionaries that we write and the library loads
    "relu": ("relu_l1", {"input_norm": "none"}),
    "relu of the raw input": ("oneill_sae", {"input_norm": "none"}),
    "relu, scalar": ("relu_l1", {"input_norm": "scalar"}),
    "relu, token_std": ("relu_l1", {"input_norm": "token_std"}),
    "topk": ("topk", {"input_norm": "none"}),
    "topk with bias, scalar": ("topk", {"input_norm": "scalar", "use_enc_bias": True}),
    "batchtopk": ("batchtopk", {"input_norm": "none"}),
    "batchtopk, token_std": ("batchtopk", {"input_norm": "token_std"}),
    "jumprelu": ("jumprelu", {"input_norm": "none"}),
    "jumprelu, scalar": ("jumprelu", {"input_norm": "scalar", "subtract_b_dec": True}),
}
THEIRS: dict[str, dict[str, Any]] = {  # dictionaries that the library saves: class, options, and way of saving
    "standard": {"class": "StandardSAE"},
    "standard, raw input": {"class": "StandardSAE", "apply_b_dec_to_input": False},
    "standard, layer_norm": {"class": "StandardSAE", "normalize_activations": "layer_norm"},
    "standard, constant_norm_rescale": {"class": "StandardSAE", "normalize_activations": "constant_norm_rescale"},
    "topk": {"class": "TopKSAE", "k": 5},
    "topk, rescaled": {"class": "TopKSAE", "k": 5, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"class": "JumpReLUSAE"},
    "jumprelu, layer_norm": {"class": "JumpReLUSAE", "normalize_activations": "layer_norm"},
    "gated": {"class": "GatedSAE"},
    "batchtopk for inference": {"class": "BatchTopKTrainingSAE", "k": 5, "inference": True},
    "batchtopk, folded": {"class": "BatchTopKTrainingSAE", "k": 5, "inference": True, "fold": 0.3},
    "matryoshka checkpoint": {
        "class": "MatryoshkaBatchTopKTrainingSAE",
        "k": 5,
        "matryoshka_widths": [20, 80],
        "inference": False,
    },
    "batchtopk checkpoint": {"class": "BatchTopKTrainingSAE", "k": 5, "inference": False},
    "topk for inference": {"class": "TopKTrainingSAE", "k": 5, "inference": True},
    "jumprelu for inference": {"class": "JumpReLUTrainingSAE", "inference": True},
}  # fmt: skip
SCRIPT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
import sae_lens.saes as saes
from sae_lens import SAE
arguments = json.loads(sys.argv[1])
x, folder, out = load_file(arguments["rows"])["x"], Path(arguments["folder"]), {}
def keep(name, sae, where):
    with torch.no_grad():
        f = sae.encode(x)
        f = f.to_dense() if f.is_sparse else f
        out[f"{where}/{name}/codes"], out[f"{where}/{name}/x_hat"] = f, sae(x)
for name in arguments["ours"]:
    keep(name, SAE.load_from_disk(folder / "ours" / name), "ours")
for name, options in arguments["theirs"].items():
    torch.manual_seed(len(name))
    kind, inference = options.pop("class"), options.pop("inference", None)
    fold = options.pop("fold", None)
    cls = getattr(saes, kind)
    sae = cls(getattr(saes, kind + "Config")(d_in=x.shape[1], d_sae=80, **options))
    with torch.no_grad():
        for key, p in sae.named_parameters():
            p.copy_(torch.rand(p.shape) if "threshold" in key else torch.randn(p.shape) / 4)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(0.4, dtype=torch.double)
        if fold:
            sae.fold_activation_norm_scaling_factor(fold)
    place = folder / "theirs" / name
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2-small", "blocks.4.hook_resid_pre"
    (sae.save_inference_model if inference else sae.save_model)(place)
    if inference is not None:  # compare with the library's own inference class
        sae.save_inference_model(folder / "as" / name)
        sae = SAE.load_from_disk(folder / "as" / name)
    keep(name, sae, "theirs")
save_file({k: v.contiguous() for k, v in out.items()}, arguments["out"])
"""


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory, rows, dictionary, in_peers) -> tuple[Path, dict[str, Tensor]]:
    """The folder with dictionaries that we wrote (`ours`) and that SAELens wrote (`theirs`), and SAELens' codes and
    reconstructions of both."""
    folder = tmp_path_factory.mktemp("exchanged")
    save_file({"x": rows}, folder / "rows.safetensors")
    for name, (method, changes) in OURS.items():
        saelens.write(dictionary(method, **changes), folder / "ours" / name, site="resid_pre.4", model="gpt2-small")
    arguments = {"rows": folder / "rows.safetensors", "folder": folder, "ours": list(OURS), "theirs": THEIRS}
    in_peers(SCRIPT, {**arguments, "out": folder / "out.safetensors"})
    return folder, load_file(folder / "out.safetensors")


def assert_equal(method: DictionaryMethod, x: Tensor, outputs: dict[str, Tensor], key: str) -> None:
    codes = method.encode(method.norm(x)[0]).dense()
    assert 0 < int((codes > 0).sum()) < 0.9 * codes.numel()
    assert torch.equal(codes > 0, outputs[f"{key}/codes"] > 0)  # the same L0
    torch.testing.assert_close(outputs[f"{key}/codes"], codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[f"{key}/x_hat"], method.reconstruct(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OURS))
def test_saelens_computes_the_same_codes_and_reconstructions_from_our_files(name, exchanged, rows, dictionary):
    method, changes = OURS[name]
    assert_equal(dictionary(method, **changes), rows, exchanged[1], f"ours/{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(THEIRS))
def test_dictionaries_saved_by_saelens_give_the_same_codes_and_reconstructions_here(name, exchanged, rows):
    folder, outputs = exchanged
    method = saelens.read(folder / "theirs" / name)
    assert_equal(method, rows, outputs, f"theirs/{name}")
    assert method.source["hook"] == "blocks.4.hook_resid_pre"


def folder_of(folder: Path, cfg: dict[str, Any], **tensors: Tensor) -> Path:
    """A folder with d = 2, m = 3 and a hand-written encoder and decoder."""
    base = {
        "W_enc": torch.tensor([[1.0, 0, 1], [0, 1, 1]]),
        "W_dec": torch.tensor([[1.0, 0], [0, 2], [0, 0]]),
        "b_enc": torch.zeros(3),
        "b_dec": torch.tensor([1.0, 0]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({"d_in": 2, "d_sae": 3, **cfg}))
    save_file(
        {name: tensor for name, tensor in (base | tensors).items() if tensor is not None}, folder / saelens.WEIGHTS
    )
    return folder


X = torch.tensor([[3.0, 1.0]])
NEW = {"metadata": {"sae_lens_version": "6.18.0", "hook_name": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}}
OLD = {
    "hook_point": "blocks.8.hook_resid_pre",
    "model_name": "gpt2-small",
    "hook_point_layer": 8,
    "l1_coefficient": 8e-5,
}


def codes(method: Pretrained, x: Tensor = X) -> list[list[float]]:
    return method.encode(method.norm(x)[0]).dense().tolist()


@pytest.mark.parametrize("cfg", [OLD, {"architecture": "standard", **NEW}])
def test_old_and_new_keys_give_the_same_dictionary(cfg, tmp_path):
    method = saelens.read(folder_of(tmp_path, cfg))
    assert codes(method) == [[2, 1, 3]] and method.reconstruct(X).tolist() == [[3, 2]]
    assert method.source["hook"] == "blocks.8.hook_resid_pre" and method.source["model"] == "gpt2-small"


def test_an_old_topk_is_recognised_by_its_activation_function(tmp_path):
    cfg = {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1}, "apply_b_dec_to_input": False}
    method = saelens.read(folder_of(tmp_path, cfg))
    assert method.settings.activation == "topk" and codes(method) == [[0, 0, 4]]


def test_the_selection_uses_the_norms_of_decoder_rows_if_the_file_says_so(tmp_path):
    cfg = {"architecture": "topk", "k": 1, "rescale_acts_by_decoder_norm": True, **NEW}
    x = torch.tensor([[2.0, 0.8]])  # pre-activations 1, 0.8, 1.8 times norms 1, 2, 0
    method = saelens.read(folder_of(tmp_path, cfg))
    torch.testing.assert_close(method.encode(x).dense(), torch.tensor([[0, 1.6, 0]]))
    torch.testing.assert_close(method.reconstruct(x), torch.tensor([[1, 1.6]]))


def test_a_gated_dictionary_becomes_an_equal_jumprelu(tmp_path):
    gates = {"b_enc": None, "r_mag": torch.tensor([2.0]).log().repeat(3), "b_mag": torch.tensor([0.5, 0.5, -9.0])}
    gates["b_gate"] = torch.tensor([-2.0, -0.9, 1.0])  # pi = 2, 1, 3: shut, open, open with magnitude 2 * 3 - 9 < 0
    method = saelens.read(folder_of(tmp_path, {"architecture": "gated", **NEW}, **gates))
    assert codes(method) == [[0, 2.5, 0]]


def test_the_constant_of_the_norm_is_folded_in_from_the_setting_or_from_its_file(tmp_path):
    cfg = {"architecture": "standard", "normalize_activations": "expected_average_only_in", **NEW}
    method = saelens.read(folder_of(tmp_path, cfg), norm_scaling_factor=0.5)
    x = 2 * X  # normalised to X, so codes are those of X, and reconstructions twice as large
    assert codes(method, x) == [[2, 1, 3]] and method.reconstruct(x).tolist() == [[6, 4]]
    with pytest.raises(UserError, match=r"method\.norm_scaling_factor: sqrt"):
        saelens.read(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.5, "has_whitening": false}')
    assert codes(saelens.read(tmp_path), x) == [[2, 1, 3]]
    with pytest.raises(UserError, match="norm_scaling_factor"):
        saelens.read(folder_of(tmp_path / "none", {"architecture": "standard", **NEW}), norm_scaling_factor=0.5)


def test_a_factor_from_fine_tuning_multiplies_codes_only_in_decoding(tmp_path):
    factor = torch.tensor([2.0, 1, 1])
    method = saelens.read(folder_of(tmp_path, {**OLD, "finetuning_scaling_factor": True}, scaling_factor=factor))
    assert codes(method) == [[2, 1, 3]] and method.reconstruct(X).tolist() == [[5, 2]]
    with pytest.raises(UserError, match="scaling_factor is not all ones"):
        saelens.read(folder_of(tmp_path / "unsaid", OLD, scaling_factor=factor))
    assert codes(saelens.read(folder_of(tmp_path / "ones", OLD, scaling_factor=torch.ones(3)))) == [[2, 1, 3]]


def test_centred_writing_weights_mean_that_tokens_are_centred(tmp_path):
    new = {**NEW["metadata"], "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    method = saelens.read(folder_of(tmp_path, {"architecture": "standard", "metadata": new}))
    assert method.norm.kind == "token_center"
    assert codes(method) == [[0, 0, 0]]  # X centred is [1, -1], less b_dec [0, -1]


def test_a_dictionary_of_centred_tokens_is_written_only_if_centred_model_is_set(tmp_path, rows, dictionary):
    method = dictionary("relu_l1", input_norm="token_center")
    with pytest.raises(UserError, match=r"export\.centred_model=true"):
        saelens.write(method, tmp_path)
    saelens.write(method, tmp_path, centred_model=True)
    again = saelens.read(tmp_path)
    torch.testing.assert_close(again.reconstruct(rows), method.reconstruct(rows), rtol=1e-5, atol=1e-5)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["metadata"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    cfg["metadata"].pop("model_from_pretrained_kwargs")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    plain = saelens.read(tmp_path)  # as in the library: the same codes even for tokens that are not centred
    actual, expected = plain.encode(rows).dense(), method.encode(method.norm(rows)[0]).dense()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(OURS))
def test_a_written_dictionary_is_read_back_unchanged(name, tmp_path, rows, dictionary):
    method = dictionary(OURS[name][0], **OURS[name][1])
    saelens.write(method, tmp_path)
    assert saelens.read_log_sparsity(tmp_path) is None
    saelens.write_log_sparsity(torch.full((80,), -2.0), tmp_path)
    again = saelens.read(tmp_path)
    norm, plain = method.norm(rows)[0], again.norm(rows)[0]
    assert torch.equal(method.encode(norm).dense() > 0, again.encode(plain).dense() > 0)
    torch.testing.assert_close(again.reconstruct(rows), method.reconstruct(rows), rtol=1e-5, atol=1e-5)
    sparsity = saelens.read_log_sparsity(tmp_path)
    assert sparsity is not None and sparsity.tolist() == [-2.0] * 80


@settings(max_examples=40, deadline=None)
@given(data=st.data(), d=st.integers(1, 7), m=st.integers(1, 9), centred=st.booleans(), seed=st.integers(0, 999))
def test_every_dictionary_survives_writing_and_reading(data, d, m, centred, seed, tmp_path_factory):
    activation = data.draw(st.sampled_from(["relu", "topk", "jumprelu"]))
    norm = data.draw(st.sampled_from(["none", "layer_norm", "token_norm", "scalar"] if d > 1 else ["none", "scalar"]))
    g = torch.Generator().manual_seed(seed)
    method = Pretrained.of(
        torch.randn(m, d, generator=g),
        torch.randn(m, d, generator=g),
        torch.randn(m, generator=g),
        torch.randn(d, generator=g),
        activation=activation,
        threshold=torch.rand(m, generator=g) if activation == "jumprelu" else None,
        k=data.draw(st.integers(1, m)) if activation == "topk" else None,
        subtract_b_dec=centred,
        input_norm=norm,
        scale=torch.tensor(2.0),  # a power of two: folding it is exact
    )
    folder = tmp_path_factory.mktemp("written")
    saelens.write(method, folder)
    again, x = saelens.read(folder), torch.randn(11, d, generator=g)
    actual, expected = again.encode(again.norm(x)[0]).dense(), method.encode(method.norm(x)[0]).dense()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.reconstruct(x), method.reconstruct(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_are_read_as_fp32(dtype, tmp_path):
    tensors = {"W_enc": torch.tensor([[1.0, 0, 1], [0, 1, 1]]), "b_dec": torch.tensor([1.0, 0])}
    method = saelens.read(folder_of(tmp_path, OLD, **{name: tensor.to(dtype) for name, tensor in tensors.items()}))
    assert method.W_enc.dtype == torch.float32 and codes(method) == [[2, 1, 3]]


def test_writing_a_method_with_another_kind_of_encoder_is_an_error(tmp_path, dictionary):
    for name in ("lca", "oneill_mlp"):
        with pytest.raises(UserError, match="no encoder of one matrix"):
            saelens.write(dictionary(name), tmp_path / name)
        assert not (tmp_path / name).exists()


BAD: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
    ({"architecture": "temporal", **NEW}, {}, r"cfg\.json: the architecture 'temporal' is not supported"),
    ({"architecture": "standard", "metadata": {"sae_lens_version": "7.0.1"}}, {}, r"cfg\.json is of SAELens 7\.0\.1"),
    ({"architecture": "standard", "sae_lens_version": "latest"}, {}, "is of SAELens latest"),
    ({**OLD, "activation_fn_str": "tanh-relu"}, {}, "activation_fn 'tanh-relu'"),
    ({**OLD, "normalize_activations": "covariance_whitening"}, {}, "normalize_activations 'covariance_whitening'"),
    ({**OLD, "d_in": 3}, {}, r"W_enc has the shape \[2, 3\], not \[3, 3\]"),
    ({**OLD, "d_sae": "many"}, {}, "d_sae is 'many'"),
    ({"architecture": "topk", **NEW}, {}, "k is null"),
    ({"architecture": "jumprelu", **NEW}, {}, r"sae_weights\.safetensors has no threshold"),
    (OLD, {"extra": torch.ones(2)}, "unknown tensors: extra"),
    (OLD, {"W_dec": torch.full((3, 2), torch.nan)}, "W_dec contains numbers that are NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("cfg", "tensors", "message"), BAD)
def test_the_error_for_a_bad_folder_has_the_reason(cfg, tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        saelens.read(folder_of(tmp_path, cfg, **tensors))


def test_missing_truncated_and_wrong_files_are_named_in_the_error(tmp_path):
    folder = folder_of(tmp_path / "a", OLD)
    whole = (folder / saelens.WEIGHTS).read_bytes()
    for n in (0, 5, len(whole) // 2, len(whole) - 1):
        (folder / saelens.WEIGHTS).write_bytes(whole[:n])
        with pytest.raises(UserError, match=r"sae_weights\.safetensors is not a complete safetensors file"):
            saelens.read(folder)
    (folder / saelens.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"sae_weights\.safetensors is missing"):
        saelens.read(folder)
    for text, message in (("{", "not JSON"), ("[1]", "is a list, not an object")):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(UserError, match=message):
            saelens.read(folder)
