"""Latent Scaling (Minder et al. 2025, sec. 2.3 and eq. 4): how much of a latent's direction each model really has.

For a latent j with codes f_j, a probe direction p_j (its decoder in the chat or in the base model) and a target Y:
  beta_j(Y) = argmin_beta sum_i |beta f_j(x_i) p_j - Y_i|^2 = <p_j, sum_i f_j(x_i) Y_i> / (|p_j|^2 sum_i f_j(x_i)^2)
Targets of model m, with the error eps^m = h^m - h_hat^m:
  activation        h^m                 activation_no_bias  h^m - b_dec^m
  reconstruction    h_hat^m             error               eps^m + f_j d_j^m, the error without latent j
nu is beta in the other model over beta in the probe's own: about 0 for what only the probe's model has, about 1 for
what both have. A high nu of the error means Complete Shrinkage, a high nu of the reconstruction Latent Decoupling.

One pass over the tokens, with sums per latent in float64, gives every beta:
  beta(error)      = <p, sum f eps> / (|p|^2 sum f^2) + <p, d^m> / |p|^2
  beta(activation) = <p, sum f eps> / (|p|^2 sum f^2) + beta(reconstruction)
So memory does not grow with the number of tokens, and only the products at the active entries are computed, some of
them at a time: the paper's crosscoder has 200,000 active entries in a batch, and a direction of each is 8 GB.

Shapes: B rows, M models (0 base, 1 chat), d = d_model, m = dict_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from core.kernels.codes import Codes, entries
from core.methods.dictionary import Dictionary

Probe = Literal["base", "chat"]
Target = Literal["error", "reconstruction", "activation", "activation_no_bias"]
MODELS: tuple[Probe, Probe] = ("base", "chat")
TARGETS: tuple[Target, ...] = ("error", "reconstruction", "activation", "activation_no_bias")
NUMBERS_AT_ONCE = 2**24  # of the directions of active entries, 128 MB


class Decoder(Protocol):
    """A dictionary of several models, as far as it is needed here."""

    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802  [m, M, d]
    @property
    def b_dec(self) -> Tensor: ...  # [M, d]


@dataclass(frozen=True)
class Scaling:
    """The betas of one probe, float64; NaN for a latent that never fired.

    beta      target -> `[m, M]`
    n_active  `[m]`, rows in which the latent fired
    gain      target -> `[m, M]`: by how much the scaled latent lowers the summed square of the target, over all rows
    """

    probe: Probe
    beta: dict[Target, Tensor]
    n_active: Tensor
    gain: dict[Target, Tensor]

    def nu(self, target: Target) -> Tensor:
        """`[m]`, beta in the other model over beta in the probe's own."""
        own = MODELS.index(self.probe)
        return self.beta[target][:, 1 - own] / self.beta[target][:, own]


class LatentScaling:
    """The sums of `Scaling` over batches."""

    def __init__(self, dictionary: Decoder) -> None:
        if isinstance(dictionary, Dictionary):
            dictionary.require_one_code()
        self.W_dec = dictionary.W_dec.detach().double()  # [m, M, d]
        self.b_dec = dictionary.b_dec.detach().double()  # [M, d]
        m, M = self.W_dec.shape[:2]
        zeros = self.W_dec.new_zeros
        self.n_active = torch.zeros(m, dtype=torch.int64, device=self.W_dec.device)
        self.n_rows = 0
        self.f, self.f_square = zeros(m), zeros(m)
        self.error, self.reconstruction = zeros(M, m, M), zeros(M, m, M)  # <p, sum f Y> by probe, latent, model

    @torch.no_grad()
    def add(self, x: Tensor, codes: Codes) -> None:
        """Rows `[B, M, d]` in the dictionary's normalised space, and their codes at inference."""
        rows, cols, values = entries(codes)
        kept = values > 0
        rows, cols, f = rows[kept], cols[kept], values[kept].double()
        x = x.double()
        self.n_rows += len(x)
        parts = list(zip(*(part.split(self.entries_at_once) for part in (rows, cols, f)), strict=True))
        x_hat = self.b_dec.expand(x.shape).clone()
        for at, latents, amounts in parts:
            x_hat.index_add_(0, at, amounts[:, None, None] * self.W_dec[latents])
        self.n_active.index_add_(0, cols, torch.ones_like(cols))
        self.f.index_add_(0, cols, f)
        self.f_square.index_add_(0, cols, f.square())
        for target, total in ((x - x_hat, self.error), (x_hat, self.reconstruction)):
            for at, latents, amounts in parts:
                there = amounts[:, None, None] * target[at]  # [entries, M, d]
                for probe, sums in enumerate(total):
                    sums.index_add_(0, latents, torch.einsum("nd,nMd->nM", self.W_dec[latents, probe], there))

    @property
    def entries_at_once(self) -> int:
        return max(1, NUMBERS_AT_ONCE // self.b_dec.numel())

    def result(self, probe: Probe) -> Scaling:
        """The betas of what was added so far."""
        own = MODELS.index(probe)
        p = self.W_dec[:, own]  # [m, d]
        p_square = p.square().sum(1, keepdim=True)
        scale = p_square * self.f_square[:, None]  # [m, 1]
        scale = scale.where(scale > 0, torch.nan)
        from_error, reconstruction = self.error[own] / scale, self.reconstruction[own] / scale
        activation = reconstruction + from_error
        bias = (p @ self.b_dec.T) * self.f[:, None] / scale
        beta: dict[Target, Tensor] = {
            "error": from_error + torch.einsum("md,mMd->mM", p, self.W_dec) / p_square,
            "reconstruction": reconstruction,
            "activation": activation,
            "activation_no_bias": activation - bias,
        }
        gain = {target: value.square() * scale for target, value in beta.items()}
        return Scaling(probe, beta, self.n_active, gain)

    def gain(self, fitted: Scaling, target: Target) -> Tensor:
        """`[m, M]`: by how much latents that were scaled on other rows lower the mean square of the target on these,
        per row and component. NaN for a latent that fires on neither.

        |Y|^2 - |Y - beta f p|^2 = |p|^2 sum f^2 (2 beta beta* - beta^2), where beta* is the best one on these rows.
        """
        here = self.result(fitted.probe)
        p_square = self.W_dec[:, MODELS.index(fitted.probe)].square().sum(1, keepdim=True)
        beta, best = fitted.beta[target], here.beta[target]
        scale = p_square * self.f_square[:, None] / (max(1, self.n_rows) * self.W_dec.shape[-1])
        return scale * (2 * beta * best - beta.square())
