"""Checkpoints: on time and on signals, whole or absent; a resumed training equals an uninterrupted one."""

import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from core import training
from core.errors import UserError
from core.interrupts import Interrupted, handled_by, stop_at_once
from core.runtime import Runtime
from core.training import Checkpoints, Work, digest_file, discard_finished, is_whole, make_trainer

N = 8  # chunks


class Walk(pl.LightningModule):
    """A random walk by Adam, with steps from torch's global generator."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.w = torch.nn.Parameter(torch.zeros(size))
        self.steps: list[int] = []
        self.at: dict[int, Callable[[], object]] = {}  # what else to do in a step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.steps.append(batch_idx)
        self.at.get(batch_idx, lambda: None)()
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Adam)
        optimizer.zero_grad()
        ((self.w - batch) * torch.rand(len(self.w))).square().sum().backward()
        optimizer.step()


class Numbers(pl.LightningDataModule):
    def train_dataloader(self) -> "Numbers":
        return self

    def __iter__(self) -> Iterator[torch.Tensor]:
        assert self.trainer is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return (torch.tensor(float(number)) for number in range(done, N))


def runtime_of(folder: Path, **changes: Any) -> Runtime:
    settings: dict[str, Any] = {
        "name": "walk", "artifacts_dir": str(folder), "output_dir": str(folder), "accelerator": "cpu",
        "precision": "32-true", "checkpoint_every_seconds": 0, "processes": 1, "logger": "none", "log_every_steps": 1,
        "quiet_seconds": 1000,
    }  # fmt: skip
    return Runtime(**{**settings, **changes})


def fit(folder: Path, module: Walk, seconds: float = 1e-9, members: list[str] | None = None, seed: int = 0) -> Walk:
    torch.manual_seed(seed)
    run = runtime_of(folder, checkpoint_every_seconds=seconds)
    training.fit(run, module, Numbers(), N, "walk", Work("walk", N, 1, "steps"), folder, members or [])
    return module


def stop_with(number: int, times: int = 1) -> Callable[[], None]:
    def stop() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return stop


def stopped_at(step: int, then: Callable[[], object], module: Walk | None = None) -> Walk:
    module = module or Walk()
    module.at[step] = then
    return module


def fail() -> None:
    raise RuntimeError("the power fails")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".sha256"))


@pytest.fixture
def whole(tmp_path: Path) -> torch.Tensor:
    return fit(tmp_path / "whole", Walk()).w.detach()


def test_after_a_crash_the_global_generator_continues_as_without_it(tmp_path: Path, whole: torch.Tensor):
    with pytest.raises(RuntimeError, match="power"):
        fit(tmp_path / "a", stopped_at(4, fail))
    assert names(tmp_path / "a") == ["000000003.ckpt", "000000004.ckpt"]
    resumed = fit(tmp_path / "a", Walk(), seed=1)
    assert resumed.steps == [4, 5, 6, 7] and torch.equal(resumed.w, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 4, N - 1])
def test_a_signal_ends_with_a_checkpoint_after_the_current_chunk(
    tmp_path: Path, whole: torch.Tensor, number: signal.Signals, step: int
):
    before = signal.getsignal(number)
    module = stopped_at(step, stop_with(number))
    with pytest.raises(Interrupted) as stop:
        fit(tmp_path / "a", module, seconds=0)
    assert stop.value.signum == number and module.steps == list(range(step + 1))
    assert signal.getsignal(number) is before
    resumed = fit(tmp_path / "a", Walk(), seconds=0, seed=1)
    assert resumed.steps == list(range(step + 1, N)) and torch.equal(resumed.w, whole)


def test_a_chunk_is_saved_once_even_if_a_checkpoint_is_due_and_a_signal_arrives(tmp_path: Path, monkeypatch):
    saved, save = [], training.CheckpointFiles.save_checkpoint
    monkeypatch.setattr(
        training.CheckpointFiles,
        "save_checkpoint",
        lambda self, c, path, **_: saved.append(path.name) or save(self, c, path),
    )
    with pytest.raises(Interrupted):
        fit(tmp_path / "a", stopped_at(2, stop_with(signal.SIGTERM)))
    assert saved == ["000000001.ckpt", "000000002.ckpt", "000000003.ckpt"]


def test_a_second_signal_stops_at_once(tmp_path: Path):
    with pytest.raises(Interrupted):
        fit(tmp_path / "a", stopped_at(4, stop_with(signal.SIGINT, times=2)), seconds=0)
    assert not (tmp_path / "a").exists()


def test_a_signal_after_the_last_chunk_loses_nothing(tmp_path: Path, whole: torch.Tensor):
    class Late(Walk):
        def on_train_epoch_end(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit(tmp_path / "a", Late(), seconds=0)
    resumed = fit(tmp_path / "a", Walk(), seconds=0, seed=1)
    assert resumed.steps == [] and torch.equal(resumed.w, whole)


def test_a_sigterm_that_lightning_noted_before_the_first_chunk_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_stage = pl.Trainer._run_stage

    def with_sigterm(trainer: pl.Trainer) -> Any:
        trainer._signal_connector.received_sigterm = True
        return run_stage(trainer)

    monkeypatch.setattr(pl.Trainer, "_run_stage", with_sigterm)
    module = Walk()
    with pytest.raises(Interrupted):
        fit(tmp_path / "a", module, seconds=0)
    assert module.steps == [] and not (tmp_path / "a").exists()


@pytest.mark.parametrize(("number_of_chunk", "steps"), [(0, []), (1, [0, 1]), (4, [0, 1, 2, 3, 4])])
def test_a_signal_while_a_chunk_is_prepared_stops_at_once_if_it_is_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number_of_chunk: int, steps: list[int]
):
    """As while text is harvested, which takes long. Later chunks are finished, with a checkpoint."""

    def numbers(self: Numbers) -> Iterator[torch.Tensor]:
        for number in range(N):
            if number == number_of_chunk:
                os.kill(os.getpid(), signal.SIGTERM)
            yield torch.tensor(float(number))

    monkeypatch.setattr(Numbers, "__iter__", numbers)
    module = Walk()
    with pytest.raises(Interrupted), handled_by(stop_at_once):  # as around every run
        fit(tmp_path / "a", module, seconds=0)
    assert module.steps[:number_of_chunk] == steps[:number_of_chunk] and len(module.steps) <= len(steps)
    assert (tmp_path / "a").exists() == bool(steps)


def test_outside_the_main_thread_a_training_runs_without_handlers(tmp_path: Path, whole: torch.Tensor):
    module = Walk()
    thread = threading.Thread(target=lambda: fit(tmp_path / "a", module))
    thread.start()
    thread.join()
    assert torch.equal(module.w, whole)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_hash(path: Path) -> None:
    digest_file(path).unlink()


@pytest.mark.parametrize("damage", [cut, alter, lose_hash])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, whole: torch.Tensor, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(RuntimeError, match="power"):
        fit(tmp_path / "a", stopped_at(4, fail))
    damage(tmp_path / "a/000000004.ckpt")
    resumed = fit(tmp_path / "a", Walk(), seed=1)
    assert resumed.steps == [3, 4, 5, 6, 7] and torch.equal(resumed.w, whole)
    err = capsys.readouterr().err
    assert "000000004.ckpt is damaged" in err and "falling back" in err and "000000003.ckpt" in err


def test_with_all_checkpoints_damaged_training_reports_it_and_starts_from_the_beginning(
    tmp_path: Path, whole: torch.Tensor, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(RuntimeError, match="power"):
        fit(tmp_path / "a", stopped_at(4, fail))
    for path in (tmp_path / "a").glob("*.ckpt"):
        cut(path)
    resumed = fit(tmp_path / "a", Walk())
    assert resumed.steps == list(range(N)) and torch.equal(resumed.w, whole)
    assert "training starts from the beginning" in capsys.readouterr().err


def test_checkpoints_are_plain_data_and_sha256sum_reads_their_hashes(tmp_path: Path):
    with pytest.raises(RuntimeError, match="power"):
        fit(tmp_path / "a", stopped_at(4, fail))
    for path in (tmp_path / "a").glob("*.ckpt"):
        assert is_whole(path)
        assert torch.load(path, weights_only=True)["pytorch-lightning_version"] == pl.__version__
        if shutil.which("sha256sum"):
            subprocess.run(["sha256sum", "-c", "--quiet", digest_file(path).name], cwd=path.parent, check=True)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    training.CheckpointFiles().save_checkpoint(content, path)


def test_a_checkpoint_of_another_torch_version_is_used_and_reported(
    tmp_path: Path, whole: torch.Tensor, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(RuntimeError, match="power"):
        fit(tmp_path / "a", stopped_at(4, fail))
    rewrite(tmp_path / "a/000000004.ckpt", lambda c: c["callbacks"]["Checkpoints"].update(torch="1.0"))
    assert torch.equal(fit(tmp_path / "a", Walk()).w, whole)
    assert "written with torch 1.0" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["optimizer_states", "loops", "state_dict"])
def test_a_whole_checkpoint_that_cannot_be_loaded_is_refused_with_a_message(tmp_path: Path, part: str):
    with pytest.raises(RuntimeError, match="power"):
        fit(tmp_path / "a", stopped_at(4, fail))
    rewrite(tmp_path / "a/000000004.ckpt", lambda c: c.update({part: {"unknown": 1}}))
    with pytest.raises(UserError, match=r"(?s)000000004\.ckpt cannot be loaded.*remove .*to train from the beginning"):
        fit(tmp_path / "a", Walk())


def test_a_failed_write_is_reported_and_training_continues(
    tmp_path: Path, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if 9 <= len(calls) < 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    module = fit(tmp_path / "a", Walk())
    assert torch.equal(module.w, whole) and len(calls) > 20
    assert "could not be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert names(tmp_path / "a") == ["000000007.ckpt", "000000008.ckpt"]
    assert all(map(is_whole, (tmp_path / "a").glob("*.ckpt")))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small filesystem needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_on_a_really_full_disk_the_older_checkpoint_is_kept_and_training_continues(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    size = 40_000  # with Adam's moments 0.5 MB: three checkpoints fit
    module = stopped_at(3, lambda: (small_disk / "other").write_bytes(bytes(800_000)), Walk(size))
    module.at[6] = fail
    with pytest.raises(RuntimeError, match="power"):
        fit(small_disk / "a", module)
    assert module.steps == list(range(7))
    err = capsys.readouterr().err
    assert err.count("could not be written") >= 3 and "MB are free" in err
    assert names(small_disk / "a") == ["000000002.ckpt", "000000003.ckpt"] or "000000002.ckpt" in names(
        small_disk / "a"
    )
    assert all(map(is_whole, (small_disk / "a").glob("*.ckpt")))
    (small_disk / "other").unlink()
    resumed = fit(small_disk / "a", Walk(size), seed=1)
    assert torch.equal(resumed.w, fit(tmp_path / "whole", Walk(size)).w)


def test_checkpoints_of_a_larger_group_are_used_and_removed_when_the_whole_group_is_stored(tmp_path: Path):
    def newest(name: str, members: list[str]) -> Path | None:
        return Checkpoints(tmp_path / "stream" / name, 0, members).newest()

    with pytest.raises(RuntimeError, match="power"):
        fit(tmp_path / "stream" / "abc", stopped_at(4, fail), members=["a", "b", "c"])
    assert newest("bc", ["b", "c"]) == tmp_path / "stream/abc/000000004.ckpt"
    assert newest("cd", ["c", "d"]) is None and newest("none", []) is None
    discard_finished(tmp_path, {"a", "b"}.__contains__)
    assert newest("abc", ["a", "b", "c"])
    discard_finished(tmp_path, {"a", "b", "c"}.__contains__)
    assert not (tmp_path / "stream").exists()


def test_under_slurm_lightning_writes_and_reads_no_checkpoints_of_its_own(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"NTASKS": "1", "JOB_NAME": "x", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    trainer = make_trainer(runtime_of(Path()), "x", 1, [])
    environment: Any = trainer._accelerator_connector.cluster_environment
    assert type(environment).__name__ == "SLURMEnvironment" and not environment.auto_requeue


def test_curves_are_written_to_a_folder_named_after_the_training(tmp_path: Path):
    run = runtime_of(tmp_path, logger="tensorboard")
    training.fit(run, Walk(), Numbers(), N, "grid/cell", Work("walk", N, 1, "steps"), checkpoints=None)
    [events] = tmp_path.rglob("events.out.tfevents.*")
    assert events.parent == tmp_path / "logs" / "grid" / "cell"


def test_curves_of_weights_and_biases_have_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(training, "find_spec", lambda _: object())
    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", lambda **settings: asked.append(settings))
    make_trainer(runtime_of(tmp_path, logger="wandb"), "grid/cell", 1, [])
    assert asked[0]["name"] == "grid/cell" and asked[0]["save_dir"] == tmp_path / "logs"
