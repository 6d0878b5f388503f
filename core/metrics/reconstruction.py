"""How well activations are reconstructed: every number is computed from sums over rows, divided once at the end.

Shapes: B rows in a batch, d = width of the site. Sums are fp64 scalars on the activations' device, so that a batch
needs no synchronisation. In any order or partition they give the same numbers to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

STD_EPSILON = 1e-5  # added to a token's standard deviation, as `InputNorm("token_std")` does
TINY = 1e-30  # keeps ratios of rows that are exactly zero finite


def token_std_errors(x: Tensor, x_hat: Tensor) -> Tensor:
    """Squared error of each row in its own standardised space, averaged over coordinates: `[B, d]` twice -> `[B]`.

    A row is standardised by the mean and the unbiased standard deviation (+ 1e-5) over its d coordinates; the mean
    cancels in the difference. Averaged over rows this is `nmse_token_std`, the NMSE of Bussmann et al. 2024 (their code
    computes it, since its dictionaries are trained on such rows). It is not an FVU: no mean of the data set is
    involved.
    """
    return _standardised(_squared_norms(x.double() - x_hat.double()), x.double())


def _standardised(squared_errors: Tensor, x: Tensor) -> Tensor:
    """|x - x_hat|^2 of each row `[B]` as a mean over coordinates in the standardised space of the row x `[B, d]`."""
    d = x.shape[-1]
    std = (_squared_norms(x - x.mean(-1, keepdim=True)) / (d - 1)).sqrt() + STD_EPSILON  # [B]
    return squared_errors / d / std.square()


def _squared_norms(x: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, x)


@dataclass(frozen=True)
class ReconstructionSums:
    """Sums over rows, from which the figures below follow; `a + b` is the sums of both sets of rows.

    The spread about the data mean is kept as (n, mean, sum of squared deviations from that mean) and combined by the
    exact formula for two sets (Chan et al. 1983). So one pass suffices, without cancellation even for a large mean.
    """

    n_rows: Tensor
    mean: Tensor  # [d], the mean row
    spread: Tensor  # sum |x - mean|^2
    error: Tensor  # sum |x - x_hat|^2
    energy: Tensor  # sum |x|^2
    token_std_error: Tensor  # sum of `token_std_errors`
    cosine: Tensor  # sum cos(x, x_hat); 0 if either is zero
    l2_ratio: Tensor  # sum |x_hat| / |x|

    @classmethod
    def of(cls, x: Tensor, x_hat: Tensor) -> ReconstructionSums:
        """The sums of one batch: rows `[B, d]` and their reconstructions `[B, d]`."""
        if x.ndim != 2 or x.shape != x_hat.shape:
            raise ValueError(f"Rows {tuple(x.shape)} and reconstructions {tuple(x_hat.shape)} must both be [B, d].")
        x, x_hat = x.detach().double(), x_hat.detach().double()
        mean = x.mean(0)
        error, energy = _squared_norms(x - x_hat), _squared_norms(x)  # [B]
        norm, norm_hat = energy.sqrt(), _squared_norms(x_hat).sqrt()  # [B]
        return cls(
            n_rows=torch.tensor(float(len(x)), dtype=torch.float64, device=x.device),
            mean=mean,
            spread=_squared_norms(x - mean).sum(),
            error=error.sum(),
            energy=energy.sum(),
            token_std_error=_standardised(error, x).sum(),
            cosine=(torch.linalg.vecdot(x, x_hat) / (norm * norm_hat).clamp_min(TINY)).sum(),
            l2_ratio=(norm_hat / norm.clamp_min(TINY)).sum(),
        )

    def __add__(self, other: ReconstructionSums) -> ReconstructionSums:
        n_rows = self.n_rows + other.n_rows
        shift = other.mean - self.mean
        between = shift.square().sum() * self.n_rows * other.n_rows / n_rows
        joined = {
            "n_rows": n_rows,
            "mean": self.mean + shift * (other.n_rows / n_rows),
            "spread": self.spread + other.spread + between,
        }
        rest = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name not in joined}
        return ReconstructionSums(**joined, **rest)

    @cached_property
    def nmse_token_std(self) -> float:
        """Mean over rows and coordinates of the squared error in each token's standardised space."""
        return (self.token_std_error / self.n_rows).item()

    @cached_property
    def fvu(self) -> float:
        """Fraction of variance unexplained, sum |x - x_hat|^2 / sum |x - mean|^2, about the mean of all rows seen."""
        if self.spread.item() == 0:
            raise ValueError("The fraction of variance unexplained is undefined: all rows are equal.")
        return (self.error / self.spread).item()

    @cached_property
    def fve(self) -> float:
        """Fraction of variance explained, 1 - fvu."""
        return 1 - self.fvu

    @cached_property
    def nmse_raw_energy(self) -> float:
        """sum |x - x_hat|^2 / sum |x|^2, about zero (Gao et al. 2024): small at no cost if the data mean is large."""
        return (self.error / self.energy).item()

    @cached_property
    def mean_cosine(self) -> float:
        """Mean over rows of the cosine between a row and its reconstruction."""
        return (self.cosine / self.n_rows).item()

    @cached_property
    def mean_l2_ratio(self) -> float:
        """Mean over rows of |x_hat| / |x|; below 1 if reconstructions shrink."""
        return (self.l2_ratio / self.n_rows).item()


def fve_per_token(x: Tensor, x_hat: Tensor, mean: Tensor) -> Tensor:
    """1 - |x - x_hat|^2 / |x - mean|^2 of each row: `[B, d]`, `[B, d]`, `[d]` -> `[B]` in fp64.

    `mean` is the data mean over the evaluation set. Averaged over rows this is the "explained variance" of some
    libraries, which rows close to the mean dominate. It is not `fve`.
    """
    error = (x.double() - x_hat.double()).square().sum(-1)
    return 1 - error / (x.double() - mean.double()).square().sum(-1)


@dataclass(frozen=True)
class VarianceExplained:
    """The variance of weighted rows w_i that is explained, for instance of a decoder's directions by a meta-dictionary.

    centred    1 - sum_i p_i |w_i - w_hat_i|^2 / sum_i p_i |w_i - w_bar|^2, as in SAEBench
    uncentred  the same over sum_i p_i |w_i|^2

    p_i are equal weights, or given ones; w_bar is the mean of the rows under these weights.
    """

    centred: float
    uncentred: float

    @classmethod
    def of(cls, rows: Tensor, rows_hat: Tensor, weights: Tensor | None = None) -> VarianceExplained:
        """Of rows and their reconstructions, both `[N, d]`; weights `[N]`, of any positive sum."""
        w, w_hat = rows.detach().double(), rows_hat.detach().double()
        p = torch.ones_like(w[:, 0]) if weights is None else weights.to(w)
        p = p / p.sum()
        error, mean = p @ (w - w_hat).square().sum(1), p @ w
        spread, energy = p @ (w - mean).square().sum(1), p @ w.square().sum(1)
        return cls(float(1 - error / spread), float(1 - error / energy))
