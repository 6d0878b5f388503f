"""Training a stack of runs as a cell's configuration says."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from core.artifacts import content_key
from core.interrupts import remove_folder
from core.results import comparable
from core.runtime import Runtime
from core.stacked.coders import Coder
from core.stacked.objectives import Objective
from core.stacked.runs import Evaluate, Schedule, Trained
from core.stacked.runs import train as train_stack


def train(cfg: DictConfig, coder: Coder, objective: Objective, evaluate: Evaluate) -> Trained:
    """`core.stacked.runs.train` for `cfg.steps` steps at `cfg.lr`, evaluated every `cfg.log_every`.

    Checkpoints lie in the cell's folder while it trains, under a key of its configuration.
    """
    folder = Path(cfg.cell_folder)
    schedule = Schedule(steps=cfg.steps, lr=cfg.lr, log_every=cfg.log_every)
    checkpoints = folder / "checkpoints" / content_key(comparable(cfg))
    name = f"{cfg.name}/{folder.name}"
    trained = train_stack(Runtime.of(cfg), name, checkpoints, schedule, coder, objective, evaluate)
    remove_folder(folder / "checkpoints")  # with those of other configurations
    return trained
