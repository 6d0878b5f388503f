"""How samples get their codes, for many runs as one tensor program, with gradients written out.

Problems of this size cost more to dispatch than to compute, so runs (seeds, penalties, data sets) are stacked along a
first axis. Runs do not interact: each gives the numbers that it would give alone. Every coder has `forward(X) -> S`,
which keeps what `backward(dS)` needs to fill the parameters' `.grad`. Both use buffers that the next call overwrites.

Shapes: R runs, n samples, M observed dimensions, N codes, h hidden units.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from core.seeding import generator


class Buffers:
    """Tensors by name that are overwritten again and again; allocated when the shape changes."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        if name not in self._kept or self._kept[name].shape != shape:
            self._kept[name] = like.new_empty(shape)
        return self._kept[name]


class Coder(nn.Module, ABC):
    """Nonnegative codes of R runs, each with its own parameters along their first axis.

    k  `[R]`, the number of largest codes of a sample that are kept; None keeps all. Runs may have different k.
    """

    k: Tensor | None

    def __init__(self, k: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("k", k, persistent=False)
        self._buffers_of = Buffers()

    @abstractmethod
    def forward(self, X: Tensor) -> Tensor:
        """X `[R, n, M]` -> S `[R, n, N]`, valid until the next call."""

    @abstractmethod
    def backward(self, dS: Tensor) -> None:
        """Fill `.grad` from the gradient `[R, n, N]` with respect to the last S. Overwrites `dS`."""

    def _kept(self, S: Tensor) -> Tensor:
        return S if self.k is None else keep_largest_(S, self.k, self._buffers_of("kept", S, *S.shape))


class LinearCoder(Coder):
    """S = ReLU(X W_enc + b_enc): the encoder of a sparse autoencoder (O'Neill et al. 2025, sec. 3).

    seeds  one for each run; weights and biases start as `torch.nn.Linear`'s do, U(-1/sqrt(M), 1/sqrt(M))
    """

    def __init__(self, seeds: Sequence[int], M: int, N: int, bias: bool = False, k: Tensor | None = None) -> None:
        super().__init__(k)
        self.W_enc, self.b_enc = linear(seeds, M, N, bias, "W_enc")

    def forward(self, X: Tensor) -> Tensor:
        self.X = X
        self.S = self._kept(relu_linear(X, self.W_enc, self.b_enc, self._buffers_of, "S"))
        return self.S

    def backward(self, dS: Tensor) -> None:
        RELU.back(dS, self.S, dS)
        linear_gradients(self.X, dS, self.W_enc, self.b_enc)


class MLPCoder(Coder):
    """S = ReLU(ReLU(X W_1 + b_1) W_2 + b_2): the more expressive encoder of O'Neill et al. 2025, sec. 3.

    seeds  one for each run; layers start as `torch.nn.Linear`'s do
    width  h
    """

    def __init__(
        self, seeds: Sequence[int], M: int, N: int, width: int, bias: bool = False, k: Tensor | None = None
    ) -> None:
        super().__init__(k)
        self.W_1, self.b_1 = linear(seeds, M, width, bias, "W_1")
        self.W_2, self.b_2 = linear(seeds, width, N, bias, "W_2")

    def forward(self, X: Tensor) -> Tensor:
        self.X = X
        self.H = relu_linear(X, self.W_1, self.b_1, self._buffers_of, "H")  # [R, n, h]
        self.S = self._kept(relu_linear(self.H, self.W_2, self.b_2, self._buffers_of, "S"))
        return self.S

    def backward(self, dS: Tensor) -> None:
        RELU.back(dS, self.S, dS)
        linear_gradients(self.H, dS, self.W_2, self.b_2)
        dH = self._buffers_of("dH", dS, *self.H.shape)
        torch.bmm(dS, self.W_2.mT, out=dH)
        RELU.back(dH, self.H, dH)
        linear_gradients(self.X, dH, self.W_1, self.b_1)


@dataclass(frozen=True)
class Link:
    """Maps free parameters to codes, and the gradient with respect to codes back to the parameters."""

    codes: Callable[[Tensor, Tensor], Tensor]  # L, out
    back: Callable[[Tensor, Tensor, Tensor], Tensor]  # dS, S, out, which may be dS


EXP = Link(lambda L, out: torch.exp(L, out=out), lambda dS, S, out: torch.mul(dS, S, out=out))
RELU = Link(
    lambda L, out: torch.clamp(L, min=0, out=out),
    lambda dS, S, out: torch.ops.aten.threshold_backward.grad_input(dS, S, 0, grad_input=out),
)


class FreeCodes(Coder):
    """Sparse coding: the codes of the training samples are parameters, learned with the dictionary.

    New samples have no code; `core.stacked.inference` optimises one for them.
    """

    def __init__(self, L: Tensor, link: Link, k: Tensor | None) -> None:
        super().__init__(k)
        self.L, self.link = _parameter(L), link

    def forward(self, X: Tensor) -> Tensor:
        self.S = self._kept(self.link.codes(self.L, self._buffers_of("S", self.L, *self.L.shape)))
        return self.S

    def backward(self, dS: Tensor) -> None:
        assert self.L.grad is not None
        self.link.back(dS, self.S, self.L.grad)


class LogCodes(FreeCodes):
    """S = exp(L): the sparse coding of O'Neill et al.

    seeds  one for each run; only their number is used, and M is not used
    init   the start of L. The authors' -10 costs the first thousands of steps: Adam moves L by at most about its
           learning rate per step.
    """

    def __init__(
        self, seeds: Sequence[int], M: int, N: int, n: int, init: float = -10.0, k: Tensor | None = None
    ) -> None:
        super().__init__(torch.full((len(seeds), n, N), init), EXP, k)


class ReluCodes(FreeCodes):
    """S = ReLU(L), L standard normal at the start: the other form in the authors' scripts.

    A code of zero has no gradient: whatever starts below zero stays there.
    """

    def __init__(self, seeds: Sequence[int], M: int, N: int, n: int, k: Tensor | None = None) -> None:
        super().__init__(normal_codes(seeds, n, N, "codes"), RELU, k)


def normal_codes(seeds: Sequence[int], n: int, N: int, name: str) -> Tensor:
    """Standard normal `[R, n, N]`, from each run's generator of that name."""
    return torch.stack([torch.randn(n, N, generator=generator(seed, "init", name)) for seed in seeds])


def linear(seeds: Sequence[int], fan_in: int, fan_out: int, bias: bool, name: str) -> tuple[Tensor, Tensor | None]:
    """Weights `[R, fan_in, fan_out]` and biases `[R, 1, fan_out]` of one layer."""
    bound = 1 / math.sqrt(fan_in)
    drawn = [
        torch.empty(fan_in + 1, fan_out).uniform_(-bound, bound, generator=generator(s, "init", name)) for s in seeds
    ]
    both = torch.stack(drawn)
    return _parameter(both[:, 1:].contiguous()), _parameter(both[:, :1].contiguous()) if bias else None


def _parameter(start: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(start)
    parameter.grad = torch.zeros_like(start)
    return parameter


def relu_linear(X: Tensor, W: Tensor, b: Tensor | None, buffers: Buffers, name: str) -> Tensor:
    """ReLU(X W + b) `[R, n, out]` in the buffer of that name."""
    Z = buffers(name, X, len(W), X.shape[-2], W.shape[-1])
    if b is None:
        torch.bmm(X, W, out=Z)
    else:
        torch.baddbmm(b, X, W, out=Z)
    return RELU.codes(Z, Z)


def linear_gradients(X: Tensor, dZ: Tensor, W: Tensor, b: Tensor | None) -> None:
    """Gradients of Z = X W + b into `W.grad` and `b.grad`."""
    torch.bmm(X.mT, dZ, out=W.grad)
    if b is not None:
        torch.sum(dZ, 1, keepdim=True, out=b.grad)


def keep_largest_(S: Tensor, k: Tensor, work: Tensor) -> Tensor:
    """Zero all but the k largest of each sample, in place: S `[R, n, N]`, `k` `[R]`. Ties are all kept.

    work  like S, overwritten by a mask of numbers: multiplying by it is 8 times as fast as `masked_fill_`
    """
    N = S.shape[-1]
    on_cpu = S.device.type == "cpu"  # where NumPy sorts short rows 3 to 6 times as fast as torch finds their top k
    ordered = torch.from_numpy(np.sort(S.numpy(), axis=-1)) if on_cpu else S.sort(dim=-1).values
    smallest = ordered.gather(-1, (N - k).view(-1, 1, 1).expand(-1, S.shape[1], 1))  # [R, n, 1]
    return S.mul_(torch.ge(S, smallest, out=work))
