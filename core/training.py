"""The Lightning trainer of every experiment: quiet, with logged curves, timed checkpoints and a progress bar."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from core import distributed
from core.atomic import sha256, sync, write_atomically
from core.errors import UserError
from core.hub import COMMITS
from core.interrupts import Deferred, Interrupted, handled_by, note_signal, remove_folder
from core.runtime import Runtime


class WorkProgress(Callback):
    """A progress bar for one training: work done, rate, time left, and the values logged with `prog_bar=True`.

    Where standard error is not a terminal, it prints one line every `quiet_seconds` instead. Arguments: see `Work`.
    """

    def __init__(self, title: str, total: int, per_chunk: int, unit: str, quiet_seconds: float) -> None:
        self.title, self.total, self.per_chunk = title, total, per_chunk
        self.unit, self.quiet_seconds = unit, quiet_seconds
        self.bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = self.reported = time.monotonic()
        self.first = self.done = trainer.fit_loop.epoch_loop.batch_progress.current.ready * self.per_chunk
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, note="")
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.done = min(self.total, self.done + self.per_chunk)
        now = time.monotonic()
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        if self.bar is None and now - self.reported < self.quiet_seconds:
            return
        logged = " ".join(f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
        note = f"{self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s {logged}"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        else:
            self.reported = now
            left = (self.total - self.done) / max(rate, 1e-9)
            print(f"{self.title}: {note}, {left:,.0f} s left", file=sys.stderr, flush=True)

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


class Checkpoints(Callback):
    """Checkpoints `<folder>/<chunks>.ckpt` every `every_seconds` and on SIGINT or SIGTERM, between two chunks. The two
    newest are kept, each with its sha256 in a file beside it.

    With `every_seconds` 0 only signals cause one. After a signal the current chunk is finished, the checkpoint written,
    and `Interrupted` raised. While the first chunk's text is still being prepared, which can take long, there is
    nothing to save, and a signal stops the run at once. A failed write is reported on standard error, and training
    continues.

    members  names of what is trained together. A checkpoint in a sibling of `folder` is also used if its members
             include all of these; the module must then select them when it loads it.
    commits  of what the training reads from the hub. They are kept beside the checkpoints, and the next run goes on
             with them (`core.hub`)
    """

    KEPT = 2
    MEMBERS = "members.json"

    def __init__(
        self,
        folder: Path,
        every_seconds: float,
        members: Sequence[str] = (),
        commits: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.every_seconds, self.members = folder, every_seconds, list(members)
        self.commits = dict(commits or {})
        self.earlier_seconds = 0.0  # of training before the checkpoint that was loaded
        self.saved_at = self._began_at = time.monotonic()
        self.signals = Deferred()
        self._handlers = ExitStack()
        self._loaded: dict[str, Any] | None = None
        self._started = False  # whether this training, or what follows its checkpoint, has begun
        self._defers = False  # whether signals wait for the end of a chunk
        self._last_saved = 0  # number of the chunk

    def fit(self, trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        """`trainer.fit` from the newest whole checkpoint, or from the beginning.

        Raises UserError for one that is whole and cannot be loaded here, and Interrupted.
        """
        path = distributed.from_first(self.newest)
        for abandoned in (*self.folder.glob("*.part"), *self.folder.glob(".*")):
            abandoned.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()  # if it is empty: a process was killed after creating it
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        except (UserError, OSError, FloatingPointError):
            raise
        except Exception as error:
            if path is None or self._started:
                raise
            raise UserError(
                f"The checkpoint {path} cannot be loaded by this version ({type(error).__name__}: {error}). "
                f"Continue with the version that wrote it, or remove {path.parent} to train from the beginning."
            ) from error

    def newest(self) -> Path | None:
        """The newest whole checkpoint. Damaged ones are renamed and reported."""
        paths = sorted((path for folder in self._folders() for path in folder.glob("[0-9]*.ckpt")), key=_n_chunks)
        while paths:
            path = paths.pop()
            if is_whole(path):
                return path
            path.replace(path.with_suffix(".damaged"))
            fallback = f"falling back to {paths[-1]}" if paths else "training starts from the beginning"
            print(f"the checkpoint {path} is damaged (its sha256 differs): {fallback}", file=sys.stderr)
        return None

    def _folders(self) -> list[Path]:
        """The folders that can hold checkpoints of the members."""
        siblings = self.folder.parent.glob("[!.]*") if self.members else []
        return [self.folder, *(f for f in siblings if f != self.folder and {*self.members} <= {*members_of(f)})]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = CheckpointFiles(self.members, self.commits)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = True
        self.saved_at = self._began_at = time.monotonic()
        if trainer.received_sigterm:
            note_signal(signal.SIGTERM)
            raise Interrupted(signal.SIGTERM)
        if self._loaded is not None:
            torch.set_rng_state(self._loaded["rng"])
            if len(self._loaded["cuda_rng"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self._loaded["cuda_rng"])

    def on_train_batch_start(self, *_: Any) -> None:
        if not self._defers:
            self._handlers.enter_context(handled_by(self.signals))  # they replace Lightning's during training
            self._defers = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        due = self.every_seconds > 0 and time.monotonic() - self.saved_at >= self.every_seconds
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # all processes save, or none
            self.save(trainer)
        self._stop_if_signalled(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        try:
            self._stop_if_signalled(trainer)
            self._handlers.close()
        except Interrupted:  # perhaps by a signal that has come since
            self.save(trainer)
            self._handlers.close()
            raise

    def _stop_if_signalled(self, trainer: pl.Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self.signals.signum is not None, all=False):
            self.save(trainer)
            raise Interrupted(self.signals.signum or signal.SIGTERM)

    def on_exception(self, *_: Any) -> None:
        self._handlers.close()

    def state_dict(self) -> dict[str, Any]:
        cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        seconds = self.earlier_seconds + time.monotonic() - self._began_at
        return {
            "torch": str(torch.__version__),
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda_rng,
            "seconds": seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self.earlier_seconds = state_dict.get("seconds", 0.0)
        if state_dict["torch"] != torch.__version__:
            print(
                f"the checkpoint was written with torch {state_dict['torch']}, this is {torch.__version__}: "
                "results may differ by rounding from those of an uninterrupted run",
                file=sys.stderr,
            )

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint after the current chunk, unless the module ended the training itself."""
        # Lightning counts the chunk that just ended as completed only after the callbacks; `ready` counts it already.
        n_chunks = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.should_stop or n_chunks == self._last_saved:
            return
        self._last_saved = n_chunks
        path = self.folder / f"{n_chunks:09d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero and path.exists():
            for old in sorted(self.folder.glob("[0-9]*.ckpt"), key=_n_chunks)[: -self.KEPT]:
                old.unlink()
                digest_file(old).unlink(missing_ok=True)
        self.saved_at = time.monotonic()


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint into its folder, under a temporary name until all of it is on the disk, and its sha256 beside
    it. A failed write is reported and leaves no file; training continues."""

    def __init__(self, members: Sequence[str] = (), commits: Mapping[str, str] | None = None) -> None:
        self.members, self.commits = list(members), dict(commits or {})

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        unfinished = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.members:
                write_atomically(path.parent / Checkpoints.MEMBERS, json.dumps(self.members))
            if self.commits:
                write_atomically(path.parent / COMMITS, json.dumps(self.commits))
            self._write(checkpoint, unfinished)
            write_atomically(digest_file(path), f"{sha256(unfinished)}  {path.name}\n")  # readable by `sha256sum -c`
            unfinished.replace(path)
            sync(path.parent)
        except OSError as error:
            for leftover in (unfinished, path, digest_file(path)):
                leftover.unlink(missing_ok=True)
            print(
                f"the checkpoint {path} could not be written ({error}): training continues, earlier checkpoints "
                "are kept, the next one is written at its usual time",
                file=sys.stderr,
            )

    @staticmethod
    def _write(checkpoint: dict[str, Any], path: Path) -> None:
        with path.open("wb") as file:
            try:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            except RuntimeError as error:  # raised by torch when a write fails
                free = shutil.disk_usage(path.parent).free
                raise OSError(errno.EIO, f"{error}; {free / 1e6:,.1f} MB are free") from error


def digest_file(path: Path) -> Path:
    """The file with a checkpoint's sha256."""
    return path.with_name(f"{path.name}.sha256")


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has the recorded sha256. Reads all of it."""
    try:
        return digest_file(path).read_text().split()[:1] == [sha256(path)]
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def discard_finished(root: Path, is_stored: Callable[[str], bool]) -> None:
    """Remove the checkpoints in `<root>/*/*/` whose members are all stored: they are no longer needed. A folder is
    renamed first, so that a removal that was killed can be recognised and finished."""
    for record in root.glob(f"*/[!.]*/{Checkpoints.MEMBERS}"):
        members = members_of(record.parent)
        if members and all(map(is_stored, members)):
            with suppress(OSError):  # another process may be removing it too
                record.parent.replace(record.parent.with_name(f".{record.parent.name}.finished"))
    for finished in root.glob("*/.*.finished"):
        remove_folder(finished)
        with suppress(OSError):
            finished.parent.rmdir()  # if it is empty


def _n_chunks(path: Path) -> int:
    return int(path.stem)


def members_of(folder: Path) -> list[str]:
    """The names of what a folder's checkpoints hold; empty if they are not recorded."""
    try:
        return json.loads((folder / Checkpoints.MEMBERS).read_text())
    except (OSError, ValueError):
        return []


class Work(NamedTuple):
    """The work in a training, for its progress bar: `total` units, `per_chunk` of them in each Lightning step."""

    title: str
    total: int
    per_chunk: int
    unit: str = "tokens"


def fit(
    run: Runtime,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    n_chunks: int,
    name: str,
    work: Work,
    checkpoints: Path | None,
    members: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    commits: Mapping[str, str] | None = None,
) -> float:
    """Train for `n_chunks` calls of `training_step`, from the newest whole checkpoint if there is one.

    name         curves go to `<output_dir>/logs/<name>`
    checkpoints  folder for checkpoints; None writes none
    members, commits  what is trained together, and the commits of what is read; see `Checkpoints`

    Returns the seconds spent on training before the checkpoint that was loaded. Raises UserError for a checkpoint that
    cannot be loaded here, and Interrupted, after a checkpoint, on SIGINT or SIGTERM.
    """
    saving = None if checkpoints is None else Checkpoints(checkpoints, run.checkpoint_every_seconds, members, commits)
    progress = [WorkProgress(*work, quiet_seconds=run.quiet_seconds)] if distributed.rank() == 0 else []
    trainer = make_trainer(run, name, n_chunks, [*progress, *callbacks, *([] if saving is None else [saving])])
    if saving is None:
        trainer.fit(module, datamodule=data)
        return 0.0
    saving.fit(trainer, module, data)
    return saving.earlier_seconds


def make_trainer(run: Runtime, name: str, n_chunks: int, callbacks: list[Callback]) -> pl.Trainer:
    """A trainer for `n_chunks` calls of `training_step`, whose curves go to `<output_dir>/logs/<name>`."""
    for noisy in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # its list of devices, and its tips
    warnings.filterwarnings("ignore", message=".*treespec|.*transfer_batch_to_device|.*dataloader is not resumable")
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=1,  # of this process; to Lightning, each rank is a node of its own
        num_nodes=distributed.n_ranks(),
        strategy=RanksStrategy() if distributed.is_active() else "auto",
        precision=_precision(run.precision),
        max_epochs=1,
        limit_train_batches=n_chunks,
        plugins=_environment(),
        logger=_logger(run.logger, run.logs, name),
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class RanksStrategy(DDPStrategy):
    """The ranks of `core.distributed` for Lightning, without its wrapper: the methods exchange gradients themselves."""

    def configure_ddp(self) -> None:
        """Nothing is wrapped."""


def _environment() -> ClusterEnvironment | None:
    """The environment that Lightning should assume; None lets it detect one."""
    if distributed.is_active():
        return LightningEnvironment()  # on a cluster too: the ranks are our own processes on one node
    if SLURMEnvironment.detect():
        return SLURMEnvironment(auto_requeue=False)  # no hpc_ckpt_*.ckpt
    return None


def _precision(name: str) -> Any:
    """Lightning's precision: how products are computed. Parameters and moments are fp32 in both cases."""
    if name not in ("32-true", "bf16-mixed"):
        raise UserError(f"trainer.precision={name!r} is neither 32-true nor bf16-mixed (products in bf16, on a GPU).")
    return name


def _logger(kind: str, folder: Path, name: str) -> Logger | bool:
    if kind == "none":
        return False
    if kind == "tensorboard":
        return TensorBoardLogger(save_dir=folder, name=name, version="")
    if kind == "wandb":
        if find_spec("wandb") is None:
            raise UserError("logging=wandb needs `pip install -e .[wandb]`; logging=tensorboard needs nothing.")
        from pytorch_lightning.loggers import WandbLogger

        folder.mkdir(parents=True, exist_ok=True)
        return WandbLogger(project="sparse-dictionaries", name=name, save_dir=folder)
    raise UserError(f"logging.logger={kind!r} is not one of tensorboard, wandb, none.")
