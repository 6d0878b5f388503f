"""Adam's step without what torch does around it, for small parameters that are stepped a hundred thousand times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def stepper(adam: torch.optim.Adam) -> Callable[[], None]:
    """`adam.step` for a fused Adam with one group of parameters on one device: same numbers, same state. Hooks, checks
    and grouping around the arithmetic cost 100 us a step, as much as 50,000 numbers do.

    Parameters, gradients and state must stay the tensors that they are now, and the settings too. It calls what
    torch 2.13 keeps private. Raises ValueError for an Adam that is not fused, or with amsgrad.
    """
    (group,) = adam.param_groups
    if not group["fused"] or group["amsgrad"]:
        raise ValueError("The bare step is that of an Adam with fused=True, amsgrad=False.")
    params: list[Tensor] = []
    grads: list[Tensor] = []
    exp_avgs: list[Tensor] = []
    exp_avg_sqs: list[Tensor] = []
    steps: list[Tensor] = []
    adam._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
    beta1, beta2 = group["betas"]
    ones = [torch.ones_like(step) for step in steps]

    def step() -> None:
        torch._foreach_add_(steps, ones)
        torch._fused_adam_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )

    return step
