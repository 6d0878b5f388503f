"""Activations with a known structure: entities that share attributes, to test dictionaries of several sizes.

A row is a sum of a few entities. An entity's vector is its own direction plus the directions of a few attributes. So a
small dictionary does best if it learns attributes, and a large one if it learns entities.

Shapes: B rows in the batch, d = d_model, E = n_entities, A = n_attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import normalize

from core.batch import Batch
from core.seeding import generator

OWN_WEIGHT = 0.7
ATTRIBUTE_WEIGHT = 0.6
ATTRIBUTES_PER_ENTITY = 3


class PlantedEntities:
    """Rows `[B, d]` of entities and attributes.

    entities_per_row       smallest and largest number of entities in a row, uniform; equal numbers make all rows
                           equally complex (the negative control of the BatchTopK comparison)
    weights                smallest and largest weight of an entity in a row, uniform
    extra_attribute        probability that a row has one more attribute, without an entity
    noise                  standard deviation per coordinate
    seed                   of the directions; rows have their own generators

    Entities are drawn with probability proportional to 1 / rank (Zipf), without replacement.
    """

    def __init__(
        self,
        d_model: int = 64,
        n_attributes: int = 40,
        n_entities: int = 200,
        entities_per_row: Sequence[int] = (1, 6),
        weights: Sequence[float] = (0.5, 1.5),
        extra_attribute: float = 0.5,
        noise: float = 0.03,
        seed: int = 0,
    ) -> None:
        if not 1 <= entities_per_row[0] <= entities_per_row[1] <= n_entities:
            raise ValueError(f"entities_per_row: {tuple(entities_per_row)} must be two counts in 1..{n_entities}.")
        self.entities_per_row = (int(entities_per_row[0]), int(entities_per_row[1]))
        self.weights = (float(weights[0]), float(weights[1]))
        self.extra_attribute, self.noise, self.seed = extra_attribute, noise, seed
        g = generator(seed, "planted", "directions")
        self.attributes = normalize(torch.randn(n_attributes, d_model, generator=g), dim=1)  # [A, d]
        own = normalize(torch.randn(n_entities, d_model, generator=g), dim=1)
        chosen = torch.rand(n_entities, n_attributes, generator=g).argsort(1)[:, :ATTRIBUTES_PER_ENTITY]
        self.attributes_of = torch.zeros(n_entities, n_attributes).scatter(1, chosen, 1.0)  # [E, A]
        self.entities = OWN_WEIGHT * own + ATTRIBUTE_WEIGHT * self.attributes_of @ self.attributes  # [E, d]
        self.frequencies = 1 / torch.arange(1.0, n_entities + 1)  # [E], not normalised

    def rows(self, n: int, g: torch.Generator) -> Batch:
        """`n` rows. Truth: `entities` `[n, E]` and `attributes` `[n, A]`, the weight of each in the row."""
        low, high = self.entities_per_row
        count = torch.randint(low, high + 1, (n, 1), generator=g)
        race = torch.rand(n, len(self.frequencies), generator=g).log() / self.frequencies  # the largest are drawn
        order = race.topk(high, dim=1).indices
        weight = torch.empty(n, high).uniform_(*self.weights, generator=g) * (torch.arange(high) < count)
        entities = torch.zeros(n, len(self.frequencies)).scatter(1, order, weight)
        extra = torch.randint(len(self.attributes), (n, 1), generator=g)
        extra = torch.zeros(n, len(self.attributes)).scatter(1, extra, 1.0)
        extra = extra * (torch.rand(n, 1, generator=g) < self.extra_attribute)
        x = entities @ self.entities + ATTRIBUTE_WEIGHT * extra @ self.attributes
        x = x + self.noise * torch.randn(x.shape, generator=g)
        return Batch(x, truth={"entities": entities, "attributes": entities @ self.attributes_of + extra})

    def batches(self, batch_size: int, seed: int, *purpose: str) -> Iterator[Batch]:
        """Endless batches, deterministic in the seed and the purpose (`train`, `heldout`, ...)."""
        g = generator(seed, "planted", "rows", *purpose)
        while True:
            yield self.rows(batch_size, g)
