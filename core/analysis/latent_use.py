"""On which tokens latents fire: the chat template or words, how strongly, and whether two latents fire together.

An activation is v_j, the code times the size of the latent's decoder. It counts above `COUNTED`. Strengths are relative
to the largest activation over all tokens; `EDGES` divide them.

Source: Minder et al. 2025, sec. 3 and the authors' notebooks. Shapes: B rows, m latents, P pairs of latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.kernels.codes import Codes, entries
from core.metrics.crosscoder import TWIN_COSINE, twins
from core.seeding import generator

COUNTED = 1e-3  # v from which an activation is counted
OFF = 1e-6  # relative strength up to which a latent is off
EDGES = (0.1, 0.4, 0.7)  # of relative strength: weak, medium, strong, strongest
HIGH, LOW = 0.4, 0.1  # of twins: one fires strongly and the other at most weakly
KINDS = ("web", "template", "words")  # of tokens: ordinary text; the template and the words of dialogues


def kinds_of(template: Tensor, chat: Tensor) -> Tensor:
    """`[B]`, places in `KINDS`, of tokens that are a template's, and of those that are in a dialogue."""
    return torch.where(chat, torch.where(template, 1, 2), 0)


class LatentUse:
    """Counts over batches, on the CPU.

    n_tokens  `[3]`, by kind of token
    counts    `[m, 3]`, activations that count
    largest   `[m]`, the largest v
    """

    def __init__(self, m: int) -> None:
        self.n_tokens = np.zeros(len(KINDS), dtype=np.int64)
        self.counts = np.zeros((m, len(KINDS)), dtype=np.int64)
        self.largest = np.zeros(m)

    def add(self, v: Codes, kinds: Tensor) -> None:
        rows, cols, values = (part.cpu() for part in entries(v))
        kinds = kinds.cpu()
        self.n_tokens += np.bincount(kinds.numpy(), minlength=len(KINDS))
        counted = values > COUNTED
        places = (cols * len(KINDS) + kinds[rows])[counted].numpy()
        self.counts += np.bincount(places, minlength=self.counts.size).reshape(self.counts.shape)
        np.maximum.at(self.largest, cols.numpy(), values.numpy())

    @property
    def template_base_rate(self) -> float:
        """The share of a dialogue's tokens that are the template's."""
        _, template, words = self.n_tokens
        return int(template) / max(1, int(template + words))

    @property
    def template_share(self) -> np.ndarray:
        """`[m]`: the share of a latent's activations in dialogues that are on the template; NaN without any."""
        _, template, words = self.counts.T
        with np.errstate(invalid="ignore"):
            return template / (template + words)


class StrengthUse:
    """`LatentUse` by strength, once the largest activations are known: `counts` `[m, 4, 3]`."""

    def __init__(self, largest: np.ndarray) -> None:
        self.largest = torch.from_numpy(largest)
        self.counts = np.zeros((len(largest), len(EDGES) + 1, len(KINDS)), dtype=np.int64)

    def add(self, v: Codes, kinds: Tensor) -> None:
        rows, cols, values = (part.cpu() for part in entries(v))
        strength = torch.bucketize(values / self.largest[cols], torch.tensor(EDGES, dtype=torch.float64))
        counted = values > COUNTED
        places = ((cols * (len(EDGES) + 1) + strength) * len(KINDS) + kinds.cpu()[rows])[counted].numpy()
        self.counts += np.bincount(places, minlength=self.counts.size).reshape(self.counts.shape)


# ---- twins


@dataclass(frozen=True, eq=False)
class TwinPairs:
    """`[P, 2]` each, (chat-only latent, base-only latent): pairs of one direction, and the same base-only latents with
    other chat-only latents, drawn at random, as a baseline. `false` is empty where there is no other."""

    true: Tensor
    false: Tensor


def twin_pairs(
    W_dec: Tensor, chat_only: Tensor, base_only: Tensor, seed: int, cosine: float = TWIN_COSINE
) -> TwinPairs:
    """Masks are bool `[m]`, see `core.metrics.crosscoder.twins`."""
    true = twins(W_dec, chat_only, base_only, cosine)
    chat = chat_only.nonzero().squeeze(1).cpu()
    if len(chat) < 2:
        return TwinPairs(true, true[:0])
    drawn = torch.randint(len(chat) - 1, (len(true),), generator=generator(seed, "false twins"))
    own = (chat[None] == true[:, :1]).long().argmax(1)  # the place of the true twin among the chat-only latents
    return TwinPairs(true, torch.stack([chat[drawn + (drawn >= own).long()], true[:, 1]], dim=1))


class TogetherOrApart:
    """How strongly the two latents of each pair fire on the same tokens: `joint` `[P, 5, 5]`, tokens by the strength of
    the first and of the second: off, and between `EDGES`. Strengths are relative to the larger of both maxima."""

    def __init__(self, pairs: Tensor, largest: np.ndarray) -> None:
        self.pairs = pairs.cpu()
        self.scale = torch.from_numpy(largest)[self.pairs].amax(1)  # [P]
        self.edges = torch.tensor([OFF, *EDGES], dtype=torch.float64)
        self.joint = np.zeros((len(pairs), len(self.edges) + 1, len(self.edges) + 1), dtype=np.int64)

    def add(self, v: Codes) -> None:
        if not len(self.pairs):
            return
        latents, place = self.pairs.unique(return_inverse=True)
        strength = torch.bucketize(columns(v, latents)[:, place] / self.scale[:, None], self.edges)  # [B, P, 2]
        n = len(self.edges) + 1
        first, second = strength.unbind(2)
        places = (torch.arange(len(self.pairs)) * n + first) * n + second  # [B, P]
        self.joint += np.bincount(places.flatten().numpy(), minlength=self.joint.size).reshape(self.joint.shape)

    @property
    def divergence(self) -> np.ndarray:
        """`[P]`: of the tokens on which one latent is high, the share on which the other is low; NaN without any."""
        high, low = self.edges.tolist().index(HIGH) + 1, self.edges.tolist().index(LOW) + 1
        apart = self.joint[:, high:, :low].sum((1, 2)) + self.joint[:, :low, high:].sum((1, 2))
        either = self.joint.sum((1, 2)) - self.joint[:, :high, :high].sum((1, 2))
        with np.errstate(invalid="ignore"):
            return apart / either


def columns(codes: Codes, latents: Tensor) -> Tensor:
    """The activations of some latents, different ones, dense `[B, n]` on the CPU."""
    rows, cols, values = (part.cpu() for part in entries(codes))
    place = torch.full((codes.shape[1],), -1)
    place[latents] = torch.arange(len(latents))
    kept = place[cols] >= 0
    dense = torch.zeros(codes.shape[0], len(latents), dtype=torch.float64)
    dense[rows[kept], place[cols[kept]]] = values[kept].double()
    return dense
