"""Which latents carry what tuning added: the base model's activations, edited, go through the rest of the chat model.

KL(chat || edited) is measured at the positions that predict answers. The activations of every position are edited,
since attention reads all of them. Interventions, with f_j from the crosscoder on both models' activations, and D_S the
sum over latents j of a set S of f_j (d_j^chat - d_j^base):
  none      h^base
  replace   h^base + D_S
  add       h^base + sum over S of f_j d_j^chat
  all       replace with every latent: chat reconstruction + base error, without the difference of the biases
  error     h^chat - D_all: base reconstruction + chat error, without the difference of the biases
  template  h^chat where the token belongs to the template, else h^base
`bias=True` adds to `all`, and takes from `error`, the difference of the biases.

Source: Minder et al. 2025, sec. 3.3 and the authors' code, which leaves the biases out.
Shapes: R rows (dialogues) of T tokens, m = dict_size, d = d_model, n answer positions of all rows, I interventions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.analysis.paired_tokens import PairedTokens
from core.errors import UserError
from core.kernels import sparse
from core.kernels.codes import Codes
from core.methods.crosscoder import scaled
from core.methods.dictionary import Dictionary
from core.models.pair import ModelPair
from core.seeding import derived_seed, generator
from core.text.chat import answer_positions, first_of_answers, is_role

Kind = Literal["none", "replace", "add", "all", "error", "template"]
FIRST = 9  # answer tokens that `first` counts, beginning with the second of each answer
KL_BYTES = 2**28  # of fp32 logits turned into probabilities at a time
RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Intervention:
    """
    name     of the row in a table
    latents  bool `[m]`, for `replace` and `add`
    pool     the latents that these were chosen from, in words
    """

    name: str
    kind: Kind
    latents: Tensor | None = None
    pool: str = ""
    bias: bool = False

    def __post_init__(self) -> None:
        if (self.latents is None) == (self.kind in ("replace", "add")):
            raise ValueError(f"{self.name}: {self.kind} {'needs' if self.latents is None else 'takes no'} latents.")


class PairOfActivations:
    """One batch: what both models say, `[R, T, 2, d]`, and the crosscoder's codes; makes edited activations `[R, T, d]`
    in the models' own units, fp32.

    valid  bool `[R, T]`: where the crosscoder was trained. Elsewhere, at padding and at positions that its source
           leaves out, its codes mean nothing, and every intervention but `template` leaves h^base.
    """

    def __init__(self, crosscoder: Dictionary, h: Tensor, roles: Tensor, valid: Tensor) -> None:
        self.crosscoder, self.h = crosscoder, h.float()
        self.template = is_role(roles, "template").to(h.device)
        self.valid = valid.to(h.device)
        x, shift = crosscoder.norm(self.h.flatten(0, 1))
        self.codes: Codes = crosscoder.encode(x)
        self.scale, self.offset = (part.expand_as(x) for part in (shift.scale, shift.offset))  # [R T, 2, d]

    def edited(self, intervention: Intervention) -> Tensor:
        base, chat = self.h.unbind(2)
        kind = intervention.kind
        if kind == "none":
            return base
        if kind == "template":
            return chat.where(self.template[..., None], base)
        if kind == "error":
            edited = chat - self._difference(None) - self._bias(intervention)
        elif kind == "add":
            edited = base + self._decoded(1, intervention.latents)
        else:
            edited = base + self._difference(intervention.latents) + self._bias(intervention)
        return edited.where(self.valid[..., None], base)

    def _difference(self, latents: Tensor | None) -> Tensor:
        return self._decoded(1, latents) - self._decoded(0, latents)

    def _decoded(self, model: int, latents: Tensor | None) -> Tensor:
        """sum over the latents of f_j d_j^model; None: all of them."""
        codes = self.codes if latents is None else scaled(self.codes, latents.to(self.h.device, self.h.dtype))
        decoded = sparse.decode(codes, self.crosscoder.W_dec[:, model].detach().contiguous()) * self.scale[:, model]
        return decoded.view_as(self.h[:, :, 0])

    def _bias(self, intervention: Intervention) -> Tensor:
        """The difference of the biases, with that of the offsets of the normalisation; 0 unless it is asked for."""
        if not intervention.bias:
            return self.h.new_zeros(())
        base, chat = (self.crosscoder.b_dec.detach() * self.scale + self.offset).unbind(1)
        return (chat - base).view_as(self.h[:, :, 0])


@dataclass(frozen=True, eq=False)
class PatchedKL:
    """Nats, at every answer position.

    names     of the interventions
    kl        `[I, n]` float64
    first     bool `[n]`: whether it predicts one of the tokens 2 to `FIRST` + 1 of an answer
    dialogue  `[n]`: the row that it is in
    """

    names: tuple[str, ...]
    kl: np.ndarray
    first: np.ndarray
    dialogue: np.ndarray

    def at(self, positions: Literal["all", "first"]) -> KLMeans:
        """Means over one set of positions. `all` includes the last template token, which predicts an answer's first."""
        chosen = self.first if positions == "first" else np.ones_like(self.first)
        return KLMeans(self.names, self.kl[:, chosen], self.dialogue[chosen])


class KLMean(NamedTuple):
    """Token mean, 1.96 standard errors over tokens (NaN for fewer than two), and the 95 % interval of a bootstrap over
    dialogues."""

    mean: float
    token_error: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class KLMeans:
    """The interventions on one set of positions; `[I, n]` and `[n]` as in `PatchedKL`."""

    names: tuple[str, ...]
    kl: np.ndarray
    dialogue: np.ndarray

    @property
    def n(self) -> int:
        return self.kl.shape[1]

    @cached_property
    def resampled(self) -> np.ndarray:
        """`[RESAMPLES, I]`: token means where dialogues are drawn with replacement, the same ones for every
        intervention."""
        which, owner = np.unique(self.dialogue, return_inverse=True)
        counts = np.bincount(owner, minlength=len(which))  # [R']
        sums = np.stack([np.bincount(owner, row, minlength=len(which)) for row in self.kl])  # [I, R']
        draw = np.random.default_rng(derived_seed(0, "dialogues", len(which)))
        times = draw.multinomial(len(which), np.full(len(which), 1 / len(which)), size=RESAMPLES)  # [RESAMPLES, R']
        return (times @ sums.T) / (times @ counts)[:, None]

    def mean(self, name: str) -> KLMean:
        i = self.names.index(name)
        error = 1.96 * float(self.kl[i].std(ddof=1)) / self.n**0.5 if self.n > 1 else float("nan")
        return KLMean(float(self.kl[i].mean()), error, *self._interval(self.resampled[:, i]))

    def difference(self, a: str, b: str) -> tuple[float, float, float]:
        """Mean of a minus mean of b, and the 95 % interval over dialogues."""
        i, j = self.names.index(a), self.names.index(b)
        mean = float(self.kl[i].mean() - self.kl[j].mean())
        return (mean, *self._interval(self.resampled[:, i] - self.resampled[:, j]))

    def reduction(self, name: str, of: str = "none") -> tuple[float, float, float]:
        """By which share an intervention lowers the KL of another, and the 95 % interval over dialogues."""
        i, j = self.names.index(name), self.names.index(of)
        mean = 1 - float(self.kl[i].mean() / self.kl[j].mean())
        return (mean, *self._interval(1 - self.resampled[:, i] / self.resampled[:, j]))

    @staticmethod
    def _interval(values: np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(values, (0.025, 0.975))
        return float(low), float(high)


@torch.no_grad()
def patched_kl(
    pair: ModelPair,
    crosscoder: Dictionary,
    tokens: PairedTokens,
    interventions: Sequence[Intervention],
    rows_per_batch: int,
) -> PatchedKL:
    """KL(chat || chat with edited activations at the pair's site) at every answer position of dialogues, for every
    intervention. Raises UserError where no answer is long enough."""
    kl, first, dialogue = [], [], []
    for start in range(0, len(tokens), rows_per_batch):
        part = tokens[slice(start, start + rows_per_batch)]
        at = answer_positions(part.roles)
        if not at.any():
            continue
        activations = PairOfActivations(crosscoder, pair.capture(part.ids), part.roles, part.valid)
        reference = _logits(pair, activations.h[:, :, 1], part.ids, at)
        rows = [
            kl_of_logits(reference, _logits(pair, activations.edited(intervention), part.ids, at))
            for intervention in interventions
        ]
        kl.append(torch.stack(rows).double().cpu())
        first.append(first_of_answers(part.roles, FIRST + 1)[at])
        dialogue.append(at.nonzero()[:, 0] + start)
    if not first or not torch.cat(first).any():
        raise UserError("dialogues: no dialogue has an answer of two tokens or more within stream.n_ctx.")
    names = tuple(intervention.name for intervention in interventions)
    return PatchedKL(names, *(torch.cat(parts, dim=-1).cpu().numpy() for parts in (kl, first, dialogue)))


def _logits(pair: ModelPair, x: Tensor, ids: Tensor, at: Tensor) -> Tensor:
    """Logits at the chosen positions `[n, V]`, where x `[R, T, d]` are the chat model's activations at the site."""
    logits = pair.chat.logits_with(x.to(pair.device, pair.chat.dtype), ids, pair.site)
    return logits[at.to(logits.device)]


def kl_of_logits(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, `[n]` fp32, from logits `[n, V]`; a few rows at a time are held in fp32."""
    size = max(1, KL_BYTES // (4 * p.shape[1]))
    parts = []
    for p_part, q_part in zip(p.split(size), q.split(size), strict=True):
        log_p, log_q = p_part.float().log_softmax(1), q_part.float().log_softmax(1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(1))
    return torch.cat(parts)


# ---- sets of latents, bool [m]


def halves(scores: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """The better and the worse half of a pool, bool `[m]` each; higher scores `[m]` are better, ties go by index. Of an
    odd pool the middle latent is in neither."""
    latents = pool.nonzero().squeeze(1)
    if scores[latents].isnan().any():
        raise ValueError("A latent of the pool has no score.")
    order = latents[scores[latents].argsort(descending=True, stable=True)]
    n = len(order) // 2
    return members(order[:n], len(pool)), members(order[len(order) - n :], len(pool))


def random_half(pool: Tensor, seed: int) -> Tensor:
    """Half of a pool, rounded down, drawn at random."""
    latents = pool.nonzero().squeeze(1).cpu()
    order = torch.randperm(len(latents), generator=generator(seed, "random half"))
    return members(latents[order[: len(latents) // 2]], len(pool))


def members(latents: Tensor, m: int) -> Tensor:
    """Indices -> bool `[m]`."""
    mask = torch.zeros(m, dtype=torch.bool)
    mask[latents] = True
    return mask
