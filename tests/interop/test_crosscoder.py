"""Crosscoders of others: each layout by hand, what is wrong in a file, and the way back to their library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.analysis.latent_scaling import LatentScaling
from core.batch import Batch
from core.errors import UserError
from core.interop import crosscoder
from core.interop.loading import load
from core.methods.crosscoder import BatchTopKCrosscoder, L1Crosscoder
from core.methods.pretrained_crosscoder import PretrainedCrosscoder
from core.methods.saved import load_dictionary, save_dictionary
from tests.methods.test_crosscoders import BTK as BTK_SETTINGS
from tests.methods.test_crosscoders import L1 as L1_SETTINGS
from tests.methods.test_crosscoders import rows, with_random_weights

D, M = 3, 5
g = torch.Generator().manual_seed(0)
W_ENC, W_DEC = torch.randn(2, D, M, generator=g), torch.randn(2, M, D, generator=g)  # base, chat
B_ENC, B_DEC, H = torch.randn(M, generator=g), torch.randn(2, D, generator=g), torch.randn(40, 2, D, generator=g)
MINDER = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC, "decoder.bias": B_DEC}
BTK = {"k": torch.tensor(100), "threshold": torch.tensor(4.0), "code_normalization_id": torch.tensor(1)}
KISSANE = {"W_enc": W_ENC, "W_dec": W_DEC.transpose(0, 1).contiguous(), "b_enc": B_ENC, "b_dec": B_DEC}
NORMS = W_DEC.norm(dim=2)  # [2, m]
JOINT = W_DEC.transpose(0, 1).flatten(1).norm(dim=1)
SIZES = {1: NORMS.sum(0), 2: JOINT, 3: JOINT + 0.1 * NORMS.sum(0), 4: torch.ones(M)}
MEAN, STD = torch.randn(2, D, generator=g), torch.rand(2, D, generator=g) + 0.5


def put(state: dict[str, Any], folder: Path, name: str = "model.safetensors", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: torch.as_tensor(value).contiguous() for key, value in state.items()}, folder / name)
    else:
        torch.save(state, folder / name)
    if config:
        (folder / "trainer_config.json").write_text(json.dumps({"trainer": config}))
    return folder


def by_hand(h: Tensor) -> Tensor:
    """f `[B, m]` without a threshold."""
    return torch.relu(h[:, 0] @ W_ENC[0] + h[:, 1] @ W_ENC[1] + B_ENC)


def decoded(f: Tensor) -> Tensor:
    return torch.stack([f @ W_DEC[0] + B_DEC[0], f @ W_DEC[1] + B_DEC[1]], 1)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("name", ["model.safetensors", "model_final.pt", "model.pt", "ae.pt"])
def test_a_plain_crosscoder_has_relu_codes_whatever_its_file_is_called(name: str, prefix: str, tmp_path: Path):
    loaded = crosscoder.read(put({prefix + key: tensor for key, tensor in MINDER.items()}, tmp_path, name))
    torch.testing.assert_close(loaded.encode(H).dense(), by_hand(H))
    torch.testing.assert_close(loaded.reconstruct(H), decoded(by_hand(H)))
    assert loaded.settings.rule == "relu" and loaded.settings.code_norm == "sum"


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_batchtopk_crosscoder_keeps_what_is_above_its_threshold_by_its_definition_of_v(number: int, tmp_path: Path):
    state = MINDER | BTK | {"code_normalization_id": torch.tensor(number)}
    loaded = crosscoder.read(put(state, tmp_path, k_target=100))
    f = by_hand(H)
    expected = f.where(f * SIZES[number] > 4.0, 0)
    assert 0 < expected.count_nonzero() < f.count_nonzero()
    torch.testing.assert_close(loaded.encode(H).dense(), expected)
    torch.testing.assert_close(loaded.reconstruct(H), decoded(expected))
    assert loaded.source["k"] == 100


def test_an_older_file_without_an_id_has_the_papers_definition_or_the_one_beside_it(tmp_path: Path):
    state = {name: tensor for name, tensor in (MINDER | BTK).items() if name != "code_normalization_id"}
    assert crosscoder.read(put(state, tmp_path / "a")).settings.code_norm == "sum"
    assert crosscoder.read(put(state, tmp_path / "b", code_normalization="SAE")).settings.code_norm == "joint"


def test_a_decoupled_crosscoder_has_a_threshold_for_each_model(tmp_path: Path):
    """f_j counts in model m where f_j |d_j^m| is above the model's threshold; codes hold what counts anywhere."""
    thresholds = torch.tensor([2.0, 1.0])
    state = MINDER | BTK | {"code_normalization_id": torch.tensor(5), "threshold": thresholds}
    loaded = crosscoder.read(put(state, tmp_path))
    f = by_hand(H)
    counts = [f * NORMS[m] > thresholds[m] for m in (0, 1)]
    assert (counts[0] != counts[1]).any()
    torch.testing.assert_close(loaded.encode(H).dense(), f.where(counts[0] | counts[1], 0))
    expected = torch.stack([f.where(counts[m], 0) @ W_DEC[m] + B_DEC[m] for m in (0, 1)], 1)
    torch.testing.assert_close(loaded.reconstruct(H), expected)
    with pytest.raises(UserError, match="do not share their codes"):
        LatentScaling(loaded)


@pytest.mark.parametrize("per_model", [False, True])
def test_the_normalisation_in_a_file_travels_with_the_crosscoder(per_model: bool, tmp_path: Path):
    target = 100.0
    variance = STD.square().sum(1) if per_model else STD.square().sum()
    c = target / variance.sqrt()
    state = MINDER | {
        "activation_mean": MEAN, "activation_std": STD, "activation_global_scale": c, "target_rms": torch.tensor(target)
    }  # fmt: skip
    loaded = crosscoder.read(put(state, tmp_path))
    normal = (H - MEAN) * c.expand(2)[:, None]
    torch.testing.assert_close(loaded.norm(H)[0], normal)
    torch.testing.assert_close(loaded.reconstruct(H), decoded(by_hand(normal)) / c.expand(2)[:, None] + MEAN)


def test_a_normalisation_of_nan_is_none(tmp_path: Path):
    nan = torch.full((2, D), torch.nan)
    off = {"activation_mean": nan, "activation_std": nan.clone(), "activation_global_scale": torch.ones(2)}
    loaded = crosscoder.read(put(MINDER | off | {"target_rms": torch.tensor(1.0)}, tmp_path))
    assert loaded.norm.kind == "none"
    torch.testing.assert_close(loaded.reconstruct(H), decoded(by_hand(H)))


def test_a_crosscoder_in_matrices_needs_the_factor_of_each_model(tmp_path: Path):
    put(KISSANE, tmp_path, "cc_weights.pt")
    with pytest.raises(UserError, match=r"norm_scaling_factor: null is not two numbers .*0\.2758"):
        crosscoder.read(tmp_path)
    loaded = crosscoder.read(tmp_path, [0.5, 0.25])
    factors = torch.tensor([0.5, 0.25])[:, None]
    torch.testing.assert_close(loaded.encode(loaded.norm(H)[0]).dense(), by_hand(H * factors))
    torch.testing.assert_close(loaded.reconstruct(H), decoded(by_hand(H * factors)) / factors)


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [(MINDER | {"decoder.weight": W_ENC}, {}, r"decoder\.weight has the shape \[2, 3, 5\], not \[2, 5, 3\]"),
     (MINDER | {"encoder.weight": W_ENC[0]}, {}, r"encoder\.weight has the shape \[3, 5\], not \[2, d_model, dict_siz"),
     (MINDER | BTK | {"threshold": torch.tensor(-1.0)}, {}, r"threshold is -1\.0, so it was never measured"),
     (MINDER | BTK | {"code_normalization_id": torch.tensor(0)}, {}, "code_normalization_id is 0, .* 5 DECOUPLED"),
     (MINDER | BTK, {"code_normalization": "SAE"}, "code_normalization is SAE, but .* has another: sum"),
     (MINDER, {"dict_class": "BatchTopKCrossCoder"}, "has no threshold, which inference needs"),
     (MINDER | BTK | {"code_normalization_id": torch.tensor(3)}, {"code_normalization_alpha_cc": 0.5}, "_cc is 0.5"),
     (MINDER, {"dict_size": 6}, "dict_size is 6, but .* has 5"),
     ({"decoder.weight": W_DEC}, {}, r"has no encoder\.weight"),
     (MINDER | {"decoder.bias": B_DEC * torch.nan}, {}, r"decoder\.bias contains numbers"),
     (MINDER | {"more": B_DEC}, {}, "unknown tensors: more"),
     (MINDER | {"activation_mean": MEAN, "activation_std": STD, "activation_global_scale": torch.tensor(1.0)}, {},
      "keep_relative_variance=False"),
     (MINDER | {"activation_mean": MEAN, "activation_std": STD, "activation_global_scale": torch.tensor([1.0, -1.0])},
      {}, "not one or two numbers above 0"),
     (KISSANE | {"W_dec": W_DEC}, {}, r"W_dec has the shape \[2, 5, 3\], not \[5, 2, 3\]")],
)  # fmt: skip
def test_the_error_for_a_bad_checkpoint_has_the_reason(
    state: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path
):
    put(state, tmp_path, "model.pt", **config)
    with pytest.raises(UserError, match=message):
        crosscoder.read(tmp_path, [1, 1] if "W_enc" in state else None)


def test_a_folder_without_a_crosscoder_and_a_truncated_file_are_named_in_the_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"contains no crosscoder: it has none of model\.safetensors"):
        crosscoder.read(tmp_path)
    put(MINDER, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        crosscoder.read(tmp_path)


def test_experiments_on_one_model_refuse_crosscoders_and_those_on_pairs_refuse_all_else(
    tmp_path: Path, dictionary: Any
):
    put(MINDER, tmp_path / "theirs")
    with pytest.raises(UserError, match=r"crosscoder of two models.*method=pretrained_crosscoder"):
        load(D, str(tmp_path / "theirs"))
    own = with_random_weights(L1Crosscoder(**L1_SETTINGS))
    save_dictionary(own, {}, tmp_path / "own")
    with pytest.raises(UserError, match="a crosscoder of 2 models, and this experiment needs one of 1"):
        load(5, str(tmp_path / "own"))
    assert isinstance(load(5, str(tmp_path / "own"), n_models=2), L1Crosscoder)
    save_dictionary(dictionary("topk"), {}, tmp_path / "single")
    with pytest.raises(UserError, match="a dictionary of one model, and this experiment needs one of 2"):
        load(24, str(tmp_path / "single"), n_models=2)
    with pytest.raises(UserError, match="saelens has dictionaries of one model"):
        load(24, str(tmp_path / "single"), format="saelens", n_models=2)


def test_the_site_and_the_size_in_the_files_are_checked(tmp_path: Path):
    put(MINDER | BTK, tmp_path, layer=13, submodule_name="layer_13_out", lm_name="it-base")
    loaded = load(D, str(tmp_path), site="resid_pre.14", n_models=2)
    assert loaded.source["hook"] == "resid_post_layer_13" and loaded.source["model"] == "it-base"
    with pytest.raises(UserError, match=r"Set stream\.site=resid_post\.13"):
        load(D, str(tmp_path), site="resid_post.12", n_models=2)
    with pytest.raises(UserError, match=r"model\.d_model is 4, but"):
        load(4, str(tmp_path), n_models=2)


def test_a_loaded_crosscoder_can_be_stored_and_read_again(tmp_path: Path):
    state = MINDER | BTK | {"activation_mean": MEAN, "activation_std": STD}
    state |= {"activation_global_scale": STD.square().sum().rsqrt(), "target_rms": torch.tensor(1.0)}
    loaded = crosscoder.read(put(state, tmp_path))
    save_dictionary(loaded, {}, tmp_path / "stored")
    torch.testing.assert_close(
        load_dictionary(tmp_path / "stored").reconstruct(H), loaded.reconstruct(H), rtol=0, atol=0
    )


# ---- writing


def trained(kind: str, code_norm: str = "sum", input_norm: str = "none") -> Any:
    settings = (L1_SETTINGS if kind == "l1" else BTK_SETTINGS) | {"code_norm": code_norm, "input_norm": input_norm}
    method = with_random_weights((L1Crosscoder if kind == "l1" else BatchTopKCrosscoder)(**settings))
    method.norm.fit(7 * rows(1) + 3)
    if kind != "l1":
        method.threshold.fill_(2.0)
    return method.eval()


@pytest.mark.parametrize("input_norm", ["none", "scalar", "shared_scalar"])
@pytest.mark.parametrize("code_norm", ["sum", "joint", "mixed", "none"])
@pytest.mark.parametrize("kind", ["l1", "btk"])
def test_a_trained_crosscoder_is_the_same_when_written_and_read(
    kind: str, code_norm: str, input_norm: str, tmp_path: Path
):
    method, x = trained(kind, code_norm, input_norm), 7 * rows(2) + 3
    crosscoder.write(method, tmp_path, site="resid_post.3", models=("base", "chat"))
    loaded = load(5, str(tmp_path), site="resid_post.3", n_models=2)
    assert isinstance(loaded, PretrainedCrosscoder)
    torch.testing.assert_close(loaded.encode(loaded.norm(x)[0]).dense(), method.encode(method.norm(x)[0]).dense())
    torch.testing.assert_close(loaded.reconstruct(x), method.reconstruct(x))
    for a, b in ((loaded.W_enc, method.W_enc), (loaded.W_dec, method.W_dec)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    again = tmp_path / "again"
    crosscoder.write(loaded, again, site="resid_post.3", models=("base", "chat"))
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, again))
    assert first.keys() == second.keys() and all(torch.allclose(first[name], second[name]) for name in first)


def test_betas_of_a_normalised_crosscoder_are_those_of_the_written_one_and_not_those_of_raw_activations(tmp_path: Path):
    """Scale 7, mean shift 3: activations that are not normalised give other betas."""
    method = trained("btk", input_norm="scalar")
    crosscoder.write(method, tmp_path)
    loaded, x = crosscoder.read(tmp_path), 7 * rows(4, 400) + 3

    def betas(dictionary: Any, h: Tensor) -> Tensor:
        scaling = LatentScaling(dictionary)
        scaling.add(h, dictionary.encode(h))
        return scaling.result("chat").beta["activation"]

    expected = betas(method, Batch(x).normalised(method.norm))
    torch.testing.assert_close(betas(loaded, Batch(x).normalised(loaded.norm)), expected, equal_nan=True)
    raw = betas(loaded, x)
    assert ((raw - expected).abs() > 0.1 * expected.abs()).float().mean() > 0.5


def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path, dictionary: Any):
    with pytest.raises(UserError, match=r"input_norm=token_std: .* has no such normalisation"):
        crosscoder.write(trained("l1", input_norm="token_std"), tmp_path)
    with pytest.raises(UserError, match="TopK is no crosscoder"):
        crosscoder.write(dictionary("topk"), tmp_path)
    untrained = BatchTopKCrosscoder(**BTK_SETTINGS).eval()
    with pytest.raises(UserError, match="threshold was never measured"):
        crosscoder.write(untrained, tmp_path)
    three = L1Crosscoder(**(L1_SETTINGS | {"n_models": 3}))
    with pytest.raises(UserError, match="3 models; the format is written for two"):
        crosscoder.write(three, tmp_path)
    assert not list(tmp_path.iterdir())
