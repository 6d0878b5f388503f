"""Activations of two models with known concepts, to test what crosscoders make of them.

A concept is a unit direction, the same in both models. In every row each concept is present with probability `p`; then
its amplitude is uniform in [0.75, 1.25], times the concept's strength in each model. Gaussian noise is independent in
the two models. Kinds of concepts:
  shared      strength 1 in both models
  weak_base   strength `weak_strength` in the base model, 1 in the chat model
  chat_only   absent from the base model;   base_only   absent from the chat model
  sometimes   strength 1; where present, in both models with probability `p_both`, else in one of them, either equally
              often

Shapes: B rows, d = d_model, C concepts. Model 0 is base, 1 is chat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.batch import Batch
from core.seeding import generator

KINDS = ("shared", "weak_base", "chat_only", "base_only", "sometimes")
AMPLITUDES = (0.75, 1.25)


@dataclass(frozen=True)
class PlantedPair:
    """
    counts         of concepts, by kind
    p              probability that a concept is present in a row: one for all, or one for each kind
    weak_strength  of `weak_base` concepts in the base model
    p_both         see above
    noise          expected norm of the noise in each model
    seed           of the directions; rows have generators of their own
    """

    d_model: int
    counts: Mapping[str, int]
    p: float | Mapping[str, float]
    weak_strength: float
    p_both: float
    noise: float
    seed: int

    @cached_property
    def directions(self) -> Tensor:
        """`[C, d]`, of unit norm."""
        g = generator(self.seed, "planted pair", "directions")
        return normalize(torch.randn(len(self.kinds), self.d_model, generator=g), dim=1)

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of every concept."""
        return [kind for kind in KINDS for _ in range(self.counts.get(kind, 0))]

    def of_kind(self, kind: str) -> Tensor:
        """bool `[C]`."""
        return torch.tensor([own == kind for own in self.kinds])

    @cached_property
    def frequencies(self) -> Tensor:
        """`[C]`, the probability of each concept."""
        return torch.tensor([self.p[kind] if isinstance(self.p, Mapping) else self.p for kind in self.kinds])

    @cached_property
    def strengths(self) -> Tensor:
        """`[2, C]`."""
        base = {"weak_base": self.weak_strength, "chat_only": 0.0}
        chat = {"base_only": 0.0}
        return torch.tensor([[table.get(kind, 1.0) for kind in self.kinds] for table in (base, chat)])

    def rows(self, n: int, g: torch.Generator) -> Batch:
        """`x [n, 2, d]`. Truth: `concepts [n, 2, C]`, how much of each concept is in each model."""
        C = len(self.kinds)
        present = torch.rand(n, C, generator=g) < self.frequencies
        amplitude = torch.empty(n, C).uniform_(*AMPLITUDES, generator=g) * present
        draw = torch.rand(n, C, generator=g)
        alone = (draw >= self.p_both) & self.of_kind("sometimes")
        in_chat = draw < self.p_both + (1 - self.p_both) / 2  # of those that are in one model alone
        there = torch.stack([~(alone & in_chat), ~(alone & ~in_chat)], dim=1)  # [n, 2, C]
        concepts = amplitude[:, None] * self.strengths * there
        noise = torch.randn(n, 2, self.d_model, generator=g) * (self.noise / self.d_model**0.5)
        return Batch(concepts @ self.directions + noise, truth={"concepts": concepts})
