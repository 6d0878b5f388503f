"""Adam as every method uses it: fused, clipped by the norm of the whole gradient, scheduled from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ClippingAdam(torch.optim.Adam):
    """Fused Adam (eps 1e-8, no weight decay).

    Clipping costs no pass over the gradients: the fused kernel divides them by `grad_scale` while it reads them, and
    changes nothing where `found_inf` is 1, which `prepare` sets when the gradient is not finite.

    groups    parameter groups; one with an `lr` of its own keeps it, scaled by the schedule
    max_norm  largest norm of the whole gradient
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: Sequence[float], max_norm: float) -> None:
        groups = [{**group, "base_lr": group.get("lr", lr)} for group in groups]
        super().__init__(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)
        self.max_norm = max_norm

    @torch.no_grad()
    def prepare(self, lr_factor: float) -> Tensor:
        """To be called before `step`: sets learning rates and clipping, returns the norm of the gradient, a scalar."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.grad_scale = (norm / self.max_norm).clamp(min=1)
        self.found_inf = (~norm.isfinite()).float()
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        return norm
