"""The decoder rows that a meta-SAE is trained on, and how often their latents fire.

Shapes: N rows, d = d_model, m = dict_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis import top_activations as top
from core.analysis.held_out import HeldOut
from core.digest import digest
from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.streams.decoder_rows import directions
from experiments.common import held_out, once_per


@dataclass(frozen=True)
class Rows:
    """The rows of one dictionary, or of several one after another.

    directions  `[N, d]`, of unit norm
    latents     `[N]`, the latent of each row, in its dictionary
    frequency   `[N]`, the share of the held-out tokens on which each fires; None if it was not measured
    first       place of a dictionary in the family -> its first row
    """

    directions: Tensor
    latents: Tensor
    frequency: Tensor | None
    first: Mapping[int, int]


def rows_of(cfg: DictConfig, place: int, method: Dictionary) -> Rows:
    """The rows of a dictionary, except those of latents that fire too rarely (`meta.min_firing_rate`)."""
    measured = cfg.detail or cfg.meta.sampling == "frequency" or cfg.meta.min_firing_rate is not None
    frequency = strongest(cfg, method).frequency if measured else None
    latents = kept(cfg, method.dict_size, frequency)
    chosen, name = method.W_dec[latents.to(method.W_dec.device)], f"family[{place}] ({method.dict_size} latents)"
    W = directions(chosen, name, "meta.min_firing_rate=0 keeps only latents that fire; or choose another dictionary.")
    return Rows(W, latents, None if frequency is None else frequency[latents], {place: 0})


def family_rows(cfg: DictConfig, family: Mapping[int, Dictionary]) -> Rows:
    """The rows of all dictionaries, smallest first."""
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
    """The latents whose rows are used, int64. Raises UserError if there is none."""
    if cfg.meta.min_firing_rate is None or frequency is None:
        return torch.arange(m)
    latents = (frequency > cfg.meta.min_firing_rate).nonzero().flatten()
    if not len(latents):
        raise UserError(f"meta.min_firing_rate={cfg.meta.min_firing_rate}: no latent fires more often; lower it.")
    return latents


def strongest(cfg: DictConfig, method: Dictionary) -> top.Strongest:
    """The strongest activations of a dictionary's latents on the held-out rows."""
    return _activations(cfg).of(method)


class Activations:
    """The strongest activations of dictionaries on held-out text, computed when they are first asked for."""

    def __init__(self, text: HeldOut, n_strongest: int) -> None:
        self.text, self.n_strongest = text, n_strongest
        self.by_digest: dict[str, top.Strongest] = {}

    def of(self, method: Dictionary) -> top.Strongest:
        key = digest(*method.state_dict().values())
        if key not in self.by_digest:
            self.by_digest[key] = top.strongest_activations(method, self.text, self.n_strongest)
        return self.by_digest[key]


@once_per("model", "data", "stream", "evaluation", "examples")
def _activations(cfg: DictConfig) -> Activations:
    return Activations(held_out(cfg), cfg.examples.n_strongest)
