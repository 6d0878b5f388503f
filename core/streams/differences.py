"""The difference of two models' activations as a source: what a dictionary of the difference is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from core.batch import Batch
from core.errors import UserError
from core.runtime import Runtime
from core.streams.source import Source, Stream


@dataclass(frozen=True, eq=False, kw_only=True)
class DifferenceSource(Source):
    """Rows `[B, d]`, chat minus base, of a source of pairs `[B, 2, d]`; all else is as there."""

    node: ClassVar[str] = "stream"
    pairs: Source

    @classmethod
    def between(cls, pairs: Source) -> Self:
        return cls(
            batch_size=pairs.batch_size,
            batches_per_chunk=pairs.batches_per_chunk,
            calibration_batches=pairs.calibration_batches,
            devices=pairs.devices,
            pairs=pairs,
        )

    @property
    def n_batches(self) -> int:
        return self.pairs.n_batches

    @property
    def batches_spec(self) -> dict[str, Any]:
        return {"pairs": self.pairs.spec}

    @property
    def row_width(self) -> int | None:
        return self.pairs.row_width

    @property
    def commits(self) -> dict[str, str]:
        return self.pairs.commits

    def note(self) -> None:
        self.pairs.note()

    def open(self, run: Runtime) -> Stream:
        return Differences(self.pairs.open(run))

    def report(self, stream: Stream) -> dict[str, float]:
        assert isinstance(stream, Differences)
        return self.pairs.report(stream.pairs)


class Differences:
    """The stream: that of the pairs, whose state is its own."""

    def __init__(self, pairs: Stream) -> None:
        self.pairs = pairs

    @property
    def device(self) -> torch.device:
        return self.pairs.device

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self.pairs)
        if batch.x.ndim != 3 or batch.x.shape[1] != 2:
            raise UserError(
                f"stream: rows {list(batch.x.shape[1:])} are not of two models, so they have no difference."
            )
        return replace(batch, x=batch.x[:, 1] - batch.x[:, 0], _normalised={})

    def state_dict(self) -> dict[str, Any]:
        return self.pairs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs.load_state_dict(state)
