"""Loading a model from a folder, from a hub that is a web server on this machine, and without a hub.

Whatever is not whole is refused in one message, which names what is the case.
"""

import json
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from core import hub as commits
from core.errors import UserError
from core.models import loading
from core.models.files import SHIPPED
from core.models.identity import model_identity, model_label
from core.models.language_model import load_language_model
from core.models.loading import Settings
from core.models.sites import FAMILIES
from tests.fake_hub import closed_port
from tests.hub_server import HubServer, files_of, hub_server

CONF = Path(__file__).parents[2] / "conf" / "model"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 7115984\n"


def settings(source: object, **changed: Any) -> Any:
    plain = {
        "name": "tiny",
        "source": source if isinstance(source, int) else str(source),
        "revision": "main",
        "dtype": "float32",
        "d_model": 32,
        "n_layers": 3,
    }
    return OmegaConf.create(plain | {"attn_implementation": "sdpa", "device": "cpu"} | changed)


@pytest.fixture
def folder(tiny_lm_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_lm_folder, tmp_path / "model"))


@pytest.fixture
def hub(endpoint, tiny_lm_folder, monkeypatch):
    """A hub with lab/tiny; retries do not wait."""
    pause = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pause(min(seconds, 0.001)))
    with hub_server() as server:
        server.add("lab/tiny", files_of(tiny_lm_folder))
        endpoint(server.url)
        yield server


def refusal(source: object, **changed: Any) -> str:
    """The message with which a model is refused."""
    with pytest.raises(UserError) as error:
        load_language_model(settings(source, **{"d_model": None, "n_layers": None, **changed}))
    return str(error.value)


def edit_json(path: Path, **changed: Any) -> None:
    content = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def without(*names: str) -> Any:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


# ---- what a folder lacks


def rename_all(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def as_int8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.int8) for name, tensor in weights.items()}


def longer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"transformer.h.3.ln_1.weight": torch.ones(32), "transformer.h.3.ln_1.bias": torch.zeros(32)}


def with_bias(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"transformer.h.0.attn.q_norm.weight": torch.ones(16)}


def cut(name: str, part: float) -> Any:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * part)])

    return change


def write(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def shards(folder: Path, leave_out: bool = True, second: str = "model-00002-of-00002.safetensors") -> None:
    """The weights in two shards with an index; the second shard is left out."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[: len(names) // 2], second: names[len(names) // 2 :]}
    for file, held in parts.items():
        if not (leave_out and file == second) and file.endswith(".safetensors"):
            save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def to_bin(folder: Path) -> None:
    shards(folder, second="pytorch_model.bin")
    torch.save({}, folder / "pytorch_model.bin")


def tokenizer_json(folder: Path, change: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def one_more_token(content: dict[str, Any]) -> None:
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": len(content["model"]["vocab"]), "content": "<|extra|>", **added})


def no_letters(content: dict[str, Any]) -> None:
    """A tokenizer that knows its special tokens only."""
    content["model"] |= {"vocab": {"<|endoftext|>": 0, "<|user|>": 1}, "merges": []}
    content["added_tokens"] = content["added_tokens"][:2]


def unknown_words(content: dict[str, Any]) -> None:
    vocabulary = {"<|endoftext|>": 0, "fox": 1}
    content |= {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"}, "decoder": None}
    content |= {"pre_tokenizer": {"type": "Whitespace"}, "added_tokens": content["added_tokens"][:1]}


def loses_spaces(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}


NOT_WHOLE: dict[str, tuple[Any, str]] = {
    "all tensors renamed": (
        lambda folder: edit_weights(folder, rename_all),
        r"is not whole: its files lack 41 of 41 tensors: .*transformer\.h\.0.*and 38 more. They have 37 others "
        r"instead: module\.",
    ),
    "one tensor missing": (
        lambda folder: edit_weights(folder, without("transformer.h.1.mlp.c_fc.weight")),
        r"is not whole: its files lack 1 of 41 tensors: transformer\.h\.1\.mlp\.c_fc\.weight\. What is missing would",
    ),
    "a bias missing": (
        lambda folder: edit_weights(folder, without("transformer.ln_f.bias")),
        r"is not whole: its files lack 1 of 41 tensors: transformer\.ln_f\.bias",
    ),
    "embedding missing": (
        lambda folder: edit_weights(folder, without("transformer.wte.weight")),
        r"is not whole: .*transformer\.wte\.weight",
    ),
    "untied head missing": (
        lambda folder: edit_json(folder / "config.json", tie_word_embeddings=False),
        r"is not whole: its files lack 1 of 41 tensors: lm_head\.weight",
    ),
    "more layers in the files": (
        lambda folder: edit_weights(folder, longer),
        r"does not fit its config.json: its files have 2 tensors without a place in the 3 layers "
        r".*transformer\.h\.3\.ln_1\.bias",
    ),
    "fewer layers in config.json": (
        lambda folder: edit_json(folder / "config.json", n_layer=2),
        r"its files have 11 tensors without a place in the 2 layers of this gpt2: transformer\.h\.2",
    ),
    "tensors of another architecture": (
        lambda folder: edit_weights(folder, with_bias),
        r"its files have 1 tensor without a place in the 3 layers.*q_norm",
    ),
    "vocab_size unlike the weights": (
        lambda folder: edit_json(folder / "config.json", vocab_size=512),
        r"1 tensor of other shapes: transformer\.wte\.weight is \[300, 32\], by config.json \[512, 32\]. config.json "
        r"has "
        r"vocab_size 512, the weights are for 300",
    ),
    "vocab_size below the weights": (
        lambda folder: edit_json(folder / "config.json", vocab_size=100),
        r"config.json has vocab_size 100, the weights are for 300",
    ),
    "a billion layers": (
        lambda folder: edit_json(folder / "config.json", n_layer=10**9),
        r"which describes 1,000,000,000 layers, a width of 32 and 300 tokens: the files have 40 tensors of",
    ),
    "a billion tokens": (
        lambda folder: edit_json(folder / "config.json", vocab_size=10**9),
        r"does not fit its config.json, which describes 3 layers, a width of 32 and 1,000,000,000 tokens",
    ),
    "a billion positions": (
        lambda folder: edit_json(folder / "config.json", n_positions=10**9),
        r"does not fit its config.json, which describes [\d,]+ numbers: the files hold [\d,]+\.",
    ),
    "other shapes": (
        lambda folder: edit_json(folder / "config.json", n_inner=100),
        r"does not fit its config.json: 9 tensors of other shapes: transformer\.h\.0\.mlp\.c_fc\.bias is \[128\], by "
        r".*\[100\]",
    ),
    "pointer for weights": (
        write("model.safetensors", POINTER),
        r"model.safetensors is a pointer of Git LFS, not the file itself. Fetch it: git lfs pull",
    ),
    "pointer for tokenizer": (write("tokenizer.json", POINTER), r"tokenizer.json is a pointer of Git LFS"),
    "pointer for config": (write("config.json", POINTER), r"config.json is a pointer of Git LFS"),
    "half of the weights": (
        cut("model.safetensors", 0.5),
        r"model.safetensors is damaged: it is no whole file of safetensors .*Remove .* and fetch it again",
    ),
    "a tenth of the head": (cut("model.safetensors", 0.01), r"model.safetensors is damaged"),
    "empty weights": (write("model.safetensors", b""), r"model.safetensors is damaged: it is empty"),
    "no safetensors": (write("model.safetensors", b"\x80\x02}q\x00." * 40), r"model.safetensors is damaged"),
    "whole numbers as weights": (
        lambda folder: edit_weights(folder, as_int8),
        r"is quantised: .* and \d+ more of model.safetensors are I8. Quantised weights are not read",
    ),
    "quantised": (
        lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        r"is quantised \(bitsandbytes\), see quantization_config in .*config.json. Quantised weights are not read here",
    ),
    "a shard missing": (
        shards,
        r"is not whole: model.safetensors.index.json names 2 shards, and model-00002-of-00002.safetensors is missing",
    ),
    "index missing": (
        lambda folder: (shards(folder), remove("model.safetensors.index.json")(folder)),
        r"has shards \(model-00001-of-00002.safetensors\), but model.safetensors.index.json is missing",
    ),
    "index leads to a .bin": (
        to_bin,
        r"index.json leads to 'pytorch_model.bin', which is no .safetensors file beside it",
    ),
    "index leads out of the folder": (
        lambda folder: shards(folder, second="../model/x.safetensors"),
        r"index.json leads to '\.\./model/x.safetensors', which is no",
    ),
    "index is no index": (
        lambda folder: (shards(folder), write("model.safetensors.index.json", b'{"weight_map": []}')(folder)),
        r"index.json has no weight_map",
    ),
    "index is no JSON": (
        lambda folder: (shards(folder), write("model.safetensors.index.json", b'{"weight_map": ')(folder)),
        r"index.json, line 1, column 16: not JSON",
    ),
    "pickled weights only": (
        lambda folder: (remove("model.safetensors")(folder), write("pytorch_model.bin", b"x")(folder)),
        r"has no weights as safetensors, and pickled weights are not read.*There are pytorch_model.bin. Convert them",
    ),
    "another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
        r"has no model.safetensors, only model.fp16.safetensors. Save the model with",
    ),
    "adapter only": (
        lambda folder: (remove("model.safetensors")(folder), write("adapter_config.json", b"{}")(folder)),
        r"has an adapter \(adapter_config.json\), which is not read. Merge it",
    ),
    "adapter beside": (
        write("adapter_config.json", b"{}"),
        r"has an adapter \(adapter_config.json\), which is not read",
    ),
    "GGUF only": (
        lambda folder: (remove("model.safetensors")(folder), write("m.Q4.gguf", b"GGUF")(folder)),
        r"has its weights as GGUF only \(m.Q4.gguf\). Name one file: model.source=.*/model/m.Q4.gguf",
    ),
    "weights named in config.json": (
        lambda folder: edit_json(folder / "config.json", transformers_weights="other.safetensors"),
        r"config.json names other files of weights",
    ),
    "config.json is no JSON": (
        write("config.json", b'{"model_type": "gpt2",'),
        r"config.json, line 1, column 23: not JSON",
    ),
    "config.json is a list": (write("config.json", b"[1]"), r"config.json is a list, not an object"),
    "config.json is deep": (write("config.json", b"[" * 100_000), r"config.json: not JSON that can be read"),
    "config.json has long numbers": (
        write("config.json", b'{"n_embd": ' + b"9" * 5000 + b"}"),
        r"config.json: not JSON that",
    ),
    "config.json is not UTF-8": (write("config.json", b"\xff\xfe{}"), r"config.json is not JSON: byte 0 is not UTF-8"),
    "no family": (
        lambda folder: edit_json(folder / "config.json", model_type=...),
        r"is of no family that config.json names",
    ),
    "family is a list": (
        lambda folder: edit_json(folder / "config.json", model_type=[1]),
        r"model_type is a list, not a text",
    ),
    "size is a text": (
        lambda folder: edit_json(folder / "config.json", n_embd="many"),
        r"config.json cannot be used: .*n_embd.*many",
    ),
    "size is negative": (
        lambda folder: edit_json(folder / "config.json", n_layer=-1),
        r"num_hidden_layers is -1, not a whole",
    ),
    "size is null": (
        lambda folder: edit_json(folder / "config.json", n_positions=None),
        r"config.json cannot be used: .*n_positions",
    ),
    "no config.json": (remove("config.json"), r"has no config.json, so it is not a Hugging Face model"),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        r"has no tokenizer.json, so its text cannot be turned into tokens. Fetch the tokenizer's files",
    ),
    "no tokenizer.json": (remove("tokenizer.json"), r"has no tokenizer.json"),
    "half a tokenizer": (
        cut("tokenizer.json", 0.5),
        r"tokenizer.json, line \d+, column \d+: not JSON .*Correct it, or fetch it again",
    ),
    "tokenizer of another sort": (
        lambda folder: tokenizer_json(folder, lambda content: content.update(model={"type": "None"})),
        r"the tokenizer of .* cannot be read from tokenizer.json, tokenizer_config.json: .*Fetch them again",
    ),
    "tokenizer is a list": (write("tokenizer.json", b"[]"), r"tokenizer.json is a list, not an object"),
    "tokenizer_config is a list": (write("tokenizer_config.json", b"[]"), r"tokenizer_config.json is a list"),
    "tokenizer.model alone": (
        lambda folder: (remove("tokenizer.json")(folder), write("tokenizer.model", b"\x0a\x09")(folder)),
        r"has its tokenizer as tokenizer.model only, which is not read. Convert it where sentencepiece is installed",
    ),
    "vocab.json without merges.txt": (
        lambda folder: (remove("tokenizer.json")(folder), write("vocab.json", b"{}")(folder)),
        r"has no tokenizer.json",
    ),
    "tokenizer knows no letters": (
        lambda folder: tokenizer_json(folder, no_letters),
        r"has 4 tokens and gives no tokens for the ordinary text",
    ),
    "tokenizer knows few words": (
        lambda folder: tokenizer_json(folder, unknown_words),
        r"does not know words of \(\d+ of \d+ tokens are unknown\)|gives .* back for the ordinary text",
    ),
    "tokenizer loses spaces": (
        lambda folder: tokenizer_json(folder, loses_spaces),
        r"gives 'thequickbrown.* back for the ordinary text",
    ),
    "a token too many": (
        lambda folder: tokenizer_json(folder, one_more_token),
        r"embedding has 300 rows: 1 token beyond it: '<\|extra\|>' \(300\)",
    ),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_a_folder_that_is_not_whole_is_refused_and_the_message_names_what_is_wrong(folder, case):
    damage, message = NOT_WHOLE[case]
    damage(folder)
    said = refusal(folder)
    assert re.search(message, said), said
    assert said.startswith("model.source: ") and "\n" not in said


def test_no_part_of_a_model_that_is_refused_gets_a_key(folder):
    """What would make two models one key is refused before text is read, or changes the key."""
    whole = model_identity(settings(folder))
    (folder / "README.md").write_text("words")
    assert model_identity(settings(folder)) == whole, "what is not read does not count"
    tokenizer_json(folder, lambda content: content.update(normalizer={"type": "Lowercase"}))
    assert model_identity(settings(folder))["tokenizer"] != whole["tokenizer"]
    assert model_identity(settings(folder))["weights"] == whole["weights"]
    edit_weights(folder, lambda weights: weights | {"transformer.ln_f.bias": torch.ones(32)})
    assert model_identity(settings(folder))["weights"] != whole["weights"]
    remove("tokenizer.json", "tokenizer_config.json")(folder)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        model_identity(settings(folder))


def test_what_the_files_have_besides_the_model_is_said(folder, capsys):
    edit_weights(folder, lambda weights: weights | {"score.weight": torch.ones(2, 32), "v_head.bias": torch.ones(1)})
    load_language_model(settings(folder))
    assert "not used of its files: 2 tensors (score.weight, v_head.bias)" in capsys.readouterr().err


def test_masks_and_frequencies_of_older_checkpoints_are_no_fault(folder, capsys):
    buffers = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
    buffers["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    edit_weights(folder, lambda weights: weights | buffers)
    load_language_model(settings(folder))
    assert "not used" not in capsys.readouterr().err


def test_a_checkpoint_without_the_prefix_of_the_causal_model_is_whole(folder):
    """As openai-community/gpt2 has it."""
    reference = load_language_model(settings(folder)).model.state_dict()
    edit_weights(folder, lambda weights: {name.removeprefix("transformer."): t for name, t in weights.items()})
    loaded = load_language_model(settings(folder)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in reference.items())


def test_shards_and_an_index_are_whole(folder):
    reference = load_language_model(settings(folder)).model.state_dict()
    shards(folder, leave_out=False)
    loaded = load_language_model(settings(folder)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in reference.items())


def test_a_tokenizer_is_built_from_its_vocabulary_and_merges(folder):
    reference = load_language_model(settings(folder)).tokenizer
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    )
    before = model_identity(settings(folder))
    remove("tokenizer.json", "tokenizer_config.json")(folder)
    lm = load_language_model(settings(folder))
    assert lm.tokenizer("abc def gh")["input_ids"] == reference("abc def gh")["input_ids"]
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert len({model_identity(settings(folder))["tokenizer"], before["tokenizer"]}) == 2


def test_an_embedding_with_many_rows_more_than_tokens_is_said(folder, capsys):
    def enlarge(weights):
        return weights | {"transformer.wte.weight": torch.ones(400, 32)}

    edit_weights(folder, enlarge)
    edit_json(folder / "config.json", vocab_size=400)
    load_language_model(settings(folder))
    assert "the tokenizer has 300 tokens, the embedding 400 rows" in capsys.readouterr().err


# ---- settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"attn_implementation": "foo"},
            "model.attn_implementation: 'foo' must be one of eager, sdpa, flash_attention_2",
        ),
        ({"attn_implementation": None}, "model.attn_implementation: null must be one of eager, sdpa"),
        (
            {"attn_implementation": "kernels-community/flash-attn"},
            "model.attn_implementation: 'kernels-.*must be one of",
        ),
        ({"attn_implementation": "flash_attention_2"}, "model.attn_implementation=flash_attention_2: "),
        ({"attn_implementation": "paged|eager"}, "model.attn_implementation: 'paged.eager' must be one of"),
        ({"dtype": "float64"}, "model.dtype: 'float64' must be one of float32, bfloat16, float16"),
        ({"revision": 12}, "model.revision: 12 must be a text or null"),
        ({"revision": ""}, "model.revision: '' must be a commit, branch or tag"),
        ({"source": ""}, "model.source: '' must name a model"),
        ({"source": 3}, "model.source: 3 must be a text"),
        ({"d_model": 0}, "model.d_model: 0 must be positive"),
        ({"n_layers": "six"}, "model.n_layers: 'six' must be a whole number"),
        ({"device": "cuda:77"}, "model.device=cuda:77: this machine has no such GPU"),
        ({"device": "mps"}, "model.device: 'mps' must be one of auto, cpu"),
        ({"device": "meta"}, "model.device: 'meta' must be one of auto, cpu"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_rule(folder, changed, message):
    assert re.search(message, refusal(changed.pop("source", folder), **changed))


def test_a_file_that_is_no_model_is_named(folder):
    assert "tokenizer.json is a file. Name the folder of a model" in refusal(folder / "tokenizer.json")


# ---- GGUF


@pytest.mark.parametrize("absent", [("gguf", "accelerate"), ("accelerate",)])
def test_a_gguf_file_is_refused_where_its_packages_are_not_installed(tmp_path, monkeypatch, absent):
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name in absent else object())
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    said = refusal(tmp_path / "model.gguf")
    assert "model.gguf is a GGUF file. It is read where the packages gguf and accelerate are installed" in said
    assert f"missing here: {', '.join(absent)} (pip install {' '.join(absent)})" in said


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    assert f"model.source: there is no file {tmp_path / 'x.gguf'}" in refusal(tmp_path / "x.gguf")
    assert "model.source: there is no file x.gguf" in refusal("x.gguf")


def test_a_gguf_file_is_handed_to_transformers_for_configuration_tokenizer_and_weights(folder, monkeypatch):
    """The packages are not installed here, so the library's readers are replaced: this tests what they are asked
    for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    (folder / "gguf").mkdir()
    file = folder / "gguf" / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    asked = []

    def instead(kind):
        real = kind.from_pretrained

        def from_pretrained(place, gguf_file=None, **options):
            asked.extend([(kind.__name__, str(place), gguf_file)] if gguf_file else [])
            return real(folder, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        instead(kind)
    lm = load_language_model(settings(file))
    assert lm.d_model == 32 and asked == [
        (name, str(folder / "gguf"), "model.gguf") for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")
    ]
    identity = model_identity(settings(file))
    file.write_bytes(b"GGUF" + bytes(101))
    assert identity["weights"] != model_identity(settings(file))["weights"]


# ---- the hub


def test_a_model_loads_by_name_and_knows_its_commit(hub):
    lm = load_language_model(settings("lab/tiny"))
    assert lm.revision == hub.repositories["lab/tiny"].branches["main"]
    assert lm.logits(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 300)
    assert not hub.asked_for("GET .*README|\\.bin"), "only what is used is fetched"


def test_a_model_loads_again_without_the_hub(hub, endpoint):
    commit = load_language_model(settings("lab/tiny")).revision
    endpoint(f"http://127.0.0.1:{closed_port()}")
    started = time.monotonic()
    for revision in ("main", commit):
        assert load_language_model(settings("lab/tiny", revision=revision)).revision == commit
    assert time.monotonic() - started < 10


def unreachable(hub: HubServer, endpoint: Any) -> None:
    endpoint(f"http://127.0.0.1:{closed_port()}")


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
FAILURES = [
    (500, ""),
    (500, "HEAD"),
    (500, "GET"),
    (429, "HEAD"),
    (503, "GET"),
    (404, "GET"),
    (403, "GET"),
    ("short", "GET"),
    ("drop", ""),
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("how", "method"), FAILURES)
def test_a_file_that_the_hub_lists_and_does_not_give_is_named_and_fetched_by_the_next_run(hub, file, how, method):
    hub.fail(f"/resolve/.*/{re.escape(file)}$", how, method)
    said = refusal("lab/tiny")
    assert "safetensors, and pickled" not in said and "Convert" not in said
    assert (
        f"{file} of lab/tiny is on the hub, but could not be fetched" in said and "Run the same command again" in said
    )
    if isinstance(how, int):
        assert f"HTTP {how}" in said, said
    hub.heal()
    commits._known.clear()
    assert load_language_model(settings("lab/tiny")).d_model == 32


@pytest.mark.parametrize("how", [500, 429, "drop"])
@pytest.mark.parametrize("what", ["/revision/", "/tree/"])
def test_a_hub_that_does_not_list_the_files_is_not_taken_for_a_model_without_them(hub, what, how):
    hub.fail(what, how)
    said = refusal("lab/tiny")
    assert "lab/tiny could not be reached, and is not complete in the local cache" in said
    assert how == "drop" or f"HTTP {how}" in said
    hub.heal()
    assert load_language_model(settings("lab/tiny")).d_model == 32


@pytest.mark.parametrize("name", [file for file in FILES if file != "tokenizer_config.json"])
def test_a_repository_that_lacks_a_file_is_refused_for_that_reason(hub, tiny_lm_folder, name):
    hub.add("lab/part", files_of(tiny_lm_folder, {name: None, "pytorch_model.bin": b"x"}))
    said = refusal("lab/part")
    expected = "pickled weights are not read" if name == "model.safetensors" else f"has no {name}"
    assert expected in said and "reached" not in said
    assert not hub.asked_for(r"\.bin$")


@pytest.mark.parametrize("case", list(NOT_WHOLE))
def test_a_repository_that_is_not_whole_is_refused_like_a_folder(hub, folder, case):
    damage, message = NOT_WHOLE[case]
    damage(folder)
    hub.add("lab/part", files_of(folder))
    said = refusal("lab/part")
    assert re.search(message.replace("/model/m.Q4", "/part/m.Q4"), said), said
    assert not hub.asked_for(r"\.bin$")


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("lab/unknown", "main", "model.source: lab/unknown is neither a local folder nor a readable model on the hub"),
        (
            "lab/unknown",
            "0" * 40,
            "model.source: lab/unknown is neither a local folder nor a readable model on the hub",
        ),
        ("not a name", "main", "model.source: not a name is neither a local folder nor a readable model on the hub"),
        ("lab/tiny", "v9", "model.revision: lab/tiny has no revision 'v9'"),
        ("lab/tiny", "0" * 40, "model.revision: lab/tiny has no revision '0000"),
        (
            "lab/gated",
            "main",
            "lab/gated is gated. Accept its licence at .*/lab/gated and set HF_TOKEN, or use model=bundled",
        ),
        ("lab/tiny/none.gguf", "main", "lab/tiny/none.gguf is a GGUF file. It is read where"),
    ],
)
def test_each_refusal_of_the_hub_has_its_own_message(hub, tiny_lm_folder, source, revision, message):
    hub.add("lab/gated", files_of(tiny_lm_folder), gated=True)
    assert re.search(message, refusal(source, revision=revision))


@pytest.mark.parametrize("revision", ["main", "0" * 40])
def test_without_a_network_loading_by_name_fails_at_once_and_suggests_the_bundled_model(endpoint, revision):
    endpoint(f"http://127.0.0.1:{closed_port()}")
    started = time.monotonic()
    assert re.search(
        "model.source: lab/tiny could not be reached.*model=bundled", refusal("lab/tiny", revision=revision)
    )
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("revision", ["main", "0" * 40])
def test_loading_waits_only_once_for_a_hub_that_does_not_answer(endpoint, monkeypatch, revision):
    monkeypatch.setattr(commits, "TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert re.search("lab/tiny could not be reached.*model=bundled", refusal("lab/tiny", revision=revision))
    assert time.monotonic() - started < 5


def test_in_offline_mode_loading_by_name_fails_and_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert re.search(r"lab/tiny could not be reached.*offline mode is on \(HF_HUB_OFFLINE=1\)", refusal("lab/tiny"))


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("listed", [True, False])
def test_without_the_hub_a_cache_that_lacks_a_file_is_not_complete(hub, endpoint, tmp_path, name, listed):
    """Also in a cache that an earlier version of the library made, which holds no list of files."""
    load_language_model(settings("lab/tiny"))
    if not listed:
        shutil.rmtree(tmp_path / "cache" / "models--lab--tiny" / "trees")
        assert load_language_model(settings("lab/tiny")).d_model == 32
    [pointer] = (tmp_path / "cache").glob(f"models--lab--tiny/snapshots/*/{name}")
    pointer.resolve().unlink()
    pointer.unlink()
    endpoint(f"http://127.0.0.1:{closed_port()}")
    said = refusal("lab/tiny")
    assert name.partition(".")[0] in said and "could not be" in said and "Convert" not in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("change", ["cut", "grown", "empty"])
def test_a_damaged_file_in_the_cache_is_named_and_fetched_again_once_it_is_removed(hub, tmp_path, name, change):
    load_language_model(settings("lab/tiny"))
    [pointer] = (tmp_path / "cache").glob(f"models--lab--tiny/snapshots/*/{name}")
    blob = pointer.resolve()
    content = blob.read_bytes()
    blob.write_bytes({"cut": content[: len(content) // 2], "grown": content + b" ", "empty": b""}[change])
    said = refusal("lab/tiny")
    assert f"{name} is damaged" in said and f"Remove {blob} and fetch it again" in said
    blob.unlink()
    assert load_language_model(settings("lab/tiny")).d_model == 32


def test_cached_weights_with_one_changed_number_are_refused(hub, tmp_path):
    load_language_model(settings("lab/tiny"))
    [pointer] = (tmp_path / "cache").glob("models--lab--tiny/snapshots/*/model.safetensors")
    content = bytearray(pointer.read_bytes())
    content[-100] ^= 1
    pointer.resolve().write_bytes(bytes(content))
    assert "model.safetensors is damaged: its content is not what the hub has" in refusal("lab/tiny")


# ---- branches that move


def other_tokens(folder: Path) -> dict[str, bytes]:
    """The files with other weights."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return files_of(folder)


def test_a_branch_is_one_commit_throughout_a_process_and_its_commit_is_in_the_key(hub, folder):
    first = hub.repositories["lab/tiny"].branches["main"]
    identity = model_identity(settings("lab/tiny"))
    assert identity["revision"] == first and identity["tokenizer"]
    second = hub.add("lab/tiny", other_tokens(folder))
    assert load_language_model(settings("lab/tiny")).revision == first, "the branch moved while the process runs"
    commits._known.clear()  # another process
    assert load_language_model(settings("lab/tiny")).revision == second
    assert model_identity(settings("lab/tiny")) == {**identity, "revision": second}
    assert model_identity(settings("lab/tiny", revision=first)) == identity


def test_the_name_of_a_model_says_which_it_is(hub, folder):
    assert model_label(settings("lab/tiny")) == "lab/tiny"
    label = model_label(settings(folder))
    assert re.fullmatch("model@[0-9a-f]{12}", label)
    edit_weights(folder, lambda weights: weights | {"transformer.ln_f.bias": torch.ones(32)})
    assert model_label(settings(folder)) != label
    assert model_label(OmegaConf.load(CONF / "bundled.yaml")).startswith("bundled@")


# ---- what is shipped


def test_the_error_for_a_missing_bundled_model_says_how_to_get_it_back(monkeypatch, tmp_path):
    monkeypatch.setitem(SHIPPED, "bundled", tmp_path / "gone")
    assert re.search(r"model=bundled: .*gone is missing.*git checkout", refusal("bundled"))


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_has_the_keys_that_loading_needs(file):
    cfg = OmegaConf.load(file)
    assert set(cfg) == set(settings("x")) and cfg.name == file.stem
    assert cfg.dtype in loading.DTYPES and cfg.device == "auto"
    if OmegaConf.is_missing(cfg, "source"):
        with pytest.raises(UserError, match=r"model\.source is not set"):
            Settings.of(cfg)
    elif cfg.source not in SHIPPED:
        assert len(cfg.revision) == 40  # a commit: a branch could move
        assert Settings.of(cfg).d_model == cfg.d_model


@pytest.mark.parametrize("source", [name for name, folder in SHIPPED.items() if folder.is_dir()])
def test_a_shipped_model_fits_its_configuration(source):
    lm = load_language_model(OmegaConf.load(CONF / f"{source}.yaml"))
    assert lm.family in FAMILIES and lm.token_losses(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()
