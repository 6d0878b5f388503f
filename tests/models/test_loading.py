"""Loading a model by name: from a hub that is a web server on this machine, and without a hub."""

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from core.errors import UserError
from core.models import loading
from core.models.language_model import load_language_model
from core.models.loading import SHIPPED, Settings
from core.models.sites import FAMILIES
from tests.fake_hub import COMMIT, FakeHub, closed_port, serving

CONF = Path(__file__).parents[2] / "conf" / "model"


def settings(source, **changed):
    plain = {"name": "tiny", "source": source, "revision": "main", "dtype": "float32", "d_model": 8, "n_layers": 1}
    return OmegaConf.create(plain | {"attn_implementation": "sdpa", "device": "cpu"} | changed)


class Hub(FakeHub):
    """Answers as the hub would for lab/tiny, lab/pickled (no safetensors) and lab/gated. Nothing else exists."""

    folder: Path

    def serve(self):
        _, owner, name, *rest = self.path.removeprefix("/api/models").split("?")[0].split("/")
        if name not in ("tiny", "pickled", "gated"):
            return self.refuse(404, "RepoNotFound")
        if rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if rest[0] == "revision":
            return self.answer(json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}).encode())
        if name == "gated":
            return self.refuse(403, "GatedRepo")
        if rest[0] == "tree":  # a request for more chat templates
            return self.refuse(404, "EntryNotFound")
        file = self.folder / "/".join(rest[2:])
        if not file.is_file() or (name == "pickled" and file.suffix == ".safetensors"):
            return self.refuse(404, "EntryNotFound")
        return self.answer(file.read_bytes())


@pytest.fixture
def hub(endpoint, tmp_path):
    folder = tmp_path / "served"
    config = GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(5)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0").save_pretrained(folder)
    handler = type("Served", (Hub,), {"folder": folder})
    with serving(handler) as url:
        endpoint(url)
        yield handler


def test_a_model_loads_by_name_and_knows_its_commit(hub):
    lm = load_language_model(settings("lab/tiny"))
    assert lm.revision == COMMIT and lm.logits(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 5)


def test_a_model_loads_again_without_the_hub(hub, endpoint):
    load_language_model(settings("lab/tiny"))
    endpoint(f"http://127.0.0.1:{closed_port()}")
    started = time.monotonic()
    for revision in ("main", COMMIT):
        assert load_language_model(settings("lab/tiny", revision=revision)).revision == COMMIT
    assert time.monotonic() - started < 10


def test_an_incomplete_download_is_not_mistaken_for_a_model_without_safetensors(hub, endpoint):
    hub.folder.joinpath("model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights as safetensors"):
        load_language_model(settings("lab/tiny"))
    endpoint(f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(UserError, match=r"lab/tiny could not be reached, and is not complete in the local cache"):
        load_language_model(settings("lab/tiny"))


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("lab/unknown", "main", "model.source: lab/unknown is neither a local folder nor a readable model on the hub"),
        ("lab/unknown", COMMIT, "model.source: lab/unknown is neither a local folder nor a readable model on the hub"),
        ("not a name", "main", "model.source: not a name is neither a local folder nor a readable model on the hub"),
        ("lab/tiny", "v9", "model.revision: lab/tiny has no revision 'v9'"),
        (
            "lab/gated",
            "main",
            "lab/gated is gated. Accept its licence at .*/lab/gated and set HF_TOKEN, or use model=bundled",
        ),
        ("lab/pickled", "main", "lab/pickled has no weights as safetensors.*model=bundled"),
    ],
)
def test_each_refusal_of_the_hub_has_its_own_message(hub, source, revision, message):
    with pytest.raises(UserError, match=message):
        load_language_model(settings(source, revision=revision))


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_without_a_network_loading_by_name_fails_at_once_and_suggests_the_bundled_model(endpoint, revision):
    endpoint(f"http://127.0.0.1:{closed_port()}")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"model.source: lab/tiny could not be reached.*model=bundled needs no network"):
        load_language_model(settings("lab/tiny", revision=revision))
    assert time.monotonic() - started < 5


def test_loading_waits_only_once_for_a_hub_that_does_not_answer(endpoint, monkeypatch):
    monkeypatch.setattr(loading, "HUB_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"lab/tiny could not be reached.*model=bundled"):
            load_language_model(settings("lab/tiny"))
    assert time.monotonic() - started < 5


def test_in_offline_mode_loading_by_name_fails_and_suggests_the_bundled_model(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model.source: lab/tiny could not be reached.*model=bundled needs no network"):
        load_language_model(settings("lab/tiny"))


def test_the_error_for_a_missing_bundled_model_says_how_to_train_it(monkeypatch, tmp_path):
    monkeypatch.setitem(SHIPPED, "bundled", tmp_path / "gone")
    with pytest.raises(UserError, match=r"model=bundled: .*gone is missing.*git checkout"):
        load_language_model(settings("bundled"))


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
