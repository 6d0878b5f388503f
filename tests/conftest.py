"""Fixtures for several test files: a random GPT-2 with a small tokenizer, random text, one thread."""

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import run as runner
from core.fleet import Request
from core.runtime import Runtime
from core.streams.activation_source import ActivationSource
from core.text.documents import CountedDocuments, Document, SpecialTokens, Split, split_of
from reports.collect import Cell, read_cells


class WordSource:
    """Documents of random words; the content of each decides whether it is held out."""

    name = "words"
    special_tokens: SpecialTokens = "plain"

    def __init__(self, n_documents: int = 400, words_per_document: int = 40) -> None:
        rng = random.Random(0)
        vocabulary = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(120)]
        self.texts = [" ".join(rng.choices(vocabulary, k=words_per_document)) for _ in range(n_documents)]

    @property
    def spec(self) -> dict[str, Any]:
        return {"words": len(self.texts)}

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> CountedDocuments:
        chosen = [Document(text) for text in self.texts if split_of(text, 0.2) == split]
        random.Random(seed).shuffle(chosen)
        return CountedDocuments(iter(chosen), state)


@pytest.fixture(scope="session")
def words() -> WordSource:
    return WordSource()


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory: pytest.TempPathFactory, words: WordSource) -> Path:
    """A random GPT-2 (d_model 32, 3 layers, context 64) with a trained tokenizer, in Hugging Face's format."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from core.models.pretrain import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_lm")
    tokenizer = train_tokenizer(words.texts, vocab_size=300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_lm_folder: Path) -> dict[str, Any]:
    """The group `model` for the tiny model."""
    return {
        "name": "tiny",
        "source": str(tiny_lm_folder),
        "revision": None,
        "dtype": "float32",
        "d_model": 32,
        "n_layers": 3,
        "attn_implementation": "sdpa",
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def words_data(words: WordSource, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The group `data` for the random words as a local file."""
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in words.texts))
    return {"_target_": "core.text.local.LocalText", "path": str(path)}


TEMPLATE = (  # writes its own BOS, and refuses roles that do not alternate
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_chat_folder(tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path) -> Path:
    """The tiny model with noise added to its weights, and a chat template: its chat sibling."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny_chat")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_lm_folder),
        AutoTokenizer.from_pretrained(tiny_lm_folder),
    )
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pair(tiny_lm_folder: Path, tiny_chat_folder: Path) -> dict[str, Any]:
    """The group `pair` for the tiny model and its chat sibling."""
    return {
        "name": "tiny", "base": str(tiny_lm_folder), "chat": str(tiny_chat_folder), "revision_base": None,
        "revision_chat": None, "dtype": "float32", "device": "cpu", "attn_implementation": "sdpa",
        "site": "resid_post.1", "base_token_map": {}, "drop_first": 0, "drop_bos": True, "d_model": 32,
    }  # fmt: skip


@pytest.fixture(scope="session")
def words_dialogues(words: WordSource, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The group `dialogues` for dialogues of random words as a local file; one in three has two turns."""
    path = tmp_path_factory.mktemp("dialogues") / "dialogues.jsonl"
    lines = []
    for i, text in enumerate(words.texts):
        parts = [" ".join(text.split()[a : a + 6]) for a in range(0, 24, 6)]
        roles = ["user", "assistant"] * (2 if i % 3 == 0 else 1)
        messages = [{"role": role, "content": part} for role, part in zip(roles, parts, strict=False)]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return {"_target_": "core.text.dialogue_sources.LocalDialogues", "path": str(path)}


SMALL_STREAM = {
    "site": "resid_pre.1", "n_tokens": 1536, "n_ctx": 16, "packing": "concat", "max_document_tokens": 64,
    "batch_size": 64, "buffer_tokens": 512, "buffer_dtype": "float32", "rows_per_forward": 8, "batches_per_chunk": 4,
    "calibration_batches": 3, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def on_tiny_model(tiny_model: dict[str, Any], words_data: dict[str, Any]) -> list[str]:
    """Command-line settings for the tiny model, a site in it, and the random words."""
    model = [f"model.{key}={'null' if value is None else value}" for key, value in tiny_model.items()]
    return ["data=local", f"data.path={words_data['path']}", "model=local", *model, "stream.site=resid_pre.1"]


@pytest.fixture(scope="session")
def smoke_cells(tmp_path_factory: pytest.TempPathFactory, on_tiny_model: list[str]) -> Callable[..., list[Cell]]:
    """Runs the smoke grid of an experiment on the tiny model, with further overrides; returns its cells."""

    def cells(experiment: str, *overrides: str) -> list[Cell]:
        folder = tmp_path_factory.mktemp(experiment)
        places = [f"output_dir={folder}", f"artifacts_dir={folder / 'artifacts'}"]
        fixed = ["run.py", f"experiment={experiment}", "scale=smoke", "logging=none", "stream.n_ctx=32"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*fixed, *on_tiny_model, *places, *overrides])
            assert runner.main() == 0
        return read_cells(folder)

    return cells


@pytest.fixture(scope="session")
def small_request(tiny_model: dict[str, Any], words_data: dict[str, Any]) -> Callable[..., Request]:
    """Makes the request for a method on the tiny model, 24 batches of 64; keywords change the stream."""

    def request(method: dict[str, Any], devices: int = 1, **stream: Any) -> Request:
        settings = {**SMALL_STREAM, **stream}
        return Request(method, ActivationSource(**settings, model=tiny_model, data=words_data, devices=devices))

    return request


@pytest.fixture(scope="session")
def runtime() -> Callable[..., Runtime]:
    """Makes what training needs beside a request, with a store `<folder>/<name>`; keywords change it."""

    def make(folder: Path, name: str, **changes: Any) -> Runtime:
        quiet: dict[str, Any] = {
            "accelerator": "cpu", "precision": "32-true", "checkpoint_every_seconds": 0, "processes": 1,
            "logger": "none", "log_every_steps": 50, "quiet_seconds": 1000,
        }  # fmt: skip
        places = {"name": name, "artifacts_dir": str(folder / name), "output_dir": str(folder / "outputs")}
        return Runtime(**places, **{**quiet, **changes})

    return make


@pytest.fixture(scope="session")
def bundled_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder shared by all processes of a test session, so that the bundled corpus is harvested once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bundled_text"


@pytest.fixture
def artifacts(tmp_path: Path, bundled_text: Path) -> Path:
    """A store with nothing in it except the shared bundled corpus and its tokens."""
    folder = tmp_path / "artifacts"
    folder.mkdir()
    for kind in ("corpus", "tokens"):
        (bundled_text / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind).symlink_to(bundled_text / kind)
    return folder


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Sets the address of the Hugging Face hub (see `tests/hub_server.py`); the cache is empty, no branch is known."""
    import transformers
    from huggingface_hub import constants

    from core import hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setattr(hub, "_kept", {})
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)

    def set_address(url: str) -> None:
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it would keep its first address
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    return set_address


@pytest.fixture(autouse=True, scope="session")
def _as_in_a_terminal() -> Iterator[None]:
    """SIGINT interrupts, even if a shell started the suite in the background. One thread: the tensors are small, and
    several processes share the cores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Each test starts with one thread, whatever the test before it set."""
    torch.set_num_threads(1)
