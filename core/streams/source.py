"""Training data of dictionaries: a source consists of plain settings, and opens a stream of batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, ClassVar, Protocol, final

import torch

from core import distributed
from core.batch import Batch
from core.checked import Checked, at_least, positive
from core.errors import UserError
from core.runtime import Runtime


class Stream(Protocol):
    """An endless iterator of batches on `device`, whose state is enough to continue with the next batch."""

    @property
    def device(self) -> torch.device: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(Checked, ABC):
    """The settings of a stream. Dictionaries with equal sources are trained together, on one stream.

    batch_size           rows (see `unit`) in one optimiser step, over all devices
    batches_per_chunk    optimiser steps in one Lightning step
    calibration_batches  batches after the training, to measure what inference needs
    devices              number of devices that share every batch
    """

    node: ClassVar[str] = "stream"
    version: ClassVar[int] = 1  # raise it when a change alters the batches that the same settings give
    unit: ClassVar[str] = "rows"  # what `batch_size` counts
    groups: ClassVar[tuple[str, ...]] = ()  # groups of the configuration that it needs besides its settings
    can_share: ClassVar[bool] = False  # whether several devices can share every batch

    batch_size: int = positive()
    batches_per_chunk: int = positive()
    calibration_batches: int = at_least(0)
    devices: int = 1

    __eq__ = object.__eq__  # two sources are compared by their specs
    __hash__ = object.__hash__

    @property
    @abstractmethod
    def n_batches(self) -> int:
        """Batches of the training, one for each optimiser step."""

    @property
    @abstractmethod
    def batches_spec(self) -> dict[str, Any]:
        """What decides the batches, as JSON values."""

    @property
    def row_width(self) -> int | None:
        """The size of a row; None if it is not known before the stream is open. Raises UserError as `open` does."""
        return None

    @property
    def commits(self) -> dict[str, str]:
        """The commits of what is read from the hub, by `core.hub.name_of`."""
        return {}

    def note(self) -> None:
        """Record that the running cell's results depend on what the batches are read from (`core.inputs`)."""
        return

    @abstractmethod
    def open(self, run: Runtime) -> Stream:
        """The stream from its beginning. Raises UserError for settings that do not fit together."""

    def report(self, stream: Stream) -> dict[str, float]:
        """What a stream of this source has read so far, for the record of a training; says what a user should know."""
        return {}

    def check_devices(self) -> None:
        """Raises UserError if the batches cannot be divided among `devices`."""
        distributed.share("stream.batch_size", self.batch_size, self.devices)

    @final
    @property
    def spec(self) -> dict[str, Any]:
        """The kind of source, its version, and `batches_spec`: a part of every key."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": kind, "version": self.version, "batches": self.batches_spec}


def source_of(settings: Mapping[str, Any], cfg: Mapping[str, Any], devices: int) -> Source:
    """The source that `settings` describe (class `_target_`), with the groups that it needs of the plain `cfg`.

    Raises UserError for a class that is not a source, for unknown or missing settings, and for too many devices.
    """
    own = dict(settings)
    name = own.pop("_target_", None)
    try:
        kind = resolve_name(name)
    except Exception as error:  # whatever a wrong name makes of an import
        raise UserError(f"stream._target_: {name} cannot be imported. Choose one of conf/source.") from error
    if not (isinstance(kind, type) and issubclass(kind, Source)):
        raise UserError(f"stream._target_: {name} is not a source (core.streams). Choose one of conf/source.")
    if devices > 1 and not kind.can_share:
        raise UserError(f"trainer.devices={devices}: the batches of {kind.__name__} are served to one device only.")
    shared = {"devices": devices} if kind.can_share else {}
    return kind.of({**own, **{group: cfg[group] for group in kind.groups}, **shared})
