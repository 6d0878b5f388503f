"""What the runs of a stack minimise. An objective holds the data, and the dictionary if there is one.

`gradients(coder, step)` fills the `.grad` of coder and dictionary. `loss()` then gives each run's loss `[R]`; few steps
need it. The loss of a stack is the sum of its runs' losses, so that no run's gradient depends on another.

Shapes: R runs, n samples, M observed dimensions, N codes; D `[R, N, M]`, atoms are rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.seeding import generator
from core.stacked.coders import Buffers, Coder


class Objective(nn.Module, ABC):
    """The loss of a stack."""

    _at: tuple[Tensor, Tensor]  # what `loss` is computed from

    def __init__(self) -> None:
        super().__init__()
        self._buffers_of = Buffers()

    @abstractmethod
    def gradients(self, coder: Coder, step: int) -> None:
        """Write the gradients into the parameters' `.grad`."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Each run's loss `[R]` at the last gradients; valid until coder or objective is called again."""


class Reconstruction(Objective):
    """||X - S D - b_dec||^2 / (n M) + l1 ||S||_1 / (n N), all samples in every step (O'Neill et al. 2025, sec. 4).

    X          `[R, n, M]`
    l1         `[R]`
    D          `[R, N, M]` to start from, or the true one
    learn_D    whether the dictionary is learned
    normalise  scale the atoms of a learned one to unit norm before every forward pass, as the authors do, without
               projecting the gradient
    bias       learn a b_dec `[R, 1, M]`, from zero
    """

    X: Tensor
    l1: Tensor
    l1_of_a_code: Tensor

    def __init__(
        self, X: Tensor, l1: Tensor, D: Tensor, learn_D: bool, normalise: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.learn_D, self.normalise = learn_D, learn_D and normalise
        self.register_buffer("X", X.contiguous(), persistent=False)
        self.register_buffer("l1", l1.view(-1, 1, 1), persistent=False)
        self.register_buffer("l1_of_a_code", self.l1 / (X.shape[1] * D.shape[1]), persistent=False)
        self.D = nn.Parameter(D.clone(), requires_grad=learn_D)
        if learn_D:
            self.D.grad = torch.zeros_like(self.D)
        self.b_dec = None
        if bias:
            self.b_dec = nn.Parameter(X.new_zeros(len(X), 1, X.shape[-1]))
            self.b_dec.grad = torch.zeros_like(self.b_dec)

    def gradients(self, coder: Coder, step: int) -> None:
        (R, n, M), N = self.X.shape, self.D.shape[1]
        if self.normalise:
            normalise_(self.D)
        S = coder(self.X)
        E = self._buffers_of("E", self.X, R, n, M)
        torch.bmm(S, self.D, out=E).sub_(self.X)  # X_hat - X; faster than baddbmm for few dimensions
        if self.b_dec is not None:
            E += self.b_dec
        self._at = E, S
        if self.learn_D:
            assert self.D.grad is not None
            torch.baddbmm(self.D.grad, S.mT, E, beta=0, alpha=2 / (n * M), out=self.D.grad)
        if self.b_dec is not None:
            torch.sum(E, 1, keepdim=True, out=self.b_dec.grad).mul_(2 / (n * M))
        dS = self._buffers_of("dS", S, R, n, N)
        torch.baddbmm(self.l1_of_a_code, E, self.D.mT, alpha=2 / (n * M), out=dS)
        coder.backward(dS)

    def loss(self) -> Tensor:
        E, S = self._at
        return E.square().mean((1, 2)) + self.l1.view(-1) * S.mean((1, 2))

    def explained_by_codes(self, X: Tensor) -> Tensor:
        """X - b_dec."""
        return X if self.b_dec is None else X - self.b_dec


Batches = Callable[[int], tuple[Tensor, Tensor]]  # step -> X [R, n, M], S [R, n, N] or [1, n, N]


class KnownCodes(Objective):
    """The codes themselves are the target (O'Neill et al. 2025, "known sparse codes").

    batches  step -> X `[R, n, M]` and the true codes `[R, n, N]`, or `[1, n, N]` for all runs
    kind     cosine   -(1/N) sum_j <S_j, S_hat_j> / (|S_j| |S_hat_j|) over the samples of unit j: the authors' objective
             mse      ||S - S_hat||^2 / (n N); it leaves more units dead
    """

    def __init__(self, batches: Batches, kind: Literal["cosine", "mse"] = "cosine") -> None:
        super().__init__()
        if kind not in ("cosine", "mse"):
            raise UserError(f"objective={kind!r} is neither cosine nor mse.")
        self.batches, self.kind = batches, kind

    def gradients(self, coder: Coder, step: int) -> None:
        X, S = self.batches(step)
        S_hat = coder(X)
        dS = self._buffers_of("dS", S_hat, *S_hat.shape)
        if self.kind == "cosine":
            self._cosine(S, S_hat, dS)
        else:
            self._at = S, S_hat
            torch.sub(S_hat, S, out=dS).mul_(2 / S_hat[0].numel())
        coder.backward(dS)

    def loss(self) -> Tensor:
        a, b = self._at
        return -(a * b).sum((1, 2)) if self.kind == "cosine" else (b - a).square().mean((1, 2))

    def _cosine(self, S: Tensor, S_hat: Tensor, dS: Tensor) -> None:
        """A unit that is silent on the whole batch, or should be, has cosine 0 and no gradient."""
        work = self._buffers_of("work", S_hat, *S_hat.shape)
        inner = torch.mul(S, S_hat, out=work).sum(1, keepdim=True)  # [R, 1, N]
        square = torch.mul(S_hat, S_hat, out=dS).sum(1, keepdim=True)
        norm = torch.linalg.vector_norm(S, dim=1, keepdim=True) * square.sqrt()
        scale = torch.where(norm > 0, 1 / (norm * S_hat.shape[-1]), 0)
        pull = torch.where(norm > 0, inner * scale / square, 0)
        torch.mul(S_hat, pull, out=dS)
        torch.mul(S, scale, out=work)
        dS.sub_(work)
        self._at = inner, scale


SparseBatches = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # step -> X [R, n, M], indices [n, K], values [n, K]


class KnownSparseCodes(Objective):
    """`KnownCodes` with its cosine, for true codes given as the K active ones of each sample.

    batches  step -> X `[R, n, M]`, indices `[n, K]` int64, all different within a row, and values `[n, K]`; the codes
             are those of all runs
    """

    def __init__(self, batches: SparseBatches) -> None:
        super().__init__()
        self.batches = batches

    def gradients(self, coder: Coder, step: int) -> None:
        X, indices, values = self.batches(step)
        S_hat = coder(X)
        (R, _, N), codes, at = S_hat.shape, indices.flatten(), indices.expand(len(S_hat), -1, -1)
        dS = self._buffers_of("dS", S_hat, *S_hat.shape)
        inner = S_hat.new_zeros(R, N).index_add_(1, codes, (S_hat.gather(2, at) * values).flatten(1))
        square = torch.mul(S_hat, S_hat, out=dS).sum(1)  # [R, N]
        norm = (S_hat.new_zeros(N).index_add_(0, codes, values.square().flatten()) * square).sqrt()
        scale = torch.where(norm > 0, 1 / (norm * N), 0)
        torch.mul(S_hat, torch.where(norm > 0, inner * scale / square, 0)[:, None], out=dS)
        dS.scatter_add_(2, at, scale[:, indices] * -values)
        self._at = inner, scale
        coder.backward(dS)

    def loss(self) -> Tensor:
        inner, scale = self._at
        return -(inner * scale).sum(1)


def random_dictionary(seeds: Sequence[int], N: int, M: int) -> Tensor:
    """`[R, N, M]`, standard normal, not normalised."""
    return torch.stack([torch.randn(N, M, generator=generator(seed, "init", "D")) for seed in seeds])


def normalise_(D: Tensor) -> Tensor:
    """Atoms to unit norm, in place."""
    with torch.no_grad():
        return D.div_(torch.linalg.vector_norm(D, dim=-1, keepdim=True))
