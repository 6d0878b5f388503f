"""Training a stack of runs in one Lightning fit: resumed exactly, and evaluated along the way.

A Lightning step covers a chunk of optimiser steps. One Adam over the stacked parameters equals one for each run, since
Adam works entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from core.errors import NonFiniteLoss, UserError
from core.interrupts import remove_folder
from core.runtime import Runtime
from core.stacked.adam import stepper
from core.stacked.coders import Coder
from core.stacked.objectives import Objective
from core.training import Work, fit

STEPS_PER_CHUNK = 500  # at most; a checkpoint can be written between two chunks

Evaluate = Callable[[int], Mapping[str, Tensor]]  # steps done -> {metric: [R]}


class StackedRuns(pl.LightningModule):
    """A coder and an objective under one Adam (betas 0.9 and 0.999, eps 1e-8, no schedule).

    evaluate     called after the numbers of steps in `evaluate_at`; what it measures is kept in `curves`
    """

    def __init__(
        self,
        name: str,
        coder: Coder,
        objective: Objective,
        lr: float,
        evaluate: Evaluate,
        evaluate_at: Collection[int],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.name, self.coder, self.objective, self.lr = name, coder, objective, lr
        self.evaluate, self.evaluate_at = evaluate, evaluate_at
        self.curves: dict[int, dict[str, Tensor]] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learned = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(learned, lr=self.lr, fused=True)

    def on_train_start(self) -> None:
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.grad is None:  # Lightning frees gradients when a fit begins
                parameter.grad = torch.zeros_like(parameter)
        self._measure(0)

    def training_step(self, chunk: range, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Adam)
        with torch.no_grad():
            update = stepper(optimizer)
            for step in chunk:
                self.objective.gradients(self.coder, step)
                update()
            loss = self.objective.loss()
        if not bool(loss.isfinite().all()):
            raise NonFiniteLoss(chunk[-1], self.name)
        self._measure(chunk[-1] + 1)
        self.log("loss", loss.mean(), prog_bar=True)

    def _measure(self, step: int) -> None:
        if step not in self.evaluate_at or step in self.curves:
            return
        with torch.no_grad():
            self.curves[step] = {name: value.detach().clone() for name, value in self.evaluate(step).items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curves"] = self.curves

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curves = checkpoint["curves"]


class Steps(pl.LightningDataModule):
    """The numbers of the optimiser steps, in chunks of `every`; the last one may be shorter."""

    def __init__(self, n_steps: int, every: int) -> None:
        super().__init__()
        self.n_steps, self.every = n_steps, every
        self.done = 0

    @property
    def n_chunks(self) -> int:
        return -(-self.n_steps // self.every)

    def train_dataloader(self) -> Iterator[range]:
        return (
            range(start, min(start + self.every, self.n_steps)) for start in range(self.done, self.n_steps, self.every)
        )

    def transfer_batch_to_device(self, batch: range, device: torch.device, dataloader_idx: int) -> range:
        """Lightning calls this when a chunk begins; checkpoints are written when it ends."""
        self.done = batch.stop
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["done"]


class Trained(NamedTuple):
    """What a training returns beside its parameters."""

    curves: dict[int, dict[str, Tensor]]  # steps done -> {metric: [R]}
    earlier_seconds: float  # of earlier processes that this training resumed


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a stack is trained: full-batch Adam steps at `lr`, evaluated every `log_every` steps, before and after."""

    steps: int
    lr: float
    log_every: int


def train(
    run: Runtime,
    name: str,
    checkpoints: Path,
    schedule: Schedule,
    coder: Coder,
    objective: Objective,
    evaluate: Evaluate,
) -> Trained:
    """Train a stack. A `log_every` as large as `steps` evaluates the two ends.

    name         curves go to `<output_dir>/logs/<name>`
    checkpoints  folder of this training's checkpoints, removed when it ends

    Raises UserError if `log_every` does not divide `steps`, NonFiniteLoss, and, after SIGINT or SIGTERM, Interrupted
    with a checkpoint.
    """
    s = schedule
    if s.steps % s.log_every:
        raise UserError(f"log_every={s.log_every} does not divide steps={s.steps}.")
    runs = StackedRuns(run.name, coder, objective, s.lr, evaluate, range(0, s.steps + 1, s.log_every))
    data = Steps(s.steps, math.gcd(s.log_every, STEPS_PER_CHUNK))
    work = Work(run.name, s.steps, data.every, "steps")
    with flushed_denormals():
        earlier_seconds = fit(run, runs, data, data.n_chunks, name, work, checkpoints)
    remove_folder(checkpoints)
    return Trained(runs.curves, earlier_seconds)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Without denormal numbers on the CPU. The moments of masked codes decay to them, and make a step 1.4 times as
    long."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
