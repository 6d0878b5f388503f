"""Adam's step without torch's overhead, for small parameters that take a hundred thousand steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def stepper(adam: torch.optim.Adam) -> Callable[[], None]:
    """`adam.step` for a fused Adam with one group of parameters on one device: same numbers, same state. torch's hooks,
    checks and grouping cost 100 us a step, as much as the arithmetic of 50,000 numbers.

    Parameters, gradients, state and settings must remain the same objects. It calls private functions of torch 2.13.
    Raises ValueError for an Adam that is not fused, or with amsgrad.
    """
    (group,) = adam.param_groups
    if not group["fused"] or group["amsgrad"]:
        raise ValueError("The bare step needs an Adam with fused=True and amsgrad=False.")
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
