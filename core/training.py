"""Lightning trainers as every experiment uses them: quiet, logged to TensorBoard, checkpointed, with token progress."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TokenProgress(Callback):
    """A bar over the tokens of one training: rate, time left, and whatever the module logged with `prog_bar=True`.

    Where standard error is not a terminal it says one line every `quiet_seconds` instead.
    """

    def __init__(self, title: str, n_tokens: int, tokens_per_step: int, quiet_seconds: float = 60.0) -> None:
        self.title, self.n_tokens, self.tokens_per_step = title, n_tokens, tokens_per_step
        self.quiet_seconds = quiet_seconds
        self.terminal = sys.stderr.isatty()
        self.bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started, self.said = time.monotonic(), time.monotonic()
        self.first_tokens = self.done = trainer.fit_loop.epoch_loop.batch_progress.total.completed * self.tokens_per_step
        if self.terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), transient=True)
            self.task = self.bar.add_task(self.title, total=self.n_tokens, completed=self.done, note="")
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.done += self.tokens_per_step
        now = time.monotonic()
        rate = (self.done - self.first_tokens) / max(now - self.started, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=self._note(trainer, rate))
        elif now - self.said >= self.quiet_seconds:
            self.said = now
            left = (self.n_tokens - self.done) / max(rate, 1e-9)
            print(
                f"{self.title}: {self.done:,}/{self.n_tokens:,} tokens, {self._note(trainer, rate)}, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    @staticmethod
    def _note(trainer: pl.Trainer, rate: float) -> str:
        logged = " ".join(f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
        return f"{rate:,.0f} tok/s {logged}"


def make_trainer(cfg: DictConfig, folder: Path, callbacks: list[Callback], n_batches: int, name: str) -> pl.Trainer:
    """A trainer for `n_batches` calls of `training_step`, writing logs and checkpoints below `folder`."""
    options = cfg.trainer
    logger: Logger | bool = False
    if options.logger == "tensorboard":
        logger = TensorBoardLogger(save_dir=folder / "logs", name=name, version="")
    elif options.logger == "wandb":
        from pytorch_lightning.loggers import WandbLogger

        logger = WandbLogger(project="sparse-dictionaries", name=name, save_dir=folder / "logs")
    if options.checkpoint_every_batches:
        callbacks = [
            *callbacks,
            ModelCheckpoint(
                dirpath=folder / "checkpoints" / name,
                filename="{step}",
                every_n_train_steps=options.checkpoint_every_batches,
                save_top_k=1,
                save_last=True,
                monitor=None,
            ),
        ]
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        max_epochs=1,
        limit_train_batches=n_batches,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=options.log_every_batches,
        enable_checkpointing=bool(options.checkpoint_every_batches),
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        deterministic="warn" if not torch.cuda.is_available() else None,
    )
