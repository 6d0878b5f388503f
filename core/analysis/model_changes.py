"""What different tools say has changed between two models, in one form: directions, the model that has each, and how
much of it is in every row.

Crosscoders report latents of one model, by the norms of their decoders or by Latent Scaling. A dictionary of the
difference reports latents whose direction one model has much more of. Two tools need no training: the principal
components of the difference, and its mean.

Shapes: B rows, 2 models (0 base, 1 chat), d = d_model, m = dict_size, n changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.analysis.latent_scaling import MODELS, LatentScaling
from core.analysis.specificity import MIN_ACTIVE, SPECIFIC
from core.kernels.codes import Codes
from core.metrics.crosscoder import in_class, relative_norm

BASE, CHAT, UNKNOWN = 0, 1, -1
CHANGED = 0.6  # of a latent of the difference: |beta| in one model over that in the other (the authors' follow-up)
STABLE = 0.9  # cosine from which a principal component has come out again
N_NULLS, QUANTILE = 20, 0.95  # random signs of rows, and the quantile of their means that a mean must pass


@dataclass(frozen=True, eq=False)
class Changes:
    """
    directions  `[n, d]`, unit; in the sense in which the model of `side` has it
    side        int `[n]`: the model that has (more of) it; UNKNOWN where a tool does not say, nor the sign
    strength    `[B, n]`, how much of it is in each row
    one_sided   whether the tool says that the other model has none of it, and not only less
    """

    directions: Tensor
    side: Tensor
    strength: Tensor
    one_sided: bool

    def __len__(self) -> int:
        return len(self.side)

    def rows(self) -> Tensor:
        """`[B]`: how much of all changes is in a row, in squares since directions are nearly orthogonal."""
        return self.strength.square().sum(1)


def one_sided_by_norm(W_dec: Tensor, codes: Codes) -> Changes:
    """Latents whose decoder in the other model is at most a fifth: the classes chat-only and base-only."""
    delta = relative_norm(W_dec)
    fired = codes.fired()
    return _of_latents(W_dec, codes, fired & in_class(delta, "base_only"), fired & in_class(delta, "chat_only"))


def one_sided_by_scaling(W_dec: Tensor, codes: Codes, scaling: LatentScaling) -> Changes:
    """Latents that Latent Scaling calls specific to the model with their larger decoder, which is the probe. Norms are
    not looked at further: a rare concept's decoders may be of any size."""
    delta = relative_norm(W_dec)
    chosen = []
    for probe, own in zip(MODELS, (delta < 0.5, delta > 0.5), strict=True):
        result = scaling.result(probe)
        low = torch.stack([result.nu(target).abs() < bound for target, bound in SPECIFIC.items()]).all(0)
        chosen.append(own & low & (result.n_active >= MIN_ACTIVE))
    return _of_latents(W_dec, codes, *chosen)


def _of_latents(W_dec: Tensor, codes: Codes, base: Tensor, chat: Tensor) -> Changes:
    """`base` and `chat` are bool `[m]`: the latents of each model."""
    at = torch.cat([base.nonzero().squeeze(1), chat.nonzero().squeeze(1)])
    side = torch.cat([at.new_full((int(base.sum()),), BASE), at.new_full((int(chat.sum()),), CHAT)])
    directions = W_dec.detach()[at, side]  # [n, d]
    return Changes(normalize(directions, dim=1), side, codes.dense()[:, at] * directions.norm(dim=1), True)


@dataclass
class InBoth:
    """A decoder with the same directions for both models."""

    W_dec: Tensor  # [m, 2, d]
    b_dec: Tensor  # [2, d]


def of_difference(W_dec: Tensor, codes: Codes, x: Tensor) -> Changes:
    """Latents of a dictionary of chat minus base, whose direction one model has much more of where they fire.

    W_dec `[m, d]`, x `[B, 2, d]`. Of each latent's two betas of the centred activations the smaller is at most CHANGED
    of the larger, in size. What only noise or a shift of sign made has two betas of one size.
    """
    centred = x - x.mean(0)
    scaling = LatentScaling(InBoth(W_dec.detach()[:, None].repeat(1, 2, 1), W_dec.new_zeros(x.shape[1:])))
    scaling.add(centred, codes)
    result = scaling.result("chat")
    beta = result.beta["activation"]  # [m, 2]
    smaller, larger = beta.abs().amin(1), beta.abs().amax(1)
    at = ((smaller <= CHANGED * larger) & (result.n_active >= MIN_ACTIVE)).nonzero().squeeze(1)
    side = beta[at].abs().argmax(1)
    sign = beta[at, side].sign().to(W_dec.dtype)  # a latent can also stand for what the base model lacks
    directions = W_dec.detach()[at]
    strength = codes.dense()[:, at] * directions.norm(dim=1)
    return Changes(normalize(directions * sign[:, None], dim=1), side, strength, False)


def principal(x: Tensor) -> Changes:
    """Principal components of chat minus base that come out again: those of the even rows that have a cosine above
    STABLE with one of the odd rows. Noise alike in all directions has none; nor have changes of one strength, whose
    components are any mixture of them. x `[B, 2, d]`."""
    difference = x[:, 1] - x[:, 0]
    centred = difference - difference.mean(0)
    halves = [torch.linalg.eigh(half.T @ half)[1] for half in (centred[::2], centred[1::2])]  # columns, smallest first
    stable = (halves[0].T @ halves[1]).abs().amax(1) > STABLE
    directions = halves[0][:, stable].T.flip(0)  # [n, d], the largest first
    side = torch.full((len(directions),), UNKNOWN)
    return Changes(directions, side, centred @ directions.T, False)


def mean_shift(x: Tensor, generator: torch.Generator) -> Changes:
    """The mean of chat minus base, if its norm is above chance: above the QUANTILE of that of the same rows with random
    signs, over N_NULLS draws. x `[B, 2, d]`."""
    difference = x[:, 1] - x[:, 0]
    mean = difference.mean(0)
    signs = torch.rand(N_NULLS, len(x), generator=generator).to(x).sub(0.5).sign()
    null = (signs @ difference / len(x)).norm(dim=1).quantile(QUANTILE)
    directions = normalize(mean, dim=0)[None][: int(mean.norm() > null)]
    return Changes(directions, torch.full((len(directions),), UNKNOWN), difference @ directions.T, False)
