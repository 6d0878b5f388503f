"""The decoder rows that a meta-SAE is trained on, and the activations that say how often their latents fire.

Shapes: N rows, d = d_model, m = dict_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis import top_activations as top
from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.streams.decoder_rows import directions
from experiments.common import held_out_activations, held_out_rows, language_model, once_per


@dataclass(frozen=True)
class Rows:
    """directions `[N, d]`, unit; `latents` `[N]`: whose they are, in their dictionary; `frequency` `[N]`: the share of
    the held-out tokens on which each fires, where it was measured; `first`: where each dictionary's rows begin."""

    directions: Tensor
    latents: Tensor
    frequency: Tensor | None
    first: Mapping[int, int]


def rows_of(cfg: DictConfig, place: int, method: Dictionary) -> Rows:
    """The rows of a dictionary, without those of latents that `meta.min_firing_rate` leaves out."""
    looked_at = cfg.detail or cfg.meta.sampling == "frequency" or cfg.meta.min_firing_rate is not None
    frequency = strongest(cfg, place, method).frequency if looked_at else None
    latents = kept(cfg, method.dict_size, frequency)
    W = directions(method.W_dec[latents.to(method.W_dec.device)], f"family[{place}] ({method.dict_size} latents)")
    return Rows(W, latents, None if frequency is None else frequency[latents], {place: 0})


def family_rows(cfg: DictConfig, family: Mapping[int, Dictionary]) -> Rows:
    """The rows of all dictionaries below one another, smallest first."""
    parts = [rows_of(cfg, place, method) for place, method in family.items()]
    starts = np.cumsum([0, *(len(part.latents) for part in parts[:-1])]).tolist()
    frequencies = [part.frequency for part in parts if part.frequency is not None]
    return Rows(
        torch.cat([part.directions for part in parts]),
        torch.cat([part.latents for part in parts]),
        torch.cat(frequencies) if frequencies else None,
        dict(zip(family, starts, strict=True)),
    )


def kept(cfg: DictConfig, m: int, frequency: Tensor | None) -> Tensor:
    """The latents whose rows are taken, int64. Raises UserError if none is left."""
    if cfg.meta.min_firing_rate is None or frequency is None:
        return torch.arange(m)
    latents = (frequency > cfg.meta.min_firing_rate).nonzero().flatten()
    if not len(latents):
        raise UserError(f"meta.min_firing_rate={cfg.meta.min_firing_rate}: no latent fires more often; lower it.")
    return latents


def strongest(cfg: DictConfig, place: int, method: Dictionary) -> top.Strongest:
    """The strongest activations of a dictionary's latents on the held-out rows."""
    return _strongest_of(cfg)(place, method)


@once_per("method", "family", "model", "data", "stream", "evaluation", "examples")
def _strongest_of(cfg: DictConfig) -> Any:
    found: dict[int, top.Strongest] = {}

    def of(place: int, method: Dictionary) -> top.Strongest:
        if place not in found:
            lm, rows, e = language_model(cfg), held_out_rows(cfg), cfg.evaluation
            captured = held_out_activations(cfg)
            found[place] = top.strongest_activations(
                method, lm, cfg.stream.site, rows, e.rows_per_batch, cfg.examples.n_strongest, captured
            )
        return found[place]

    return of
