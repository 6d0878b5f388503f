"""The settings that experiments share, with their types and rules. `core.preflight` checks them when a run starts.

What a dictionary is trained on (`stream`) is checked by its source (`core.streams`), `method` by the method
(`core.methods.settings`), `model` by `core.models.loading`, `pair` by `core.models.pair`, `data` and `dialogues` by
the text that they name. An experiment's module has the schema of its own settings as `SETTINGS`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch

from core.checked import Checked, at_least, not_empty, positive, require
from core.errors import UserError

Accelerator = Literal["auto", "cpu", "gpu", "cuda"]
GPUS = ("gpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Trainer(Checked):
    """The group `trainer`; conf/trainer/auto.yaml says what each setting is. The devices must be there."""

    node: ClassVar[str] = "trainer"
    accelerator: Accelerator
    precision: Literal["32-true", "bf16-mixed"]
    checkpoint_every_seconds: float = at_least(0)
    processes: Literal["auto"] | int = at_least(1)
    cell_processes: Literal["auto"] | int = at_least(1)
    devices: int = at_least(1)

    def check(self) -> None:
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        words = "be a device of this machine, which has no GPU that PyTorch can use: take auto or cpu"
        require(n_gpus > 0 or self.accelerator not in GPUS, self.named("accelerator"), self.accelerator, words)
        on_gpus = n_gpus > 0 and self.accelerator != "cpu"
        limit, kind = (n_gpus, "GPUs") if on_gpus else (os.cpu_count() or 1, "cores")
        words = f"be at most {limit}, the number of {kind} of this machine"
        require(self.devices <= limit, self.named("devices"), self.devices, words)
        if self.devices > 1 and self.processes not in ("auto", 1):
            raise UserError(
                f"{self.named('processes')}={self.processes} divides dictionaries among processes, "
                f"{self.named('devices')}={self.devices} divides every batch among devices: one of the two must be 1."
            )


@dataclass(frozen=True, kw_only=True)
class Logging(Checked):
    """The group `logging`: curves of trainings, and progress lines."""

    node: ClassVar[str] = "logging"
    logger: Literal["tensorboard", "wandb", "none"]
    log_every_steps: int = at_least(1)
    quiet_seconds: float = at_least(0)

    def check(self) -> None:
        if self.logger == "wandb" and find_spec("wandb") is None:
            raise UserError(
                f"{self.named('logger')}: wandb is not installed here. `pip install -e .[wandb]` installs it; "
                "logging=tensorboard needs nothing."
            )


@dataclass(frozen=True, kw_only=True)
class Cache(Checked):
    """The group `cache`: where activations are kept on disk, and how much space they may take. No `dir`: nowhere."""

    node: ClassVar[str] = "cache"
    dir: str | None = not_empty()
    max_gb: float = at_least(0)
    keep_free_gb: float = at_least(0)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Checked):
    """The node `evaluation` (conf/evaluation): held-out text.

    compat_tokens  only where the figures of the authors of BatchTopK are computed
    """

    node: ClassVar[str] = "evaluation"
    seed: int
    n_rows: int = at_least(1)
    n_downstream_rows: int = at_least(0)
    rows_per_batch: int = at_least(1)
    keep_activations: bool
    compat_tokens: int | None = at_least(1, default=None)

    def check(self) -> None:
        words = (
            f"be at most {self.named('n_rows')} = {self.n_rows}, of which these rows are the first: lower it, or raise "
            f"{self.named('n_rows')}"
        )
        fits = self.n_downstream_rows <= self.n_rows
        require(fits, self.named("n_downstream_rows"), self.n_downstream_rows, words)


@dataclass(frozen=True, kw_only=True)
class Shared(Checked):
    """What stands at the top of every configuration, or of those that have such a group. Groups that are built from a
    class (`_target_`) are checked by that class."""

    node: ClassVar[str] = ""
    name: str = not_empty()
    module: str = not_empty()
    scale: Literal["smoke", "demo", "paper"]
    seed: int
    output_dir: str = not_empty()
    artifacts_dir: str = not_empty()
    force: bool
    cell_folder: str | None = None
    corpus_mb_per_package: float = positive()
    at: dict[str, Any]  # the table of what differs between scales: checked where it is used
    grid: dict[str, Any]  # checked by the sweeper
    trainer: Trainer
    logging: Logging
    cache: Cache
    evaluation: Evaluation | None = None
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    pair: dict[str, Any] | None = None
    dialogues: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    stream: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None
