"""Planted activations of two models as a source: crosscoders train on it as they do on language models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from core.batch import Batch
from core.checked import at_least, between, positive, require
from core.errors import UserError
from core.runtime import Runtime
from core.seeding import generator
from core.streams.source import Source
from core.synthetic.planted_pair import KINDS, PlantedPair


@dataclass(frozen=True, eq=False, kw_only=True)
class PlantedPairSource(Source):
    """Rows `[B, 2, d_model]` of `core.synthetic.planted_pair`.

    n_steps  batches of the training
    counts   of concepts, by kind
    p        that a concept is present in a row: one number, or one for each kind
    seed     of the directions and of the rows
    """

    d_model: int = positive()
    n_steps: int = positive()
    counts: dict[str, int]
    p: float | dict[str, float]
    weak_strength: float = at_least(0)
    p_both: float = between(0, 1)
    noise: float = at_least(0)
    seed: int

    def check(self) -> None:
        for name, table in (("counts", self.counts), ("p", self.p)):
            if isinstance(table, dict) and (unknown := sorted(set(table) - set(KINDS))):
                raise UserError(f"stream.{name}: {', '.join(unknown)} is no kind of concept; use {', '.join(KINDS)}.")
        for own in self.p.values() if isinstance(self.p, dict) else [self.p]:
            require(0 <= own <= 1, "stream.p", own, "lie between 0 and 1")
        if isinstance(self.p, dict) and (missing := sorted(set(self.counts) - set(self.p))):
            raise UserError(f"stream.p: there is no number for {', '.join(missing)}, which stream.counts has.")

    @property
    def n_batches(self) -> int:
        return self.n_steps

    @property
    def batches_spec(self) -> dict[str, Any]:
        return self.plain()

    @property
    def truth(self) -> PlantedPair:
        return PlantedPair(self.d_model, self.counts, self.p, self.weak_strength, self.p_both, self.noise, self.seed)

    def held_out(self, n: int) -> Batch:
        """`n` rows that no training sees."""
        return self.truth.rows(n, generator(self.seed, "planted pair", "heldout"))

    def open(self, run: Runtime) -> PlantedPairs:
        return PlantedPairs(self, run.device)


class PlantedPairs:
    """The stream: every batch has a generator of its own, so the number served is the whole state."""

    def __init__(self, source: PlantedPairSource, device: torch.device) -> None:
        self.source, self.device, self.served = source, device, 0
        self.truth = source.truth

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.truth.rows(
            self.source.batch_size, generator(self.source.seed, "planted pair", "rows", self.served)
        )
        self.served += 1
        return Batch(batch.x.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]
