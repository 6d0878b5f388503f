"""Where b_dec starts: at zero, or in the middle of the first batch.

What is far from zero everywhere must be explained by every code as long as b_dec does not carry it. Until then the
latents along it win the selection in every row, and others starve. Adam moves b_dec by about the learning rate per
step, so a short run may never get there.

Shapes: N rows, d = d_model. `[N, d]` stands for `[N, n_models, d]` as well; each model then has a centre of its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BDecInit = Literal["zeros", "mean", "geometric_median"]


@torch.no_grad()
def centre(x: Tensor, kind: BDecInit) -> Tensor:
    """The start `[d]` of b_dec for a first batch of normalised activations `[N, d]`."""
    if kind == "mean":
        return x.mean(0)
    return geometric_median(x) if kind == "geometric_median" else torch.zeros_like(x[0])


@torch.no_grad()
def geometric_median(x: Tensor, n_iterations: int = 100) -> Tensor:
    """The point `[d]` whose distances to the rows of `[N, d]` have the smallest sum; approximate.

    Weiszfeld's iteration from the mean: the rows' average, weighted by one over their distance. Where a row lies at the
    point, its weight is infinite; it then holds the point with a force of 1 against the pull of the others (Vardi and
    Zhang 2000).
    """
    point = x.mean(0)
    tiny = torch.finfo(x.dtype).tiny
    for _ in range(n_iterations):
        away = x - point  # [N, d]
        distance = away.norm(dim=-1, keepdim=True)  # [N, 1]
        here = distance <= 1e-6 * distance.mean(0)
        weight = torch.where(here, 0, 1 / distance)
        pull = (weight * away).sum(0)  # [d]
        held = here.sum(0) / pull.norm(dim=-1, keepdim=True).clamp(min=tiny)
        point = point + (1 - held).clamp(min=0) * pull / weight.sum(0).clamp(min=tiny)
    return point
