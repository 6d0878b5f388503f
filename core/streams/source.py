"""What a dictionary is trained on: a source says it as plain settings, and opens a stream of batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, final

import torch

from core.batch import Batch
from core.errors import UserError
from core.runtime import Runtime


class Stream(Protocol):
    """An endless iterator of batches on `device`, whose state says how to go on with the batch that comes next."""

    @property
    def device(self) -> torch.device: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Source(ABC):
    """The settings of a stream. Dictionaries that ask for equal sources are trained together, on one stream.

    batch_size           of an optimiser step, over all devices
    batches_per_chunk    optimiser steps in one Lightning step
    calibration_batches  that follow the training: what inference needs is measured on them
    devices              that share every batch
    """

    version: ClassVar[int] = 1  # raise it when a change alters the batches that the same settings give
    unit: ClassVar[str] = "rows"  # what a batch has `batch_size` of

    batch_size: int
    batches_per_chunk: int
    calibration_batches: int
    devices: int = 1

    @property
    @abstractmethod
    def n_batches(self) -> int:
        """Of the training: one for each optimiser step."""

    @property
    @abstractmethod
    def batches_spec(self) -> dict[str, Any]:
        """What decides the batches, as JSON can hold it."""

    @abstractmethod
    def open(self, run: Runtime) -> Stream:
        """The stream from its beginning. Raises UserError for settings that do not fit together."""

    def check_devices(self) -> None:
        """Raises UserError if `devices` cannot share the batches. Sources that can, say so in an override."""
        if self.devices > 1:
            raise UserError(f"trainer.devices={self.devices}: {type(self).__name__} serves one device only.")

    @final
    @property
    def spec(self) -> dict[str, Any]:
        """`batches_spec` with the kind of source and its version: a part of every key."""
        return {"source": type(self).__name__, "version": self.version, **self.batches_spec}
