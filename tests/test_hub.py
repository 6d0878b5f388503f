"""Branches of the hub: one commit in a process, in keys, manifests and inputs; a stopped training keeps its own."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import hub as commits
from core import inputs, training
from core.artifacts import Store
from core.errors import UserError
from core.fleet import KIND, Request, load_or_train
from core.interrupts import Interrupted
from core.models.identity import note_model
from core.models.language_model import load_language_model
from core.streams.activation_source import ActivationSource, pinned_text
from core.text.hub import HubText
from tests.fake_hub import closed_port
from tests.hub_server import HubServer, files_of, hub_server
from tests.models.test_finetune import stopping_after
from tests.test_fleet import METHODS


@pytest.fixture
def hub(endpoint, tiny_lm_folder):
    with hub_server() as server:
        server.add("lab/tiny", files_of(tiny_lm_folder))
        server.add("datasets/lab/text", {"a.jsonl": b'{"text": "one"}\n'})
        endpoint(server.url)
        yield server


@pytest.fixture
def moved(hub, tiny_lm_folder, tmp_path):
    """Moves `main` of lab/tiny to other weights, and returns the commits before and after."""

    def move() -> tuple[str, str]:
        folder = Path(shutil.copytree(tiny_lm_folder, tmp_path / "other"))
        weights = {name: 0.5 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        before = hub.repositories["lab/tiny"].branches["main"]
        return before, hub.add("lab/tiny", files_of(folder))

    return move


@pytest.fixture
def request_of(small_request, tiny_model):
    def one(revision: str = "main") -> Request:
        request = small_request(METHODS["topk"])
        model = {**tiny_model, "source": "lab/tiny", "revision": revision}
        return Request(request.method, replace(request.source, model=model))

    return one


def another_process() -> None:
    """What this process knows is forgotten."""
    commits._known.clear()
    commits._kept.clear()


def manifest(request: Request, run: Any) -> dict[str, Any]:
    return json.loads((Store(run.artifacts_dir).path(KIND, request.spec) / "manifest.json").read_text())


def test_a_dictionary_lies_under_the_commit_of_its_model_and_its_manifest_names_it(
    hub, moved, request_of, runtime, tmp_path
):
    run, first = runtime(tmp_path, "store"), request_of()
    load_or_train(first, run)
    before, after = moved()
    assert first.spec["source"]["batches"]["model"]["revision"] == before
    assert manifest(first, run)["training"]["commits"] == {"hub:lab/tiny@main": before}
    assert request_of().key == request_of(before).key == first.key, "in one process the branch stays where it is"
    another_process()
    second = request_of()
    assert second.key == request_of(after).key != first.key
    load_or_train(second, run)
    assert manifest(second, run)["training"]["commits"] == {"hub:lab/tiny@main": after}


def test_a_stopped_training_goes_on_with_its_commit_after_the_branch_has_moved_and_says_so(
    hub, moved, request_of, runtime, tmp_path, monkeypatch, capsys
):
    whole, run = runtime(tmp_path, "whole"), runtime(tmp_path, "stopped")
    expected = load_or_train(request_of(), whole).state_dict()
    make_trainer = training.make_trainer
    monkeypatch.setattr(training, "make_trainer", stopping_after(2, make_trainer))
    with pytest.raises(Interrupted):
        load_or_train(request_of(), run)
    monkeypatch.setattr(training, "make_trainer", make_trainer)
    before, after = moved()
    [beside] = (Path(run.artifacts_dir) / "training").rglob(commits.COMMITS)
    assert json.loads(beside.read_text()) == {"hub:lab/tiny@main": before}

    another_process()
    commits.go_on_with_unfinished(run.artifacts_dir)
    request = request_of()
    resumed = load_or_train(request, run).state_dict()
    said = capsys.readouterr().err
    assert f"lab/tiny: main has moved from {before} to {after} since the unfinished training" in said
    assert f"This run goes on with {before}. For the newer one set model.revision={after}, or remove" in said
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert load_language_model(request.source.model).revision == before, "it is scored with the same model"
    assert not list((Path(run.artifacts_dir) / "training").rglob(commits.COMMITS))

    another_process()
    commits.go_on_with_unfinished(run.artifacts_dir)
    assert request_of().key == request_of(after).key, "nothing unfinished is left"


def test_a_training_whose_branch_has_not_moved_says_nothing(hub, request_of, tmp_path, capsys):
    before = hub.repositories["lab/tiny"].branches["main"]
    folder = tmp_path / "store" / "training" / "group" / "run"
    folder.mkdir(parents=True)
    (folder / commits.COMMITS).write_text(json.dumps({"hub:lab/tiny@main": before}))
    commits.go_on_with_unfinished(tmp_path / "store")
    assert commits.commit_of("lab/tiny", "main") == before and capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ['{"hub:lab/tiny@main": 3}', "[]", "{", "[" * 100_000])
def test_a_damaged_record_of_commits_is_named(tmp_path, content):
    (tmp_path / "training" / "group" / "run").mkdir(parents=True)
    (tmp_path / "training" / "group" / "run" / commits.COMMITS).write_text(content)
    with pytest.raises(UserError, match=r"commits\.json"):
        commits.go_on_with_unfinished(tmp_path)


def test_a_source_takes_its_commits_into_other_processes(hub, moved, request_of):
    request = request_of()
    before = request.spec["source"]["batches"]["model"]["revision"]
    sent = pickle.dumps(request)
    moved()
    another_process()
    received = pickle.loads(sent).source
    assert isinstance(received, ActivationSource) and received.pinned[0]["revision"] == before


def test_a_cell_depends_on_the_commit_of_its_model_also_when_the_dictionary_is_in_the_store(
    hub, moved, request_of, runtime, tmp_path
):
    run = runtime(tmp_path, "store")
    load_or_train(request_of(), run)
    with inputs.noting() as noted:
        load_or_train(request_of(), run)
    before, _ = moved()
    assert noted["hub:lab/tiny@main"] == before and inputs.changed(noted)[0] == []
    another_process()
    commits.commit_of("lab/tiny", "main")  # another run has asked the hub
    assert inputs.changed(noted)[0] == ["hub:lab/tiny@main"]


def test_a_cell_depends_on_every_file_of_a_model_in_a_folder(tiny_lm_folder, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_lm_folder, tmp_path / "model"))
    model = {**tiny_model, "source": str(folder)}
    with inputs.noting() as noted:
        note_model(model)
    with inputs.noting() as by_loading:
        load_language_model(model)
    used = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert noted == by_loading and sorted(Path(name).name for name in noted) == used
    for name in used:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert inputs.changed(noted)[0] == [str(folder / name)]
        (folder / name).write_bytes(content)
    assert inputs.changed(noted)[0] == []


# ---- data sets


def test_the_branch_of_a_data_set_is_its_commit_in_specs_and_inputs(hub: HubServer, endpoint):
    before = hub.repositories["datasets/lab/text"].branches["main"]
    text = HubText("lab/text", "main")
    with inputs.noting() as noted:
        assert text.spec["revision"] == before == HubText("lab/text", before).spec["revision"]
    assert noted["hub:datasets/lab/text@main"] == before and text.commits == {"hub:datasets/lab/text@main": before}
    after = hub.add("datasets/lab/text", {"a.jsonl": b'{"text": "two"}\n'})
    assert HubText("lab/text", "main").spec["revision"] == before, "in one process the branch stays where it is"
    another_process()
    assert HubText("lab/text", "main").spec["revision"] == after and inputs.changed(noted)[0] == list(noted)[:1]
    another_process()
    endpoint(f"http://127.0.0.1:{closed_port()}")
    another_process()
    assert HubText("lab/text", "main").spec["revision"] == after, "without a network, what was fetched last"
    with pytest.raises(UserError, match="cannot be read: the Hub does not answer"):
        assert HubText("lab/other", "main").spec


def test_a_data_set_within_another_text_is_named_by_its_commit(hub):
    text = {"_target_": "core.text.hub.HubText", "path": "lab/text", "revision": "main"}
    node = {"_target_": "core.text.facts.TextWithFacts", "source": text, "facts": [{"a": 1}]}
    before = hub.repositories["datasets/lab/text"].branches["main"]
    assert pinned_text(node) == {**node, "source": {**text, "revision": before}}
