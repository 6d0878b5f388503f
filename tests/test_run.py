"""The command line as a user sees it: cells, skipping, exit codes, messages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import run as runner
from core.interop import saelens
from core.methods.pretrained import Pretrained

ROOT = Path(__file__).parents[1]
SMOKE = ["experiment=leask_batchtopk", "scale=smoke", "logging=none", "stream.n_tokens=1024"]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_tiny_model: list[str]):
    """Run the command line in this process on the tiny model and a local text; returns (exit code, outputs folder)."""
    outputs = tmp_path / "outputs"
    fixed = [
        f"output_dir={outputs}",
        f"artifacts_dir={tmp_path / 'artifacts'}",
        *on_tiny_model,
        "stream.n_ctx=32",
        "evaluation.compat_tokens=512",
    ]

    def call(*arguments: str) -> tuple[int, Path]:
        monkeypatch.setattr(sys, "argv", ["run.py", *fixed, *arguments])
        return runner.main(), outputs / "leask_batchtopk" / "smoke"

    return call


def read(folder: Path, name: str = "results.json") -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.rglob(name)}


def test_without_arguments_the_experiments_are_listed_in_under_two_seconds():
    done = subprocess.run([sys.executable, "run.py"], cwd=ROOT, capture_output=True, text=True, timeout=2)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert {p.stem for p in (ROOT / "conf/experiment").glob("*.yaml")} == {line.split()[0] for line in lines[2:]}
    assert all(len(line.split()) > 4 for line in lines[2:])


def test_a_sweep_writes_one_folder_of_results_per_cell_and_skips_them_the_next_time(cli, capsys):
    code, folder = cli(*SMOKE)
    first = read(folder)
    assert code == 0 and len(first) == 3
    assert all(r["metrics"]["nmse_token_std"] > 0 for r in first.values())
    assert all((folder / cell / "l0_histogram.parquet").exists() for cell in first)
    capsys.readouterr()
    assert cli(*SMOKE)[0] == 0
    err = capsys.readouterr().err
    assert "3 cells, 0 to run" in err and err.count("already finished, skipped") == 3
    assert read(folder) == first


def test_the_same_seed_gives_the_same_numbers_and_another_seed_gives_others(cli, tmp_path):
    one = ["method=batchtopk", "force=true"]
    metrics = []
    for i, seed in enumerate(("seed=0", "seed=0", "seed=1")):
        _, folder = cli(*SMOKE, *one, seed)
        [result] = [r for r in read(folder).values() if f"seed={r['seed']}" == seed]
        metrics.append(result["metrics"])
        if i == 0:
            (tmp_path / "artifacts" / "dictionary").rename(tmp_path / "set-aside")
    assert metrics[0] == metrics[1]
    assert metrics[0]["nmse_token_std"] != metrics[2]["nmse_token_std"]


def test_a_sweep_with_a_wrong_setting_in_some_cells_runs_none(cli, capsys):
    code, folder = cli(*SMOKE, "method=batchtopk,topk", "method.k=8,1000", "stream.n_tokens=1.5")
    assert code == 1 and not list(folder.rglob("*.json"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 2 settings will not do:" and "method.k: 1000" in lines[1] + lines[2]
    assert "(In 2 of 4 cells.)" in lines[1] + lines[2] and "  stream.n_tokens: 1.5 must be a whole number." in lines


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "data.path=a b/(c).jsonl",
            """data.path: put the value in quotes, and all of it for the shell: 'data.path="a b/(c).jsonl"'""",
        ),
        ("data.path=a(b)", """'data.path="a(b)"'"""),
        ("seed='1", "seed: put the value in quotes"),
        ("seed", "seed: write it as seed=<value>."),
        ("é=1", "'é': no setting has such a name."),
        ("method.kk=3", "method.kk: there is no such setting. Did you mean method.k?"),
        ("n_tokens=3", "n_tokens: there is no such setting. Did you mean stream.n_tokens?"),
        ("stream.n_token=3", "Did you mean stream.n_tokens?"),
        ("a.b.c=1", "a.b.c: there is no such setting. There are: "),
        ("model=3", "model: 3 must be one of bundled, "),
        ("scale=null", "scale: null must be one of demo, paper, smoke."),
        ("=3", "Hydra: Config group override must be a string or a list. Got int"),
        ("grid.smoke=abc", "grid: 'abc' must be a list of blocks"),
        ("grid.smoke=[1]", "must be a list of blocks"),
        ("hydra.mode=X", "Invalid value 'X', expected one of [RUN, MULTIRUN]"),
        ("seed=${oc.env:NO_SUCH_VARIABLE}", "seed: its value, ${oc.env:NO_SUCH_VARIABLE}, cannot be found."),
        ("data=local", "data.path: this setting must be given: data.path=<value>."),
    ],
)
def test_a_command_line_that_hydra_cannot_take_is_explained(tmp_path, monkeypatch, capsys, argument, words):
    fixed = ["run.py", "experiment=leask_batchtopk", "scale=smoke", f"output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*fixed, argument])
    assert runner.main() == 1
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_a_failing_cell_records_its_error_and_does_not_stop_the_others(cli, capsys):
    code, folder = cli(*SMOKE, "method=batchtopk,topk", "method.decoder_norm=none", "method.lr=1e30,0.001")
    assert code == 1
    assert len(read(folder)) == 2 and len(read(folder, "failed.json")) == 2
    for record in read(folder, "failed.json").values():
        assert "method.lr" in record["message"]
    err = capsys.readouterr().err
    assert "2 of 4 cells failed" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words_of_the_message"),
    [
        (["experiment=nope"], ["experiment/nope", "leask_batchtopk"]),
        ([*SMOKE, "method.kk=3"], ["method.kk"]),
        ([*SMOKE, "stream.site=resid_mid.1"], ["site", "resid_pre"]),
        ([*SMOKE, "stream.site=resid_pre.7"], ["site", "3"]),
        ([*SMOKE, "stream.buffer_tokens=1000"], ["stream.buffer_tokens", "stream.batch_size"]),
        ([*SMOKE, "data.path=/nowhere/at/all.txt"], ["/nowhere/at/all.txt"]),
        ([*SMOKE, "data.text_field=body"], ["body", "text"]),
        ([*SMOKE, "model.source=/nowhere/model"], ["model.source", "bundled"]),
        ([*SMOKE, "model.d_model=48"], ["model.d_model", "32"]),
        ([*SMOKE, "logging.logger=paper"], ["logging.logger", "tensorboard"]),
    ],
)
def test_a_wrong_setting_ends_with_one_message_that_names_it(cli, capsys, arguments, words_of_the_message):
    code, folder = cli("method=batchtopk", *arguments)
    err = capsys.readouterr().err
    assert code != 0
    assert "Traceback" not in err
    for word in words_of_the_message:
        assert word in err
    assert read(folder) == {}


def test_a_published_dictionary_is_scored_once_whatever_the_grid_is(cli, tmp_path):
    W = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"activation": "topk", "k": 4, "subtract_b_dec": True}
    saelens.write(Pretrained.of(W, W, torch.zeros(48), torch.zeros(32), **options), tmp_path / "sae")
    code, folder = cli(*SMOKE, "method=pretrained", f"method.repo={tmp_path / 'sae'}")
    [result] = read(folder).values()
    assert code == 0 and result["metrics"]["l0_mean"] == 4
    assert result["config"]["method"]["_target_"] == "core.interop.loading.load"


def test_a_grid_setting_that_the_method_lacks_is_an_error_with_a_way_out(cli, capsys):
    code, folder = cli(*SMOKE, "method=lca")
    assert code == 1 and read(folder) == {}
    err = capsys.readouterr().err
    assert "method.k is set by the experiment's grid, but there is no such setting with method=lca." in err
    assert "hydra.mode=RUN" in err


def test_a_full_disk_is_reported_without_a_result_and_trained_dictionaries_stay(cli, capsys, monkeypatch):
    from core.artifacts import Store

    put, calls = Store.put, []

    def full_after_the_first(self: Store, kind: str, *arguments: Any) -> Path:
        calls.append(kind)
        if calls.count("dictionary") > 1:
            raise OSError(28, "No space left on device")
        return put(self, kind, *arguments)

    monkeypatch.setattr(Store, "put", full_after_the_first)
    code, folder = cli(*SMOKE)
    err = capsys.readouterr().err
    assert code == 1 and "No space left on device" in err and "Traceback" not in err
    assert read(folder) == {}
    monkeypatch.setattr(Store, "put", put)
    assert cli(*SMOKE)[0] == 0
    assert "2 dictionaries to train" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_fails_only_its_cell_and_the_message_has_the_step(cli, capsys):
    code, folder = cli(*SMOKE, "method=batchtopk", "method.decoder_norm=none", "method.lr=1e30,0.001")
    assert code == 1
    [record] = read(folder, "failed.json").values()
    assert record["error"] == "NonFiniteLoss" and "optimiser step" in record["message"]
    assert len(read(folder)) == 1
    assert "Traceback" not in capsys.readouterr().err
