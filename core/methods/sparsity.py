"""Activation functions and penalties that decide which latents are active.

Shapes: B rows in the batch, d = d_model, m = dict_size. Symbols of the JumpReLU paper (Rajamanoharan et al. 2024): z
pre-activations, theta thresholds (held as log theta, so that they stay positive), epsilon bandwidth of the kernel
K(u) = 1[|u| < 1/2], H the Heaviside step.

The threshold's derivative is zero or infinite; the paper puts a kernel estimate in its place. Two versions:
  correct    d f / d theta = - theta / epsilon K((z - theta) / epsilon), d H / d theta = - 1 / epsilon K(...), both
             times d theta / d log theta = theta
  r1_compat  the BatchTopK authors' code: the derivative with respect to theta is handed to log theta (the factor theta
             is missing), z is rectified first, and the step of the L0 term is taken of f, which is zero below theta, so
             only the upper half of the kernel's window gives a gradient (unless the window reaches 0)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.kernels.codes import Codes, DenseCodes, SparseCodes

STE = Literal["correct", "r1_compat"]


def jumprelu(pre: Codes, log_threshold: Tensor, bandwidth: float, ste: STE) -> Codes:
    """f = z H(z - theta), differentiable in z and, by the kernel estimate, in log theta `[m]`.

    pre holds z `[B, m]`: all of it, or its entries above `window_floor` alone (then f is sparse, too).
    """
    z, cols = pre.values, _columns(pre)
    f = _JumpReLU.apply(z.relu() if ste == "r1_compat" else z, log_threshold, cols, bandwidth, ste)
    return SparseCodes.on(pre.support, f, z) if isinstance(pre, SparseCodes) else DenseCodes(f, z)


def l0_penalty(codes: Codes, log_threshold: Tensor, bandwidth: float, ste: STE) -> Tensor:
    """Mean over rows of sum_i H(z_i - theta_i) for codes made by `jumprelu`, with a gradient for log theta only."""
    assert codes.pre is not None
    z = codes.values if ste == "r1_compat" else codes.pre
    return _MeanL0.apply(z, log_threshold, _columns(codes), codes.shape[0], bandwidth, ste)


def window_floor(theta: Tensor, bandwidth: float) -> Tensor:
    """`[m]`: entries z at or below it give neither a code nor a gradient for the threshold, theta `[m]`.

    With `r1_compat` that holds only while it is not negative: there a rectified z = 0 can lie in the window.
    """
    return theta - bandwidth / 2


def l1_penalty(codes: Codes) -> Tensor:
    """Mean over rows of the sum of activations >= 0."""
    return codes.values.sum() / codes.shape[0]


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, log_threshold: Tensor, cols: Tensor | None, bandwidth: float, ste: STE) -> Tensor:
        theta = _at(log_threshold.exp(), cols)
        ctx.save_for_backward(z, log_threshold, cols)
        ctx.bandwidth, ctx.ste = bandwidth, ste
        return torch.where(z <= theta, 0, z)  # a NaN stays one

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_f: Tensor) -> tuple[Tensor | None, ...]:
        z, log_threshold, cols = ctx.saved_tensors
        theta = log_threshold.exp()
        here = _at(theta, cols)
        within = _per_latent(torch.where(_kernel(z, here, ctx.bandwidth), d_f, 0), theta, cols)
        d_theta = -theta / ctx.bandwidth * within
        return torch.where(z <= here, 0, d_f), d_theta * _chain(theta, ctx.ste), None, None, None


class _MeanL0(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, log_threshold: Tensor, cols: Tensor | None, n_rows: int, bandwidth: float, ste: STE
    ) -> Tensor:
        ctx.save_for_backward(z, log_threshold, cols)
        ctx.n_rows, ctx.bandwidth, ctx.ste = n_rows, bandwidth, ste
        return (z > _at(log_threshold.exp(), cols)).sum() / n_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor) -> tuple[Tensor | None, ...]:
        z, log_threshold, cols = ctx.saved_tensors
        theta = log_threshold.exp()
        inside = _kernel(z, _at(theta, cols), ctx.bandwidth).to(z.dtype)
        n_inside = _per_latent(inside, theta, cols)
        d_theta = -d_mean / ctx.n_rows / ctx.bandwidth * n_inside
        return None, d_theta * _chain(theta, ctx.ste), None, None, None, None


def _columns(codes: Codes) -> Tensor | None:
    """The latent of every entry of sparse codes; None where the codes are a matrix `[B, m]`."""
    return codes.cols if isinstance(codes, SparseCodes) else None


def _at(theta: Tensor, cols: Tensor | None) -> Tensor:
    """theta `[m]` so that it broadcasts against the codes' values."""
    return theta if cols is None else theta[cols]


def _per_latent(values: Tensor, like: Tensor, cols: Tensor | None) -> Tensor:
    """Sums over rows `[m]` of what belongs to the codes' values."""
    return values.sum(0) if cols is None else torch.zeros_like(like).index_add(0, cols, values)


def _kernel(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return (z - theta).abs() < bandwidth / 2


def _chain(theta: Tensor, ste: STE) -> Tensor:
    """d theta / d log theta, as the version has it."""
    return theta if ste == "correct" else torch.ones_like(theta)
