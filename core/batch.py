"""What a stream of activations yields, and how activations are normalised before a dictionary sees them.

Shapes: B rows in a batch, d = width of the site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Normalisation = Literal["token_std", "token_center", "scalar", "none", "layer_norm", "token_norm"]


@dataclass(slots=True)
class Batch:
    """Activations and where they came from.

    x          `[B, d]`; `[B, 2, d]` for a pair of models on the same tokens; `[B, tau + 1, d]` for ordered windows
    tokens     `[B]` ids of the tokens at which they were taken, where there are tokens
    positions  `[B]` their positions in their rows
    truth      ground truth of a synthetic source, by name, first axis B
    """

    x: Tensor
    tokens: Tensor | None = None
    positions: Tensor | None = None
    truth: dict[str, Tensor] = field(default_factory=dict)
    _normalised: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def normalised(self, norm: InputNorm) -> Tensor:
        """`x` as `norm` has it; what depends on `x` alone is computed once for all dictionaries that see this batch."""
        if norm.kind == "scalar":
            return norm(self.x)[0]
        if norm.kind not in self._normalised:
            self._normalised[norm.kind] = norm(self.x)[0]
        return self._normalised[norm.kind]


class Shift(NamedTuple):
    """What normalisation took away: `x = scale * x_normalised + offset`; both broadcast against `[B, d]`."""

    offset: Tensor
    scale: Tensor


class InputNorm(nn.Module):
    """Normalisation of activations, as a part of every dictionary, so that it travels with the weights.

    token_std     per token, subtract the mean over d and divide by (the unbiased standard deviation over d + 1e-5):
                  `input_unit_norm` of the BatchTopK authors' code; squared norms are then about d
    token_center  per token, subtract the mean over d (what centring the weights that write to the residual stream does)
    scalar        one constant for all tokens, measured on the first activations so that E|x|^2 = d; a buffer
    none          activations as they are
    layer_norm    token_std undone without the 1e-5, as SAELens does; codes are the same
    token_norm    per token, scaled to the norm sqrt(d) (SAELens: constant_norm_rescale)
    """

    scale: Tensor

    def __init__(self, kind: Normalisation = "token_std") -> None:
        super().__init__()
        if kind not in get_args(Normalisation):
            raise ValueError(f"input_norm: {kind!r} is not one of {', '.join(get_args(Normalisation))}.")
        self.kind = kind
        self.register_buffer("scale", torch.ones(()))

    def fit(self, x: Tensor) -> None:
        """Measure what `scalar` needs on activations `[N, d]`; nothing for the other kinds."""
        if self.kind == "scalar":
            self.scale.copy_(x.float().square().sum(-1).mean().sqrt() / math.sqrt(x.shape[-1]))

    def forward(self, x: Tensor) -> tuple[Tensor, Shift]:
        """`[..., d]` -> the same normalised, in fp32, and what `undo` needs."""
        x = x.float()
        zero, one = x.new_zeros(()), x.new_ones(())
        if self.kind == "none":
            return x, Shift(zero, one)
        if self.kind == "scalar":
            return x / self.scale, Shift(zero, self.scale)
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
