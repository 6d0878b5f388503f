"""The bare step is Adam's own, in its numbers and in its state."""

from __future__ import annotations

import pytest
import torch

from core.stacked.adam import stepper


def adam_of(seed: int) -> torch.optim.Adam:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3, 5, 7), (4,))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    frozen = torch.nn.Parameter(torch.ones(2))  # without a gradient: stays where it is
    return torch.optim.Adam([*parameters, frozen], lr=3e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_bare_step_is_adams_own_also_where_it_goes_on_from_a_state(seed: int):
    bare, own = adam_of(seed), adam_of(seed)
    generator = torch.Generator().manual_seed(seed + 10)
    for part in range(3):
        update = stepper(bare)
        for _ in range(4):
            for p, q in zip(bare.param_groups[0]["params"], own.param_groups[0]["params"], strict=True):
                if p.grad is not None:
                    p.grad.normal_(generator=generator)
                    q.grad.copy_(p.grad)
            own.step()
            (update if part < 2 else bare.step)()
        for p, q in zip(bare.param_groups[0]["params"], own.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(bare.state[p][name], own.state[q][name]) for name in own.state[q])
    assert torch.equal(bare.param_groups[0]["params"][2], torch.ones(2))


def test_what_it_does_not_cover_is_refused():
    for settings in ({"fused": False}, {"fused": True, "amsgrad": True}):
        with pytest.raises(ValueError, match="fused"):
            stepper(torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], **settings))
