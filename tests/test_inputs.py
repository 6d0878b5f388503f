"""Results are stale once a file that the cell read, or a branch on the hub, has changed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from core import inputs, results
from core.interop import saelens
from core.interop.loading import load
from core.methods.pretrained import Pretrained
from tests.fake_hub import COMMIT

CFG = OmegaConf.create({"name": "test", "scale": "smoke", "seed": 0})


def put_sae(folder: Path, value: float = 1.0) -> Path:
    W = torch.full((6, 4), value)
    options: dict[str, Any] = {"activation": "relu", "subtract_b_dec": True}
    saelens.write(Pretrained.of(W, W, torch.zeros(6), torch.zeros(4), **options), folder)
    return folder


def run(repo: str, cell: Path) -> dict[str, Any]:
    """The record of a cell that loads a dictionary."""

    def sum_of_weights(cfg: DictConfig) -> dict[str, float]:
        return {"sum": float(load(4, repo).W_dec.sum())}

    results.run_cell(CFG, cell, sum_of_weights)
    return json.loads((cell / results.RESULTS).read_text())


def test_a_cell_whose_dictionary_has_changed_is_not_finished_and_this_is_reported_once(tmp_path, capsys):
    sae, cell = put_sae(tmp_path / "sae"), tmp_path / "cell"
    record = run(str(sae), cell)
    assert {Path(name).name for name in record["inputs"]} == {saelens.CFG, saelens.WEIGHTS}
    assert results.is_finished(cell, CFG)
    put_sae(sae)  # the same content at another time
    assert results.is_finished(cell, CFG) and capsys.readouterr().err == ""
    put_sae(sae, 2.0)
    assert not results.is_finished(cell, CFG) and not results.is_finished(cell, CFG)
    assert capsys.readouterr().err.count(str(sae / saelens.WEIGHTS)) == 1
    assert run(str(sae), cell)["metrics"]["sum"] == 2 * record["metrics"]["sum"]
    assert results.is_finished(cell, CFG)


def test_results_of_a_deleted_dictionary_stay_valid_and_this_is_said(tmp_path, capsys):
    sae, cell = put_sae(tmp_path / "sae"), tmp_path / "cell"
    run(str(sae), cell)
    sae.rename(tmp_path / "elsewhere")
    assert results.is_finished(cell, CFG)
    err = capsys.readouterr().err
    assert "stays finished" in err and str(sae / saelens.WEIGHTS) in err


FOLDER_CHANGES: dict[str, Any] = {
    "a file is added": lambda folder: (folder / "c.txt").write_text("c"),
    "a file is renamed": lambda folder: (folder / "a.txt").rename(folder / "z.txt"),
    "one of two files is deleted": lambda folder: (folder / "a.txt").unlink(),
    "a file is altered, with its size and time kept": lambda folder: alter(folder / "a.txt"),
    "two files change places": lambda folder: swap(folder / "a.txt", folder / "b.txt"),
}


def alter(file: Path) -> None:
    before = file.stat()
    file.write_text("x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    inputs._hashes.clear()  # as in another process


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_suffix(".tmp"))
    other.rename(one)
    one.with_suffix(".tmp").rename(other)


@pytest.mark.parametrize("change", FOLDER_CHANGES)
def test_a_cell_that_read_a_folder_of_texts_runs_again_once_its_files_differ(tmp_path, capsys, change):
    from core.text.finding import find_files

    texts, cell = tmp_path / "texts", tmp_path / "cell"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text(name)

    def read(cfg: DictConfig) -> dict[str, float]:
        inputs.note_listing(str(texts))
        for file in find_files(str(texts)).files:
            inputs.note_file(file)
        return {"a": 1.0}

    results.run_cell(CFG, cell, read)
    (texts / "notes.log").write_text("not a text that is read")
    assert results.is_finished(cell, CFG)
    FOLDER_CHANGES[change](texts)
    assert not results.is_finished(cell, CFG)
    assert str(texts) in capsys.readouterr().err


def test_what_one_cell_has_read_is_noted_for_the_next_one_that_uses_it_from_memory(tmp_path):
    from experiments.common import once_per

    (tmp_path / "text").write_text("a")

    @once_per("seed")
    def shared(cfg: DictConfig) -> float:
        inputs.note_file(tmp_path / "text")
        return 1.0

    for cell in ("first", "second"):
        results.run_cell(CFG, tmp_path / cell, lambda cfg: {"a": shared(cfg)})
        assert results.read(tmp_path / cell / results.RESULTS)["inputs"].keys() == {str(tmp_path / "text")}


@pytest.mark.parametrize(
    "name", ["version:os.path.join", "version:subprocess.Popen", "found:\0", "hub:", "hub:@", "version:", "\0", "", "/"]
)
def test_a_foreign_name_among_the_inputs_imports_nothing_and_is_no_change(name):
    assert inputs.changed({name: "x"})[0] == []


def test_a_branch_on_the_hub_is_identified_by_the_commit_that_was_last_fetched(tmp_path, monkeypatch):
    """The hub is not asked: a branch moves only when something is fetched from it again."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refs = tmp_path / "cache/models--lab--sae/refs"
    refs.mkdir(parents=True)
    (tmp_path / "cache/models--lab--sae/snapshots" / COMMIT).mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    with inputs.noting() as noted:
        inputs.note_commit("lab/sae", "main", COMMIT)
        inputs.note_commit("lab/sae", COMMIT, COMMIT)  # cannot move, but is said
        inputs.note_commit("lab/text", "refs/convert/parquet", COMMIT, "dataset")
        inputs.note_commit("lab/never_fetched", "main", COMMIT)
    names = ["lab/sae@main", f"lab/sae@{COMMIT}", "datasets/lab/text@refs/convert/parquet", "lab/never_fetched@main"]
    assert noted == {f"hub:{name}": COMMIT for name in names}
    assert inputs.cached_commit("lab/sae", "main") == COMMIT and inputs.changed(noted) == ([], [])
    (refs / "main").write_text(COMMIT[::-1])
    assert inputs.changed(noted) == (["hub:lab/sae@main"], [])
    refs = tmp_path / "cache/datasets--lab--text/refs/refs/convert"
    refs.mkdir(parents=True)
    (refs / "parquet").write_text(COMMIT[::-1])
    assert inputs.changed(noted) == (["hub:lab/sae@main", "hub:datasets/lab/text@refs/convert/parquet"], [])


def test_a_cell_that_loads_a_dictionary_trained_here_depends_on_its_weights_and_on_the_file_that_points_to_it(tmp_path):
    from core.methods.saved import save_dictionary

    method = Pretrained.of(
        torch.ones(6, 4), torch.ones(6, 4), torch.zeros(6), torch.zeros(4), activation="relu", subtract_b_dec=True
    )
    save_dictionary(method, {}, tmp_path / "store")
    (tmp_path / "of").mkdir()
    (tmp_path / "of/dictionary.json").write_text(json.dumps({"folder": str(tmp_path / "store")}))
    record = run(str(tmp_path / "of"), tmp_path / "cell")
    assert {Path(name).name for name in record["inputs"]} == {
        "dictionary.json", "manifest.json", "weights.safetensors"
    }  # fmt: skip


def test_a_file_read_outside_a_cell_is_not_recorded(tmp_path):
    with inputs.noting() as noted:
        pass
    load(4, str(put_sae(tmp_path / "sae")))
    assert noted == {}
    results.run_cell(CFG, tmp_path / "cell", lambda cfg: {"a": 1.0})
    assert "inputs" not in json.loads((tmp_path / "cell" / results.RESULTS).read_text())


def test_a_cell_is_not_finished_once_the_version_of_a_method_or_source_has_changed(
    tmp_path, small_request, runtime, monkeypatch, capsys
):
    from core.fleet import load_or_train
    from core.methods.topk import TopK
    from core.streams.activation_source import ActivationSource

    method = {
        "_target_": "core.methods.topk.TopK", "d_model": 32, "dict_size": 16, "k": 2, "use_enc_bias": False,
        "enc_init_norm": None,
        "aux": "none", "aux_coefficient": 0.0, "k_aux": 1, "lr": 1e-3, "betas": [0.9, 0.99], "input_norm": "none",
        "seed": 0, "decoder_norm": "none", "dead_after_tokens": 64, "grad_clip": 1.0,
        "b_dec_init": "zeros", "warmup_steps": 0,
        "decay_fraction": 0.0, "path": "auto",
    }  # fmt: skip
    cfg = OmegaConf.create({"name": "test", "scale": "smoke", "seed": 0})
    request = small_request(method, n_tokens=64, calibration_batches=0)

    def run(_: object) -> dict[str, float]:
        return {"size": load_or_train(request, runtime(tmp_path, "store")).dict_size}

    results.run_cell(cfg, tmp_path / "cell", run)
    assert results.is_finished(tmp_path / "cell", cfg)
    for kind in (TopK, ActivationSource):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "version", 2)
            assert not results.is_finished(tmp_path / "cell", cfg)
            assert f"version:{kind.__module__}.{kind.__name__}" in capsys.readouterr().err
    assert results.is_finished(tmp_path / "cell", cfg)
