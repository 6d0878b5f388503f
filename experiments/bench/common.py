"""What benchmarks of training share: batches from memory, and a fleet trained on them in a real `Trainer.fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from core.batch import Batch
from core.building import build
from core.methods.base import DictionaryMethod
from core.runtime import Runtime
from core.streams.module import StreamData
from core.together import Fleet
from core.training import Work, fit


class RepeatedBatches:
    """A stream that serves the same few batches from memory, so that only training is measured."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.served = list(batches), 0

    @property
    def device(self) -> torch.device:
        return self.batches[0].x.device

    def __iter__(self) -> RepeatedBatches:
        return self

    def __next__(self) -> Batch:
        self.served += 1
        return self.batches[self.served % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]


def built(settings: Mapping[str, Any], device: torch.device, **changes: Any) -> DictionaryMethod:
    """A method from its configuration, ready for steps."""
    method: DictionaryMethod = build(settings, **changes)
    method.n_steps = 10**6
    return method.to(device)


def fit_fleet(
    cfg: DictConfig,
    methods: Sequence[DictionaryMethod],
    batches: Sequence[Batch],
    n_chunks: int,
    batches_per_chunk: int,
    callback: Callback,
) -> None:
    """Train methods as one fleet, as `core.fleet` does, with its logging and progress but no checkpoints."""
    n_batches, rows = n_chunks * batches_per_chunk, len(batches[0].x)
    data = StreamData(RepeatedBatches(batches), n_batches, batches_per_chunk)
    fleet = Fleet(methods, data, cfg.logging.log_every_steps)
    work = Work(cfg.name, n_batches * rows, batches_per_chunk * rows)
    fit(Runtime.of(cfg), fleet, data, data.n_chunks, cfg.name, work, checkpoints=None, callbacks=[callback])
