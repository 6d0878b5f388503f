"""Sparse nonnegative codes with a known dictionary: the synthetic problem of O'Neill et al. 2025 (arXiv 2411.13117).

Shapes: n samples, N true codes, M observed dimensions, K active codes per sample. Atoms are the rows of D `[N, M]`, of
unit norm, and x = s @ D. There is no noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.errors import UserError
from core.metrics.recovery import mcc
from core.seeding import derived_seed, generator

ZIPF_MAGNITUDE_OFFSET = 0.1  # added to a code's probability: the factor of its magnitude


@dataclass(frozen=True)
class Problem:
    """Dictionary and samples, float32: D `[N, M]`, S_train `[n_train, N]`, X_train `[n_train, M]`; test likewise."""

    D: Tensor
    S_train: Tensor
    X_train: Tensor
    S_test: Tensor
    X_test: Tensor


@dataclass(frozen=True)
class SparseCodeLaw:
    """The law that codes and dictionary are drawn from (O'Neill et al. 2025, and the Zipf variant of their code).

    Exactly K codes of a sample are active. Without `zipf_alpha` every set of K codes is equally likely and magnitudes
    are half-normal, |N(0, 1)|. With it, code i = 1..N has the weight w_i = i^-alpha / sum_j j^-alpha. The K codes are
    drawn one after another, without replacement, in proportion to w. The magnitude of code i is |N(0, 1)| (w_i + 0.1).
    So both frequency and magnitude fall with i.
    Raises UserError for sizes below 1, K > N, or a `zipf_alpha` that is not a positive number.
    """

    N: int
    M: int
    K: int
    zipf_alpha: float | None = None

    def __post_init__(self) -> None:
        for name in ("N", "M", "K"):
            _at_least_1(name, getattr(self, name))
        if self.K > self.N:
            raise UserError(
                f"source.K: {self.K} active codes cannot be chosen from source.N = {self.N}; lower K or raise N."
            )
        if self.zipf_alpha is not None and not (math.isfinite(self.zipf_alpha) and self.zipf_alpha > 0):
            raise UserError(
                f"source.zipf_alpha: {self.zipf_alpha} must be a positive number, or null for uniform codes."
            )

    def draw(self, n_train: int, n_test: int, seed: int) -> Problem:
        """A problem that depends only on `seed`: `n_train` does not change the test set, and neither size changes D."""
        _at_least_1("n_train", n_train)
        _at_least_1("n_test", n_test)
        D = self.dictionary(seed)
        S_train = self.codes(n_train, generator(seed, "sparse_codes", "train"))
        S_test = self.codes(n_test, generator(seed, "sparse_codes", "test"))
        return Problem(D, S_train, S_train @ D, S_test, S_test @ D)

    def dictionary(self, seed: int) -> Tensor:
        """D `[N, M]`: standard normal rows, scaled to unit norm."""
        return normalize(torch.randn(self.N, self.M, generator=generator(seed, "sparse_codes", "dictionary")), dim=1)

    def codes(self, n: int, g: torch.Generator) -> Tensor:
        """S `[n, N]`, dense."""
        indices, values = self.active(n, g)
        return torch.zeros(n, self.N).scatter_(1, indices, values)

    def active(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """The active codes of n samples: indices int64 `[n, K]`, all different within a row, and values `[n, K]` > 0.

        Each code gets an exponential arrival time of rate w; the first K to arrive are distributed as K draws without
        replacement. Needs memory for n * N float32 arrival times.
        """
        arrival = torch.empty(n, self.N).exponential_(generator=g) / self.weights()
        indices = arrival.topk(self.K, dim=1, largest=False, sorted=False).indices
        values = torch.randn(n, self.K, generator=g).abs_().clamp_min_(torch.finfo(torch.float32).tiny)
        if self.zipf_alpha is not None:
            values *= (self.weights() + ZIPF_MAGNITUDE_OFFSET)[indices]
        return indices, values

    def weights(self) -> Tensor:
        """w `[N]`, sum 1: the probability of each code in the first of the K draws."""
        rank = torch.arange(1, self.N + 1, dtype=torch.float64)
        w = rank.pow(-(self.zipf_alpha or 0.0))
        return (w / w.sum()).float()


def _at_least_1(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"source.{name}: {value!r} must be a whole number of at least 1.")


def chance_latent_mcc(source: SparseCodeLaw, n_samples: int = 1024, n_draws: int = 20, seed: int = 0) -> float:
    """Mean latent MCC of untrained encoders ReLU(X W), W `[M, N]` uniform within +-1 / sqrt(M) (torch's Linear)."""
    _at_least_1("n_samples", n_samples)
    _at_least_1("n_draws", n_draws)
    g, total = generator(seed, "chance", "latent"), 0.0
    for draw in range(n_draws):
        S = source.codes(n_samples, g)
        W = torch.empty(source.M, source.N).uniform_(-(source.M**-0.5), source.M**-0.5, generator=g)
        S_hat = (S @ source.dictionary(derived_seed(seed, "chance", draw)) @ W).relu()
        total += mcc(S, S_hat).item()
    return total / n_draws
