"""Dictionaries go out as files and come back: through export, and into an experiment that trains none."""

import json
import sys
from pathlib import Path

import pytest

import run as runner
from core.interop import saelens
from core.models.identity import model_label

SETTINGS = ["scale=smoke", "logging=none", "stream.n_tokens=1024"]


@pytest.fixture
def cell(tmp_path_factory, monkeypatch, capsys):
    """Runs one cell in a folder for its output: exit code and standard error."""
    artifacts = tmp_path_factory.mktemp("artifacts")

    def one(out: Path, *arguments: str) -> tuple[int, str]:
        given = [*SETTINGS, f"output_dir={out}", f"artifacts_dir={artifacts}", *arguments]
        monkeypatch.setattr(sys, "argv", ["run.py", *given])
        return runner.main(), capsys.readouterr().err

    return one


@pytest.fixture
def run(cell):
    """Runs one cell and gives its folder."""

    def one(out: Path, *arguments: str) -> Path:
        code, err = cell(out, *arguments)
        assert code == 0, err
        return next(out.rglob("results.json")).parent

    return one


@pytest.fixture
def refused(cell):
    """Runs one cell that fails, and returns its standard error."""

    def one(out: Path, *arguments: str) -> str:
        code, err = cell(out, *arguments)
        assert code != 0
        return err

    return one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=lca"], "LCA has no encoder of one matrix"),
        (["method=topk", "method.input_norm=token_center"], "export.centred_model=true"),
        (["method=pretrained"], "method.repo: this setting must be given"),
    ],
)
def test_what_cannot_be_written_is_refused_before_it_is_trained(arguments, message, refused, tmp_path):
    assert message in refused(tmp_path, "experiment=export", *arguments)
    assert not (tmp_path / "logs").exists()


def metrics(cell: Path) -> dict[str, float]:
    return json.loads((cell / "results.json").read_text())["metrics"]


@pytest.mark.slow
def test_a_trained_dictionary_is_exported_and_scored_again_with_the_same_result(run, refused, tmp_path):
    first = run(tmp_path / "a", "experiment=export", "method=batchtopk", "method.dict_size=64", "method.k=8")
    scores = metrics(first)
    for name in ("l0_mean", "nmse_raw_energy", "nmse_token_std", "ce_degradation"):
        assert scores[f"{name}_exported"] == pytest.approx(scores[name], rel=1e-4)
    sparsity = saelens.read_log_sparsity(first / "saelens")
    assert (10**sparsity).sum().item() == pytest.approx(scores["l0_mean"], rel=1e-4)

    said = json.loads((first / "saelens" / saelens.CFG).read_text())["metadata"]
    assert said["model_name"] == model_label({"source": "bundled", "revision": None})
    assert (said["prepend_bos"], said["context_size"], said["packing"]) == (False, 128, "concat")

    loaded = ["experiment=leask_batchtopk", "hydra.mode=RUN", "method=pretrained"]
    again = run(tmp_path / "b", *loaded, f'method.repo="{first}/saelens"')
    assert metrics(again)["l0_mean"] == scores["l0_mean"]
    assert metrics(again)["nmse_raw_energy"] == pytest.approx(scores["nmse_raw_energy"], rel=1e-4)
    assert metrics(again)["l0_mean_compat"] > 0
    stored = json.loads((again / "dictionary.json").read_text())
    assert stored["hyperparameters"]["source"]["repo"] == str(first / "saelens")

    native = run(tmp_path / "c", *loaded, f'method.repo="{first}"')  # the cell that trained it
    assert metrics(native)["nmse_raw_energy"] == scores["nmse_raw_energy"]
    from_cell = ["experiment=export", "method=pretrained", f'method.repo="{first}"', f"export.folder={tmp_path}/out"]
    assert metrics(run(tmp_path / "d", *from_cell))["l0_mean_exported"] == scores["l0_mean"]
    assert json.loads((tmp_path / "out" / saelens.CFG).read_text())["metadata"] == said
    assert f"export.folder={tmp_path / 'out'} already holds files" in refused(tmp_path / "e", *from_cell)

    for arguments, message in (
        ((f'method.repo="{first}"', "stream.site=resid_pre.2"), "Set stream.site=resid_pre.4"),
        ((f'method.repo="{first}/saelens"', "stream.site=resid_pre.2"), "Set stream.site=resid_pre.4"),
        ((f'method.repo="{first}/saelens"', "method.dict_size=65"), "method.dict_size is 65"),
        ((f"method.repo={tmp_path}/nothing",), "there is no folder"),
    ):
        assert message in refused(tmp_path / "f", *loaded, *arguments)
