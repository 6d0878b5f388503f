"""The mean square of a reconstruction's error.

Shapes: B rows in the batch, d = d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core import distributed


def mse(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean of (x - x_hat)^2 over rows and coordinates: the reconstruction loss of the BatchTopK authors' code."""
    return _MeanSquare.apply(x_hat - x)


def normalised_mse(x: Tensor, x_hat: Tensor) -> Tensor:
    """`mse(x, x_hat)` over that of predicting the mean row of the global batch. The divisor has no gradient."""
    x = x.detach()
    centre = distributed.mean(x.mean(0))
    return mse(x, x_hat) / distributed.mean(mse(x, centre.expand_as(x))).clamp(min=1e-12)


class _MeanSquare(torch.autograd.Function):
    """One pass each way, where `mse_loss` takes three on a CPU."""

    @staticmethod
    def forward(ctx: Any, e: Tensor) -> Tensor:
        ctx.save_for_backward(e)
        flat = e.flatten()
        return torch.dot(flat, flat) / flat.numel()

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor) -> Tensor:
        (e,) = ctx.saved_tensors
        return e * (2 / e.numel() * d_mean)
