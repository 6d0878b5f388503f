"""A source in one file: sparse sums of fixed directions. Its YAML is in tests/streams/test_source.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from core.batch import Batch
from core.runtime import Runtime
from core.seeding import generator
from core.streams.source import Source


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseSource(Source):
    """Rows `[B, width]`: two of `n_directions` random directions each."""

    width: int
    n_directions: int
    n_steps: int
    seed: int

    @property
    def n_batches(self) -> int:
        return self.n_steps

    @property
    def batches_spec(self) -> dict[str, Any]:
        return self.plain()

    def open(self, run: Runtime) -> "Noise":
        return Noise(self, run.device)


class Noise:
    def __init__(self, source: NoiseSource, device: torch.device) -> None:
        self.source, self.device, self.served = source, device, 0
        draw = generator(source.seed, "directions")
        self.directions = torch.randn(source.n_directions, source.width, generator=draw)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        draw = generator(self.source.seed, "rows", self.served)
        chosen = torch.randint(self.source.n_directions, (2, self.source.batch_size), generator=draw)
        self.served += 1
        return Batch(self.directions[chosen].sum(0).to(self.device))

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]
