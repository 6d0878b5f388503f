"""Lightning trainers as every experiment uses them: quiet, logged, checkpointed by time, with progress over tokens."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from core.errors import UserError


class TokenProgress(Callback):
    """A bar over the tokens of one training: rate, time left, and whatever was logged with `prog_bar=True`.

    Where standard error is not a terminal it says one line every `quiet_seconds` instead.
    """

    def __init__(self, title: str, n_tokens: int, tokens_per_batch: int, quiet_seconds: float) -> None:
        self.title, self.n_tokens, self.tokens_per_batch = title, n_tokens, tokens_per_batch
        self.quiet_seconds = quiet_seconds
        self.bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = self.said = time.monotonic()
        self.first = self.done = trainer.fit_loop.epoch_loop.batch_progress.current.ready * self.tokens_per_batch
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.title, total=self.n_tokens, completed=self.done, note="")
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.done = min(self.n_tokens, self.done + self.tokens_per_batch)
        now = time.monotonic()
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        if self.bar is None and now - self.said < self.quiet_seconds:
            return
        logged = " ".join(f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
        note = f"{self.done:,}/{self.n_tokens:,} tokens, {rate:,.0f}/s {logged}"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        else:
            self.said = now
            left = (self.n_tokens - self.done) / max(rate, 1e-9)
            print(f"{self.title}: {note}, {left:,.0f} s left", file=sys.stderr, flush=True)

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


class Checkpoints(Callback):
    """Writes `<folder>/<batches>.ckpt` every `every_seconds`, between two batches, and keeps the two newest.

    A file is written under a temporary name and renamed when it is whole.
    """

    KEPT = 2

    def __init__(self, folder: Path, every_seconds: float) -> None:
        self.folder, self.every_seconds = folder, every_seconds
        self.saved = time.monotonic()

    def newest(self) -> Path | None:
        """The newest whole checkpoint, to resume from."""
        return max(self.folder.glob("[0-9]*.ckpt"), default=None)

    def on_train_start(self, *_: Any) -> None:
        self.saved = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        ends = trainer.should_stop or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.every_seconds and not ends and time.monotonic() - self.saved >= self.every_seconds:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        # Lightning counts the batch that just ended as completed only after the callbacks; `ready` counts it already.
        path = self.folder / f"{trainer.fit_loop.epoch_loop.batch_progress.current.ready:09d}.ckpt"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        trainer.save_checkpoint(temporary, weights_only=False)
        temporary.replace(path)
        for old in sorted(self.folder.glob("[0-9]*.ckpt"))[: -self.KEPT]:
            old.unlink()
        self.saved = time.monotonic()


def make_trainer(cfg: DictConfig, folder: Path, name: str, n_batches: int, callbacks: list[Callback]) -> pl.Trainer:
    """A trainer for `n_batches` calls of `training_step`, logging below `folder` as `cfg.logging` says."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what it found and which tips it has
    warnings.filterwarnings("ignore", message=".*treespec|.*transfer_batch_to_device|.*dataloader is not resumable")
    return pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=1,
        precision=cfg.trainer.precision,
        max_epochs=1,
        limit_train_batches=n_batches,
        logger=_logger(cfg.logging.logger, folder, name),
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


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
