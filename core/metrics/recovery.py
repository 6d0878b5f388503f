"""How well codes and dictionaries are recovered: the mean correlation coefficient (MCC), and its value by chance.

Shapes: n samples, P and Q columns (codes or atoms), N true codes, M observed dimensions; `...` are runs. Everything is
computed in float64 on the CPU. A run with a NaN or an infinity gets NaN; the others keep their values.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from core.errors import UserError
from core.seeding import generator

Kind = Literal["pearson", "cosine"]
Number = TypeVar("Number", float, Tensor)
VARIANCE_FLOOR = 1e-12  # below it a column is constant (Pearson) or zero (cosine), and correlates 0 with everything
CHUNK = 2**22  # numbers standardised at a time where columns are independent


def correlations(A: Tensor, B: Tensor, kind: Kind = "pearson") -> Tensor:
    """Correlation of every column of A `[..., n, P]` with every column of B `[..., n, Q]`: `[..., P, Q]`, signed.

    `pearson` is the cosine of centred columns, `cosine` that of uncentred ones. A column whose variance (for
    `cosine`: mean square) is below 1e-12 correlates 0 with everything.
    Raises UserError for empty input, different n, or fewer than 2 samples with `pearson`.
    """
    return (_standardised(A, B, kind).mT @ _standardised(B, A, kind)).clamp_(-1, 1)


def matched_correlations(S: Tensor, S_hat: Tensor, kind: Kind = "pearson") -> Tensor:
    """|Correlation| of each of S's columns `[..., n, P]` with the matched column of S_hat `[..., n, Q]`: `[..., P]`.

    Columns are matched one to one so that the sum is largest (Hungarian algorithm). With Q < P the columns of S
    without a partner get 0; with Q > P the surplus columns of S_hat do not count.
    Raises UserError as `correlations` does.
    """
    C = correlations(S, S_hat, kind).abs()  # [..., P, Q]
    flat = [_of_best_pairs(c) for c in C.flatten(0, -3)] if C.ndim > 2 else [_of_best_pairs(C)]
    return torch.stack(flat).reshape(C.shape[:-1])


def mcc(S: Tensor, S_hat: Tensor, kind: Kind = "pearson") -> Tensor:
    """Mean of `matched_correlations`: `[...]`. `pearson` is O'Neill et al. 2025, eq. 7; `cosine` is SAELens's
    `mean_correlation_coefficient`."""
    return matched_correlations(S, S_hat, kind).mean(-1)


def dictionary_mcc(D: Tensor, D_hat: Tensor, kind: Kind = "pearson") -> Tensor:
    """MCC of the atoms D `[..., N, M]` and D_hat `[..., N', M]` with the M coordinates as samples: `[...]`.

    High by chance, see `chance_dictionary_mcc`; with M = 2, |Pearson| is 1 for any two atoms and says nothing.
    """
    return mcc(D.mT, D_hat.mT, kind)


def unmatched_correlations(S: Tensor, S_hat: Tensor) -> Tensor:
    """Signed Pearson correlation of S[..., i] and S_hat[..., i], both `[..., n, N]`, for every i: `[..., N]`.

    For codes whose order is known (O'Neill et al. 2025, known sparse codes): without matching or absolute value.
    Raises UserError as `correlations` does, and for different widths.
    """
    if S.shape[-1] != S_hat.shape[-1]:
        raise UserError(
            f"Codes of equal index are compared, but there are {S.shape[-1]} true and {S_hat.shape[-1]} codes."
        )
    width = max(1, CHUNK // max(S[..., :1].numel(), S_hat[..., :1].numel(), 1))
    parts = zip(S.split(width, -1), S_hat.split(width, -1), strict=True)
    products = [(_standardised(a, b, "pearson") * _standardised(b, a, "pearson")).sum(-2) for a, b in parts]
    return torch.cat(products, -1).clamp_(-1, 1)


def chance_dictionary_mcc(N: int, M: int, kind: Kind = "pearson", n_draws: int = 20, seed: int = 0) -> float:
    """Mean dictionary MCC of two independent dictionaries of N unit-norm Gaussian atoms in M dimensions."""
    _at_least_1(N=N, M=M, n_draws=n_draws)
    g = generator(seed, "chance", "dictionary")
    total = 0.0
    for _ in range(n_draws):
        D, other = (normalize(torch.randn(N, M, generator=g), dim=1) for _ in range(2))
        total += dictionary_mcc(D, other, kind).item()
    return total / n_draws


def chance_corrected(value: Number, chance: float) -> Number:
    """(MCC - chance) / (1 - chance): 0 at chance, 1 at perfect recovery; NaN if chance itself is 1."""
    return (value - chance) / (1 - chance) if chance < 1 else value * math.nan


def _standardised(A: Tensor, other: Tensor, kind: Kind) -> Tensor:
    """A's columns centred (`pearson`) and scaled to unit norm, float64; constant columns become 0."""
    n, least = A.shape[-2], 2 if kind == "pearson" else 1
    if kind not in ("pearson", "cosine"):
        raise UserError(f"kind: {kind!r} must be pearson or cosine.")
    if n != other.shape[-2]:
        raise UserError(f"Correlations need the same samples on both sides, not {n} and {other.shape[-2]}.")
    if n < least or 0 in A.shape:
        raise UserError(f"kind: {kind} correlations need {least} samples and 1 column, not shape {tuple(A.shape)}.")
    A = A.detach().to("cpu", torch.float64)
    if kind == "pearson":
        A = A - A.mean(-2, keepdim=True)
    norm = torch.linalg.vector_norm(A, dim=-2, keepdim=True)
    return A / torch.where(norm.square() < VARIANCE_FLOOR * n, math.inf, norm)


def _of_best_pairs(C: Tensor) -> Tensor:
    """C `[P, Q]` at the one-to-one pairs of rows and columns with the largest sum, 0 for a row without a partner:
    `[P]`; NaN if there is one in C."""
    if C.isnan().any():
        return C.new_full(C.shape[:1], math.nan)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(C.numpy(), maximize=True))
    return C.new_zeros(len(C)).index_put_((rows,), C[rows, columns])


def _at_least_1(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name}: {value} must be at least 1.")


class UnmatchedCorrelationSums:
    """`unmatched_correlations` over more samples than fit into memory: sums over chunks, one division at the end.

    True codes come as the indices `[n, K]` and values `[n, K]` of the active ones, predicted ones as S_hat `[R, n, N]`.
    """

    def __init__(self, R: int, N: int) -> None:
        self.n = 0
        self.S, self.S_square = (torch.zeros(N, dtype=torch.float64) for _ in range(2))
        self.S_hat, self.S_hat_square, self.product = (torch.zeros(R, N, dtype=torch.float64) for _ in range(3))

    def add(self, indices: Tensor, values: Tensor, S_hat: Tensor) -> None:
        """Add the samples of one chunk."""
        codes, values = indices.flatten(), values.double()
        self.n += len(indices)
        self.S.index_add_(0, codes, values.flatten())
        self.S_square.index_add_(0, codes, values.square().flatten())
        for run, predicted in enumerate(S_hat.detach()):
            S_hat_run = predicted.double()  # [n, N]
            self.S_hat[run] += S_hat_run.sum(0)
            self.S_hat_square[run] += S_hat_run.square().sum(0)
            self.product[run].index_add_(0, codes, (S_hat_run.gather(1, indices) * values).flatten())

    def each(self) -> Tensor:
        """As `unmatched_correlations` gives them: `[R, N]`, float64. Raises UserError for fewer than 2 samples."""
        if self.n < 2:
            raise UserError(f"Correlations need 2 samples, not {self.n}.")
        covariance = self.product - self.S * self.S_hat / self.n
        scale = self._norm(self.S, self.S_square) * self._norm(self.S_hat, self.S_hat_square)
        return (covariance / scale).clamp_(-1, 1)

    def _norm(self, total: Tensor, square: Tensor) -> Tensor:
        centred = square - total.square() / self.n
        return torch.where(centred < VARIANCE_FLOOR * self.n, math.inf, centred).sqrt()
