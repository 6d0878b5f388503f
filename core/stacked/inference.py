"""Codes of given samples under given dictionaries, for a stack of runs at once; gradients are written out by hand.

Shapes: R runs, n samples, N atoms, M observed dimensions. X [R, n, M], D [R, N, M] with atoms as rows, codes S >= 0
[R, n, N]. One data set [n, M] or one dictionary [N, M] serves all runs; if both have no run axis, the codes have none
either. `l1` is a number, or one for each run [R]. Codes have the dtype of X. Inside, the samples are the last axis:
with few atoms, products are three times as fast that way.

All penalised solvers minimise the objective of O'Neill et al. 2025 (their code's scaling), for each run

    L(S) = ||X - S D||^2 / (n M) + l1 ||S||_1 / (n N),

which is per sample 1/2 ||x - s D||^2 + mu ||s||_1 with mu = l1 M / (2 N). Runs do not interact: a stack gives each run
what it would get alone. A bad shape or number is a UserError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from core.errors import UserError
from core.stacked.adam import stepper
from core.stacked.coders import EXP, RELU, Link, normal_codes

Callback = Callable[[int, Tensor], None]
PerRun = float | Sequence[float] | Tensor

CHECK_EVERY = 25  # iterations between two checks of convergence or of finite codes
CHUNK_BYTES = 256 * 2**20  # of one [rows, N] buffer in `rozell_lca`


@torch.no_grad()
def log_codes(
    X: Tensor,
    D: Tensor,
    l1: PerRun,
    iterations: int,
    lr: float,
    init: float | Tensor = -10.0,
    *,
    floor: float = 1e-2,
    mask_k: int | None = None,
    callback: Callback | None = None,
    callback_at: Collection[int] = (),
) -> Tensor:
    """Full-batch Adam (0.9, 0.999, 1e-8) on log-codes, S = exp(L): sparse coding's inference and the paper's ITO.

    init         L at the start (the authors' -10), or codes S0 >= 0, then L = log(max(S0, floor))
    floor        for such codes. The paper's text means 1e-10, with which a code of zero hardly moves
    mask_k       keep the k largest codes of a sample and zero the others, in every iteration and in the result
    callback     called with (iteration, S) at the iterations in `callback_at`, counted in updates; 0 is the start.
                 S is a buffer that the next iteration overwrites
    """
    X, D, unbatched = as_stack(X, D)
    (R, n, _), N = X.shape, D.shape[1]
    L = _start(init, floor, (R, n, N), X)
    return _adam_on_codes(X, D, L, l1, iterations, lr, mask_k, EXP, unbatched, callback, callback_at)


@torch.no_grad()
def relu_codes(
    X: Tensor, D: Tensor, l1: PerRun, iterations: int, lr: float, seeds: Sequence[int], *, mask_k: int | None = None
) -> Tensor:
    """`log_codes` with S = ReLU(L), L standard normal at the start: the other form in the authors' scripts.

    A code of zero has no gradient, so half of them stay where they were drawn.

    seeds  of the starts, one for each run
    """
    X, D, unbatched = as_stack(X, D)
    if len(seeds) != len(X):
        raise UserError(f"{len(seeds)} seeds for {len(X)} runs: give one for each.")
    L = normal_codes(seeds, X.shape[1], D.shape[1], "test_codes").to(X).mT.contiguous()
    return _adam_on_codes(X, D, L, l1, iterations, lr, mask_k, RELU, unbatched)


def _adam_on_codes(
    X: Tensor,
    D: Tensor,
    L: Tensor,
    l1: PerRun,
    iterations: int,
    lr: float,
    mask_k: int | None,
    link: Link,
    unbatched: bool,
    callback: Callback | None = None,
    callback_at: Collection[int] = (),
) -> Tensor:
    """Codes [R, n, N] after the iterations on L [R, N, n], which is overwritten."""
    (R, n, M), N = X.shape, D.shape[1]
    _check(iterations, lr=lr)
    _check_k(mask_k, N)
    penalty = _per_run(l1, X, "l1").view(R, 1, 1).div(n * N).expand(R, N, n)
    X_t, D_t = X.mT.contiguous(), D.mT.contiguous()
    S, residual, L.grad = torch.empty_like(L), torch.empty_like(X_t), torch.empty_like(L)
    codes = S.mT[0] if unbatched else S.mT
    update = stepper(torch.optim.Adam([L], lr=lr, fused=True))
    for iteration in range(iterations + 1):
        link.codes(L, S)
        if mask_k is not None:
            hard_top_k(S, mask_k, dim=1, out=S)
        if iteration == iterations or iteration % CHECK_EVERY == 0:
            _check_finite(S, f"free codes at iteration {iteration}: lower lr, now {lr:g}")
        if callback is not None and iteration in callback_at:
            callback(iteration, codes)
        if iteration < iterations:
            torch.baddbmm(X_t, D_t, S, beta=-1, out=residual)
            torch.baddbmm(penalty, D, residual, alpha=2 / (n * M), out=L.grad)
            link.back(L.grad, S, L.grad)
            update()
    return codes.contiguous()


@torch.no_grad()
def fista(X: Tensor, D: Tensor, l1: PerRun, iterations: int = 3000, tolerance: float = 1e-5) -> Tensor:
    """Nonnegative LASSO by accelerated proximal gradients (Beck and Teboulle 2009), momentum restarts for each sample
    when it points uphill (O'Donoghue and Candes 2015).

    The step is 1 / lambda_max(D D^T) of a run. A run ends when no sample violates the optimality conditions of
    1/2 ||x - s D||^2 + mu ||s||_1 by more than `tolerance` (in units of x), or after `iterations`; `kkt_violation`
    shows which. fp32 reaches about 1e-6 times the size of x; pass fp64 for more.
    """
    X, D, unbatched = as_stack(X, D)
    (R, n, M), N = X.shape, D.shape[1]
    _check(iterations, tolerance=tolerance)
    step = 1 / _largest_eigenvalue(D)
    threshold = step * _per_run(l1, X, "l1").view(R, 1, 1) * (M / (2 * N))
    S, running = X.new_empty(R, N, n), torch.arange(R, device=X.device)
    state = _Fista(X.mT.contiguous(), D.mT.contiguous(), D * step, threshold)
    for iteration in range(1, iterations + 1):
        state.iterate()
        if iteration == iterations:
            S[running] = state.S
        elif iteration % CHECK_EVERY == 0:
            unfinished = (state.gap.abs().amax((1, 2)) / step[running, 0, 0]) > tolerance
            if not unfinished.all():
                S[running[~unfinished]] = state.S[~unfinished]
                running, state = running[unfinished], state.of(unfinished)
            if not len(running):
                break
    _check_finite(S, "fista's codes: check the size of X and D")
    codes = S.mT.contiguous()
    return codes[0] if unbatched else codes


class _Fista:
    """The unfinished runs: X [r, M, n], D_t [r, M, N], D_step = step D [r, N, M], threshold = step mu [r, 1, 1]."""

    def __init__(self, X: Tensor, D_t: Tensor, D_step: Tensor, threshold: Tensor) -> None:
        self.given = X, D_t, D_step, threshold
        S = X.new_zeros(len(X), D_step.shape[1], X.shape[2])  # [r, N, n]
        self.S, self.Y, self.t = S, S.clone(), X.new_ones(len(X), 1, X.shape[2])
        self._allocate()

    def _allocate(self) -> None:
        self.new, self.delta, self.gap, self.product = (torch.empty_like(self.S) for _ in range(4))
        self.residual = torch.empty_like(self.given[0])

    def of(self, runs: Tensor) -> _Fista:
        chosen = _Fista.__new__(_Fista)
        X, D_t, D_step, threshold = self.given
        chosen.given = X[runs], D_t[runs], D_step[runs], threshold[runs]
        chosen.S, chosen.Y, chosen.t = self.S[runs], self.Y[runs], self.t[runs]
        chosen._allocate()
        return chosen

    def iterate(self) -> None:
        """S becomes the proximal step from Y, `gap` = Y - S, and Y the next extrapolation."""
        X, D_t, D_step, threshold = self.given
        torch.baddbmm(X, D_t, self.Y, beta=-1, out=self.residual)
        torch.baddbmm(self.Y, D_step, self.residual, alpha=-1, out=self.new).sub_(threshold).clamp_(min=0)
        torch.sub(self.new, self.S, out=self.delta)
        torch.sub(self.Y, self.new, out=self.gap)
        uphill = torch.mul(self.gap, self.delta, out=self.product).sum(1, keepdim=True) > 0
        t = (self.t.square() * 4 + 1).sqrt_().add_(1).mul_(0.5)
        momentum = (self.t - 1).div_(t).masked_fill_(uphill, 0)
        self.t = t.masked_fill_(uphill, 1)
        torch.addcmul(self.new, momentum, self.delta, out=self.Y)
        self.S, self.new = self.new, self.S


@torch.no_grad()
def rozell_lca(
    X: Tensor, D: Tensor, l1: PerRun, iterations: int = 1000, tolerance: float = 1e-5, rate: float | None = None
) -> Tensor:
    """Locally competitive algorithm (Rozell et al. 2008), nonnegative, for the same objective.

        a = ReLU(u - mu),   u <- u + rate (D (x - a D) + a - u),   u = 0 at the start.

    Its fixed points are the solutions of the LASSO. O'Neill et al.'s rule, `core.methods.lca`, takes other steps.
    `rate` is the Euler step over the time constant; None takes 1 / lambda_max(D D^T), at most 1. Samples are solved in
    chunks, so that N = 16,896 atoms fit. A chunk ends when no u moves by more than `rate * tolerance`, or after
    `iterations`.
    """
    X, D, unbatched = as_stack(X, D)
    (R, n, M), N = X.shape, D.shape[1]
    _check(iterations, tolerance=tolerance)
    steps = 1 / _largest_eigenvalue(D).clamp(min=1) if rate is None else X.new_full((R, 1, 1), rate)
    mu = _per_run(l1, X, "l1").view(R, 1, 1) * (M / (2 * N))
    S = X.new_empty(R, n, N)
    rows = max(1, CHUNK_BYTES // (N * X.element_size()))
    for run in range(R):
        for begin in range(0, n, rows):
            part = slice(begin, begin + rows)
            S[run, part] = _lca_rows(X[run, part], D[run], mu[run], steps[run], iterations, tolerance)
    _check_finite(S, f"LCA's codes: lower rate, now {rate}")
    return S[0] if unbatched else S


def _lca_rows(x: Tensor, D: Tensor, mu: Tensor, rate: Tensor, iterations: int, tolerance: float) -> Tensor:
    u = x.new_zeros(len(x), len(D))
    a, du, residual = torch.zeros_like(u), torch.empty_like(u), torch.empty_like(x)
    for iteration in range(1, iterations + 1):
        torch.addmm(x, a, D, alpha=-1, out=residual)
        torch.addmm(a, residual, D.T, out=du).sub_(u)
        u.addcmul_(du, rate)
        torch.sub(u, mu, out=a).relu_()
        if iteration % CHECK_EVERY == 0 and not du.abs().max() > tolerance:
            break
    return a


def nnls(X: Tensor, D: Tensor) -> Tensor:
    """Nonnegative least squares, l1 = 0, by SciPy's active sets: exact, sample by sample, in fp64 on the CPU.

    If many codes fit a sample exactly (M < N), the result has at most M non-zeros.
    """
    X, D, unbatched = as_stack(X, D)
    solved = [
        np.stack([scipy.optimize.nnls(A, x)[0] for x in rows])
        for A, rows in zip(D.mT.double().cpu().numpy(), X.double().cpu().numpy(), strict=True)
    ]
    S = torch.from_numpy(np.stack(solved)).to(X)
    return S[0] if unbatched else S


def hard_top_k(S: Tensor, k: int, dim: int = -1, out: Tensor | None = None) -> Tensor:
    """S with all but its k largest entries along `dim` set to zero; `out` may be S itself."""
    _check_k(k, S.shape[dim])
    values, index = S.topk(k, dim=dim, sorted=False)
    out = torch.empty_like(S) if out is None else out
    return out.zero_().scatter_(dim, index, values)


def objective(X: Tensor, D: Tensor, S: Tensor, l1: PerRun) -> Tensor:
    """L(S) of every run, [R]; a scalar if X and D have no run axis. S >= 0."""
    X, D, unbatched = as_stack(X, D)
    S = S.expand(len(X), -1, -1)
    loss = (X - S @ D).square().mean((1, 2)) + _per_run(l1, X, "l1") * S.mean((1, 2))
    return loss[0] if unbatched else loss


def kkt_violation(X: Tensor, D: Tensor, S: Tensor, l1: PerRun) -> Tensor:
    """How far S >= 0 is from optimal, per run [R] (a scalar without run axis), in units of x.

    At a minimum d_j . (x - s D) = mu where s_j > 0, and <= mu where s_j = 0.
    """
    X, D, unbatched = as_stack(X, D)
    S = S.expand(len(X), -1, -1)
    mu = _per_run(l1, X, "l1").view(-1, 1, 1) * (X.shape[2] / (2 * D.shape[1]))
    excess = (X - S @ D) @ D.mT - mu
    worst = torch.where(S > 0, excess.abs(), excess.clamp(min=0)).amax((1, 2))
    return worst[0] if unbatched else worst


def as_stack(X: Tensor, D: Tensor) -> tuple[Tensor, Tensor, bool]:
    """X [R, n, M] and D [R, N, M], expanded if one serves all runs; and whether neither had the run axis."""
    shapes = f"X {list(X.shape)}, D {list(D.shape)}"
    if X.dim() not in (2, 3) or D.dim() not in (2, 3) or X.shape[-1] != D.shape[-1]:
        raise UserError(f"{shapes}: they must be [n, M] or [R, n, M], and [N, M] or [R, N, M] with atoms as rows.")
    if X.dim() == D.dim() == 3 and len(X) != len(D):
        raise UserError(f"{shapes}: X and D must have equally many runs.")
    if X.dtype != D.dtype:
        raise UserError(f"X is {X.dtype} and D is {D.dtype}: give both the same dtype.")
    for name, tensor in (("X", X), ("D", D)):
        if not tensor.numel() or not tensor.isfinite().all():
            raise UserError(f"{name} {list(tensor.shape)} is empty or has values that are not finite.")
    R = max(len(a) if a.dim() == 3 else 1 for a in (X, D))
    return X.expand(R, -1, -1), D.expand(R, -1, -1), X.dim() == D.dim() == 2


def _per_run(value: PerRun, like: Tensor, name: str) -> Tensor:
    """[R], finite and >= 0."""
    R = len(like)
    values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if values.shape not in ((), (R,)):
        raise UserError(f"{name} has shape {list(values.shape)}: give one number, or one for each of {R} runs.")
    if not values.isfinite().all() or (values < 0).any():
        raise UserError(f"{name}={value}: it must be finite and not negative.")
    return values.expand(R)


def _start(init: float | Tensor, floor: float, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    """Log-codes [R, N, n]."""
    R, n, N = shape
    if not isinstance(init, Tensor):
        return like.new_full((R, N, n), init)
    if init.shape not in (shape, shape[1:]) or not floor > 0 or not (init >= 0).all():
        raise UserError(
            f"init {list(init.shape)}, floor={floor}: starting codes are {list(shape)}, >= 0; floor is > 0."
        )
    return init.to(like).clamp(min=floor).log_().mT.expand(R, N, n).clone(memory_format=torch.contiguous_format)


def _largest_eigenvalue(D: Tensor) -> Tensor:
    """lambda_max(D D^T), [R, 1, 1]."""
    value = torch.linalg.matrix_norm(D.double(), ord=2).square().to(D).view(-1, 1, 1)
    if not (value > 0).all():
        raise UserError("A dictionary of zeros has no codes: check D.")
    return value


def _check(iterations: int, **positive: float) -> None:
    if iterations < 1:
        raise UserError(f"iterations={iterations}: at least 1.")
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name}={value}: it must be finite and positive.")


def _check_k(k: int | None, N: int) -> None:
    if k is not None and not 1 <= k <= N:
        raise UserError(f"k={k}: between 1 and the {N} codes of a sample.")


def _check_finite(S: Tensor, what: str) -> None:
    if not S.isfinite().all():
        raise UserError(f"No longer finite: {what}.")
