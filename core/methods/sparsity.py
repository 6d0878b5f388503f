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

STE = Literal["correct", "r1_compat"]


def mean_square(x: Tensor) -> Tensor:
    """Mean over rows and coordinates: the reconstruction loss of the BatchTopK authors' code."""
    return x.square().mean()


def jumprelu(z: Tensor, log_threshold: Tensor, bandwidth: float, ste: STE) -> Tensor:
    """f = z H(z - theta) `[B, m]`, differentiable in z and, by the kernel estimate, in log theta `[m]`."""
    return _JumpReLU.apply(z.relu() if ste == "r1_compat" else z, log_threshold, bandwidth, ste)


def l0_penalty(codes: Tensor, z: Tensor, log_threshold: Tensor, bandwidth: float, ste: STE) -> Tensor:
    """Mean over rows of sum_i H(z_i - theta_i), with a gradient for log theta only."""
    return _MeanL0.apply(codes if ste == "r1_compat" else z, log_threshold, bandwidth, ste)


def l1_penalty(codes: Tensor) -> Tensor:
    """Mean over rows of the sum of activations >= 0."""
    return codes.sum(1).mean()


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, log_threshold: Tensor, bandwidth: float, ste: STE) -> Tensor:
        ctx.save_for_backward(z, log_threshold)
        ctx.bandwidth, ctx.ste = bandwidth, ste
        return torch.where(z <= log_threshold.exp(), 0, z)  # a NaN stays one

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_f: Tensor) -> tuple[Tensor | None, ...]:
        z, log_threshold = ctx.saved_tensors
        theta = log_threshold.exp()
        d_theta = -theta / ctx.bandwidth * torch.where(_kernel(z, theta, ctx.bandwidth), d_f, 0).sum(0)
        return torch.where(z <= theta, 0, d_f), d_theta * _chain(theta, ctx.ste), None, None


class _MeanL0(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, log_threshold: Tensor, bandwidth: float, ste: STE) -> Tensor:
        ctx.save_for_backward(z, log_threshold)
        ctx.bandwidth, ctx.ste = bandwidth, ste
        return (z > log_threshold.exp()).sum() / z.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor) -> tuple[Tensor | None, ...]:
        z, log_threshold = ctx.saved_tensors
        theta = log_threshold.exp()
        within = torch.where(_kernel(z, theta, ctx.bandwidth), d_mean / z.shape[0], 0).sum(0)
        return None, -within / ctx.bandwidth * _chain(theta, ctx.ste), None, None


def _kernel(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return (z - theta).abs() < bandwidth / 2


def _chain(theta: Tensor, ste: STE) -> Tensor:
    """d theta / d log theta, as the version has it."""
    return theta if ste == "correct" else torch.ones_like(theta)
