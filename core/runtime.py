"""A run's folders, device, logging and cache: what training needs besides methods and data.

Only `precision` decides numbers; it is part of every request (`core.fleet.Request`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.settings import GPUS, Cache, Logging, Trainer


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The settings of `trainer`, `logging` and `cache`, and the folders.

    name        of the experiment and of its curves and logs
    processes   number of processes that share the dictionaries of a sweep, or `auto`
    log_every_steps, quiet_seconds  optimiser steps between logged values; seconds between progress lines
    """

    name: str
    artifacts_dir: str
    output_dir: str
    accelerator: str
    precision: str
    checkpoint_every_seconds: float
    processes: int | str
    logger: str
    log_every_steps: int
    quiet_seconds: float
    cache: Cache | None = None

    @classmethod
    def of(cls, cfg: Any) -> Runtime:
        """Read from a whole configuration."""
        trainer, logging, cache = Trainer.of(cfg.trainer), Logging.of(cfg.logging), Cache.of(cfg.cache)
        return cls(
            name=cfg.name,
            artifacts_dir=str(cfg.artifacts_dir),
            output_dir=str(cfg.output_dir),
            accelerator=trainer.accelerator,
            precision=trainer.precision,
            checkpoint_every_seconds=trainer.checkpoint_every_seconds,
            processes=trainer.processes,
            logger=logging.logger,
            log_every_steps=logging.log_every_steps,
            quiet_seconds=logging.quiet_seconds,
            cache=None if cache.dir is None else cache,
        )

    @property
    def logs(self) -> Path:
        return Path(self.output_dir) / "logs"

    @property
    def device(self) -> torch.device:
        return resolve_device(self.accelerator)


def resolve_device(accelerator: str) -> torch.device:
    """The device that Lightning's accelerator name means (`auto`, `cpu`, `gpu`, `cuda`)."""
    if accelerator in GPUS or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")
