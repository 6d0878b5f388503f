import json
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from core import results
from core.errors import UserError


def config(**changes: object) -> DictConfig:
    return OmegaConf.create({"name": "test", "scale": "smoke", "seed": 0, "force": False, "x": "${seed}", **changes})


def test_a_finished_cell_is_recognised_by_its_configuration(tmp_path: Path):
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    assert results.is_finished(tmp_path, config())
    assert results.is_finished(tmp_path, config(force=True))
    assert not results.is_finished(tmp_path, config(seed=1))


def test_a_table_of_scales_in_older_results_decides_nothing(tmp_path: Path):
    table = {"paper": 1, "demo": 2, "smoke": 3}
    results.run_cell(config(all_steps=table), tmp_path, lambda cfg: {"a": 1.0})
    assert results.is_finished(tmp_path, config())
    results.run_cell(config(other={**table, "x": 4}), tmp_path, lambda cfg: {"a": 1.0})
    assert not results.is_finished(tmp_path, config())


def test_the_number_of_devices_can_change_a_result_and_the_number_of_processes_cannot(tmp_path: Path):
    results.run_cell(config(trainer={"processes": "auto", "devices": 1}), tmp_path, lambda cfg: {"a": 1.0})
    assert results.is_finished(tmp_path, config(trainer={"processes": 4, "devices": 1}))
    assert not results.is_finished(tmp_path, config(trainer={"processes": "auto", "devices": 2}))


def test_a_result_records_where_it_comes_from(tmp_path: Path):
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    record = json.loads((tmp_path / results.RESULTS).read_text())
    assert record["metrics"] == {"a": 1.0}
    assert record["config"]["x"] == 0
    assert {"commit", "device", "versions", "seconds", "seed", "started"} <= record.keys()


def test_a_failure_writes_its_error_and_no_result(tmp_path: Path):
    def run(cfg: DictConfig) -> dict[str, float]:
        raise UserError("method.k=9 is too large")

    with pytest.raises(UserError):
        results.run_cell(config(), tmp_path, run)
    record = json.loads((tmp_path / results.FAILED).read_text())
    assert record["error"] == "UserError" and record["message"] == "method.k=9 is too large"
    assert not (tmp_path / results.RESULTS).exists()


def test_a_success_removes_the_record_of_an_earlier_failure(tmp_path: Path):
    (tmp_path / results.FAILED).write_text("{}")
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    assert not (tmp_path / results.FAILED).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5"])
def test_a_metric_that_is_not_a_finite_number_fails_the_cell(tmp_path: Path, value: float):
    with pytest.raises(RuntimeError, match="metric a "):
        results.run_cell(config(), tmp_path, lambda cfg: {"a": value})
    assert not (tmp_path / results.RESULTS).exists()


def test_a_cell_with_a_truncated_results_file_is_not_finished(tmp_path: Path):
    results.run_cell(config(), tmp_path, lambda cfg: {"a": 1.0})
    whole = (tmp_path / results.RESULTS).read_text()
    (tmp_path / results.RESULTS).write_text(whole[: len(whole) // 2])
    assert not results.is_finished(tmp_path, config())
    assert list(results.read_all(tmp_path)) == []


def test_on_a_full_disk_the_cells_own_error_is_still_raised(tmp_path: Path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def run(cfg: DictConfig) -> dict[str, float]:
        raise UserError("method.k=9 is too large")

    monkeypatch.setattr(results, "write_atomically", full)
    with pytest.raises(UserError, match=r"method\.k=9"):
        results.run_cell(config(), tmp_path, run)
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
