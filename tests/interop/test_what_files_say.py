"""A dictionary is taken for what its files say: of one place and one model, trained on some tokens, not on others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from core import results
from core.artifacts import Store
from core.errors import UserError
from core.interop import dictionary_learning, saelens, sparsify
from core.interop.hooks import site_of
from core.interop.loading import load
from core.interop.training_facts import told
from core.methods.saved import save_dictionary
from core.models.identity import model_identity
from tests.interop.test_fuzz import (
    D,
    our_own,
    put_dictionary_learning,
    put_gemma,
    put_old_saelens,
    put_saelens,
    put_sparsify,
)

BUNDLED = {"name": "bundled", "source": "bundled", "revision": None, "dtype": "float32"}
GPT2 = {"name": "gpt2_small", "source": "openai-community/gpt2", "revision": None, "dtype": "float32"}


def edit(path: Path, **changes: Any) -> Path:
    """Replace keys of a JSON file, and inner ones by `outer__inner`; returns the file's folder."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        node, *inner = key.split("__")
        if inner:
            content.setdefault(node, {})[inner[0]] = value
        else:
            content[node] = value
    path.write_text(json.dumps(content))
    return path.parent


# ---- input and output at one place


@pytest.mark.parametrize(
    ("put", "file", "changes", "message"),
    [(put_dictionary_learning, "config.json", {"buffer__io": "in_and_out"}, "buffer.io is in_and_out.* a transcoder"),
     (put_saelens, "cfg.json", {"metadata__hook_name_out": "blocks.3.hook_mlp_out"}, "hook_name_out .* a transcoder"),
     (put_saelens, "cfg.json", {"d_out": 9}, "a transcoder"), (put_saelens, "cfg.json", {"architecture": "transcoder"},
      "architecture 'transcoder' is not supported"),
     (put_old_saelens, "cfg.json", {"is_transcoder": True}, "a transcoder"),
     (put_old_saelens, "cfg.json", {"out_hook_point": "blocks.2.hook_mlp_out"}, "out_hook_point .* a transcoder"),
     (put_old_saelens, "cfg.json", {"hook_point_head_index": 3}, "one attention head"),
     (put_saelens, "cfg.json", {"reshape_activations": "hook_z"}, "reshape_activations=hook_z"),
     (put_sparsify, "cfg.json", {"transcode": True}, "transcode=True is not supported")],
)  # fmt: skip
def test_what_reads_one_place_and_writes_another_is_refused_at_any_site(
    put: Any, file: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    put(tmp_path / "run/layers.3")
    edit(tmp_path / "run/layers.3" / file, **changes)
    for site in ("resid_post.3", None):
        with pytest.raises(UserError, match=message):
            load(D, str(tmp_path / "run/layers.3"), site=site)


def test_the_input_of_a_module_is_not_its_output(tmp_path: Path) -> None:
    put_dictionary_learning(tmp_path)
    edit(tmp_path / "config.json", buffer__io="in", trainer__submodule_name="model.layers.3")
    assert load(D, str(tmp_path), site="resid_pre.3").dict_size == load(D, str(tmp_path), site="resid_post.2").dict_size
    with pytest.raises(UserError, match=r"Set stream\.site=resid_pre\.3, or method\.site=null"):
        load(D, str(tmp_path), site="resid_post.3")
    edit(tmp_path / "config.json", trainer__submodule_name="model.layers.3.mlp")
    with pytest.raises(UserError, match=r"layers\.3\.mlp \(input\), which is not a supported site.*method\.site=null"):
        load(D, str(tmp_path), site="mlp_out.3")


def test_names_of_releases_of_transcoders_are_refused(tmp_path: Path) -> None:
    put_gemma(tmp_path / "gemma-scope-2b-pt-transcoders/layer_3")
    repo = str(tmp_path / "gemma-scope-2b-pt-transcoders")
    with pytest.raises(UserError, match=r"by its name gemma-scope-2b-pt-transcoders maps .* Set method\.site=null"):
        load(D, repo, "layer_3", site="mlp_out.3")
    assert load(D, repo, "layer_3", site=None).d_model == D


# ---- another language model of equal width


@pytest.mark.parametrize(
    ("stated", "model", "fits"),
    [("gpt2-small", GPT2, True), ("gpt2", GPT2, True), ("openai-community/gpt2", GPT2, True),
     ("gpt2-medium", GPT2, False), ("pythia-70m", BUNDLED, False), ("bundled", BUNDLED, True),
     ("local", BUNDLED, True), (None, BUNDLED, True),
     ("EleutherAI/pythia-70m-deduped", {**GPT2, "source": "EleutherAI/pythia-70m"}, False),
     ("pythia-70m", {**GPT2, "source": "EleutherAI/pythia-70m"}, True),
     ("tiny-stories-33M", {**GPT2, "source": "roneneldan/TinyStories-33M"}, True),
     ("gemma-2-2b", {**GPT2, "source": "google/gemma-2-2b-it"}, False), ("pythia-70m", None, True),
     ("pythia-70m", {**GPT2, "source": "/home/me/pythia-70m"}, True)],
)  # fmt: skip
def test_a_dictionary_of_another_model_is_refused_with_a_way_out(
    stated: str | None, model: dict[str, Any] | None, fits: bool, tmp_path: Path
) -> None:
    put_saelens(tmp_path / "a")
    edit(tmp_path / "a/cfg.json", metadata__model_name=stated)
    put_dictionary_learning(tmp_path / "b")
    edit(tmp_path / "b/config.json", trainer__lm_name=stated)
    put_sparsify(tmp_path / "c/layers.3")
    edit(tmp_path / "c/config.json", model=stated)
    for folder in ("a", "b", "c/layers.3"):
        if fits:
            assert load(D, str(tmp_path / folder), model=model).d_model == D
        else:
            with pytest.raises(UserError, match=rf"was trained on {stated}\. .*method\.model=null"):
                load(D, str(tmp_path / folder), model=model)


def test_gemma_scope_says_its_model_by_its_name(tmp_path: Path) -> None:
    put_gemma(tmp_path / "gemma-scope-2b-pt-res/layer_3")
    repo, own = str(tmp_path / "gemma-scope-2b-pt-res"), {**GPT2, "source": "google/gemma-2-2b"}
    assert load(D, repo, "layer_3", model=own).source["model"] == "google/gemma-2-2b"
    with pytest.raises(UserError, match=r"was trained on google/gemma-2-2b\. .*method\.model=null"):
        load(D, repo, "layer_3", model={**own, "source": "google/gemma-2-9b"})


def test_an_export_that_names_a_folders_weights_fits_these_weights_alone(tmp_path: Path) -> None:
    put_saelens(tmp_path)
    weights = model_identity(BUNDLED)["weights"]
    edit(tmp_path / "cfg.json", metadata__model_name=f"a name@{weights[:12]}")
    assert load(D, str(tmp_path), model=BUNDLED).d_model == D
    edit(tmp_path / "cfg.json", metadata__model_name="bundled@0123456789ab")
    with pytest.raises(UserError, match=r"was trained on bundled@0123456789ab\. .*method\.model=null"):
        load(D, str(tmp_path), model=BUNDLED)


def test_a_dictionary_of_ours_knows_its_model_too(tmp_path: Path) -> None:
    identity = model_identity(BUNDLED)
    store = Store(tmp_path)
    for fits, trained_on in ((True, identity), (False, identity | {"weights": "0" * 32}), (False, {**GPT2})):
        spec = {"source": {"batches": {"stream": {"site": "resid_post.3"}, "model": trained_on}}}
        folder = store.put("dictionary", spec, lambda place: save_dictionary(our_own(), {}, place))
        assert load(D, str(folder), model=None).d_model == D
        if fits:
            assert load(D, str(folder), model=BUNDLED).d_model == D
        else:
            with pytest.raises(UserError, match=r"was trained on .*method\.model=null"):
                load(D, str(folder), model=BUNDLED)


# ---- what it never saw


@pytest.mark.parametrize(
    ("facts", "words"),
    [({}, None), ({"context_size": 128, "dataset": "a/b", "prepend_bos": True}, None),
     ({"left_out": "special tokens"}, "without special tokens"), ({"left_out": [0, 2]}, "without the tokens 0, 2"),
     ({"prepend_bos": False}, "on contexts that did not begin with a BOS token"),
     ({"positions": [5, -5]}, "at the positions 5:-5 of a context only"),
     ({"positions": [None, 9], "left_out": "x"}, "without x and at the positions :9 of a context only")],
)  # fmt: skip
def test_what_a_dictionary_never_saw_is_one_sentence(facts: dict[str, Any], words: str | None) -> None:
    sentence = told(facts, "a/b")
    if words is None:
        assert sentence is None
    else:
        assert sentence is not None and f"a/b: by its files the dictionary was trained {words}. " in sentence
        assert "without_bos" in sentence


@pytest.mark.parametrize(
    ("put", "file", "changes", "facts"),
    [(put_saelens, "cfg.json", {"metadata__exclude_special_tokens": True, "metadata__prepend_bos": False},
      {"context_size": 128, "dataset": "a/b", "left_out": "special tokens", "prepend_bos": False}),
     (put_saelens, "cfg.json", {"metadata__exclude_special_tokens": False, "metadata__seqpos_slice": [None]},
      {"context_size": 128, "dataset": "a/b", "prepend_bos": True}),
     (put_old_saelens, "cfg.json", {}, {"positions": [5, -5]}),
     (put_dictionary_learning, "config.json", {}, {"context_size": 128, "left_out": "the first token of each context"}),
     (put_sparsify, "../config.json", {"dataset": "c"}, {"context_size": 64, "dataset": "c", "left_out": [1]})],
)  # fmt: skip
def test_facts_of_the_training_are_kept_said_and_in_results(
    put: Any, file: str, changes: dict[str, Any], facts: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "run/layers.3"
    put(folder)
    edit(folder / file, **changes)
    cfg = OmegaConf.create({"name": "test", "scale": "smoke", "seed": 0})
    loaded: list[Any] = []

    def run(_: object) -> dict[str, float]:
        loaded.append(load(D, str(folder)))
        return {"a": 1.0}

    results.run_cell(cfg, tmp_path / "cell", run)
    assert loaded[0].source["trained"] == facts
    record = json.loads((tmp_path / "cell/results.json").read_text())
    sentence = told(facts, str(folder))
    assert record.get("remarks") == (None if sentence is None else [sentence])
    assert sentence is None or sentence in capsys.readouterr().err


# ---- names of sites


@pytest.mark.parametrize(
    ("hook", "site"),
    [("resid_pre_layer_4", "resid_pre.4"), ("mlp_out_layer_4", "mlp_out.4"), ("mlp_layer_4", "mlp_out.4"),
     ("resid_post_layer_04", "resid_post.4"), ("model.layers.3 (input)", "resid_pre.3"), ("h.3.mlp (input)", None),
     ("blocks.{layer}.hook_resid_pre", None), ("blocks." + "9" * 5000 + ".hook_resid_post", None), ("", None)],
)  # fmt: skip
def test_more_names_of_sites_are_translated(hook: str, site: str | None) -> None:
    assert site_of(hook) == site


def test_a_layer_that_stands_apart_is_filled_in(tmp_path: Path) -> None:
    put_old_saelens(tmp_path)
    assert saelens.read(tmp_path).source["hook"] == "blocks.2.hook_resid_pre"


def test_the_site_of_sparsify_is_looked_for_in_links_and_in_the_folder_above(tmp_path: Path) -> None:
    for folder, hook in (("layers.3/seed1", "layers.3"), ("h.2.mlp", "h.2.mlp"), ("run/mine", "mine")):
        put_sparsify(tmp_path / folder)
        assert sparsify.hook(tmp_path / folder) == hook
    (tmp_path / "mine").symlink_to(tmp_path / "layers.3/seed1", target_is_directory=True)
    (tmp_path / "layers.5").symlink_to(tmp_path / "run/mine", target_is_directory=True)
    assert (sparsify.hook(tmp_path / "mine"), sparsify.hook(tmp_path / "layers.5")) == ("layers.3", "layers.5")
    with pytest.raises(UserError, match=r"trained at mine, which is not a supported site.*Set method\.site=null"):
        load(D, str(tmp_path / "run/mine"), site="resid_post.3")
    assert load(D, str(tmp_path / "run/mine"), site=None).d_model == D


# ---- what is missing


def test_without_k_the_message_names_both_files(tmp_path: Path) -> None:
    put_dictionary_learning(tmp_path)
    edit(tmp_path / "config.json", trainer__k=None)
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save({name: tensor for name, tensor in tensors.items() if name != "k"}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=r"config\.json has no trainer\.k, and .*ae\.pt no k") as error:
        dictionary_learning.read(tmp_path)
    assert "method.k" not in str(error.value)


@pytest.mark.parametrize(
    ("put", "file", "changes", "message"),
    [(put_saelens, "cfg.json", {"metadata__hook_name": ["a"]}, "cfg.json: hook_name is a list, not a text"),
     (put_saelens, "cfg.json", {"metadata": "text"}, "cfg.json: metadata is 'text', not an object"),
     (put_saelens, "cfg.json", {"d_sae": float("inf")}, "cfg.json: d_sae is inf, not a whole number"),
     (put_saelens, "cfg.json", {"d_sae": float("nan")}, "cfg.json: d_sae is nan, not a whole number"),
     (put_saelens, "cfg.json", {"architecture": 3}, "cfg.json: architecture is 3, not a text"),
     (put_saelens, "cfg.json", {"k": 99}, "k is 99, but the dictionary has only 6 latents"),
     (put_saelens, "cfg.json", {"normalize_activations": {}, "x": 1}, None),
     (put_saelens, "activation_scaler.json", {"scaling_factor": float("nan")}, "scaling_factor is nan"),
     (put_dictionary_learning, "config.json", {"trainer": []}, "config.json: trainer is a list"),
     (put_dictionary_learning, "config.json", {"trainer__dict_class": {}}, "dict_class is an object"),
     (put_dictionary_learning, "config.json", {"trainer__dict_size": 7}, "trainer.dict_size is 7, but .* has 6"),
     (put_sparsify, "cfg.json", {"k": True}, "cfg.json: k is true, not a whole number"),
     (put_sparsify, "cfg.json", {"d_in": 1e400}, "cfg.json: d_in is inf, not a whole number")],
)  # fmt: skip
def test_a_value_of_another_type_is_named_with_its_file(
    put: Any, file: str, changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "run/layers.3"
    put(folder)
    edit(folder / file, **changes)
    if message is None:
        assert saelens.read(folder).d_model == D
    else:
        with pytest.raises(UserError, match=message):
            load(D, str(folder))
