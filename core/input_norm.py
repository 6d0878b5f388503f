"""How activations are normalised before a dictionary sees them.

Shapes: d = width of the site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Normalisation = Literal["token_std", "token_center", "scalar", "shared_scalar", "none", "layer_norm", "token_norm"]
AnyNormalisation = Normalisation | Literal["affine"]  # affine: its numbers come from a file; no training measures them
CONSTANT = ("scalar", "shared_scalar")  # kinds whose scale is measured once
AFFINE = "affine"


class Shift(NamedTuple):
    """What normalisation took away: `x = scale * x_normalised + offset`; both broadcast against `[..., d]`."""

    offset: Tensor
    scale: Tensor


class InputNorm(nn.Module):
    """Normalisation of activations `[..., d]`, as a part of every dictionary, so that it travels with the weights.

    kind     token_std     per token, subtract the mean over d and divide by (the unbiased standard deviation over d
                           + 1e-5): `input_unit_norm` of the BatchTopK authors' code; squared norms are then about d
             token_center  per token, subtract the mean over d (as centring the weights that write to the residual
                           stream does)
             scalar        one constant for all tokens, measured on the first activations so that E|x|^2 = d; a buffer
             shared_scalar one constant for all tokens and all leading axes, so that E|x|^2 = d over all of them: ratios
                           between models stay what they are
             none          activations as they are
             layer_norm    token_std undone without the 1e-5, as SAELens does; codes are the same
             token_norm    per token, scaled to the norm sqrt(d) (SAELens: constant_norm_rescale)
             affine        subtract an offset `[*leading, d]` and divide by a scale; both are buffers that are given
    leading  axes of a row before the last, `(n_models,)` for `[N, n_models, d]`: `scalar` has a constant for each entry
    d_model  d, which `affine` needs
    """

    scale: Tensor  # []; [*leading, 1] where there are leading axes
    offset: Tensor  # [*leading, d], of `affine` alone

    def __init__(
        self,
        kind: AnyNormalisation = "token_std",
        leading: Sequence[int] = (),
        d_model: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in (*get_args(Normalisation), AFFINE):
            raise ValueError(f"input_norm: {kind!r} is not one of {', '.join(get_args(Normalisation))}, {AFFINE}.")
        self.kind = kind
        self.register_buffer("scale", torch.ones((*leading, 1) if leading and kind != "shared_scalar" else ()))
        if kind == AFFINE:
            if d_model is None:
                raise ValueError("input_norm: affine needs d_model.")
            self.register_buffer("offset", torch.zeros(*leading, d_model))

    @property
    def shared_as(self) -> str | None:
        """Norms with the same word give the same result for a batch; None: this one has a constant of its own."""
        return None if self.kind in (*CONSTANT, AFFINE) else self.kind

    def fit(self, x: Tensor) -> None:
        """Measure the constants on activations `[N, d]` or `[N, *leading, d]`; nothing for the kinds without one."""
        if self.kind in CONSTANT:
            square = x.float().square().sum(-1)
            mean = square.mean() if self.kind == "shared_scalar" else square.mean(0)
            self.scale.copy_((mean.sqrt() / math.sqrt(x.shape[-1])).view(self.scale.shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Shift]:
        """`[..., d]` -> the same normalised, in fp32, and what `undo` needs."""
        x = x.float()
        zero, one = x.new_zeros(()), x.new_ones(())
        if self.kind == "none":
            return x, Shift(zero, one)
        if self.kind in CONSTANT:
            return x / self.scale, Shift(zero, self.scale)
        if self.kind == AFFINE:
            return (x - self.offset) / self.scale, Shift(self.offset, self.scale)
        if self.kind == "token_norm":
            rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
            return x / rms, Shift(zero, rms)
        mean = x.mean(-1, keepdim=True)
        if self.kind == "token_center":
            return x - mean, Shift(mean, one)
        centred = x - mean
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)
        divisor = std + 1e-5
        return centred / divisor, Shift(mean, std if self.kind == "layer_norm" else divisor)

    @staticmethod
    def undo(x: Tensor, shift: Shift) -> Tensor:
        return x * shift.scale + shift.offset
