"""How many latents fire: L0 per token as an exact histogram, and how often each latent fires.

Shapes: B rows (tokens) in a batch, m = dict_size. A latent fires at a token if its code there is greater than 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.kernels.codes import Codes, SparseCodes

DENSE_ABOVE = 0.1  # a latent is dense if it fires at more than this fraction of the tokens


def firing_counts(codes: Codes) -> Tensor:
    """At how many of the batch's rows each latent fires: int64 `[m]`."""
    if isinstance(codes, SparseCodes):
        counts = torch.zeros(codes.shape[1], dtype=torch.int64, device=codes.values.device)
        return counts.index_add_(0, codes.cols, (codes.values > 0).long())
    return (codes.dense() > 0).sum(0)


@dataclass(frozen=True)
class SparsitySums:
    """Integer sums over tokens; `a + b` is the sums of both sets of tokens, exactly.

    l0_histogram      int64 `[2, m + 1]`: how many tokens have an L0 of 0, 1, ..., m; beginnings of text (BOS) in row 1,
                      all other tokens in row 0. m + 1 bins hold every possible L0.
    counts            int64 `[m]`: at how many tokens each latent fires
    """

    l0_histogram: Tensor
    counts: Tensor

    @classmethod
    def of(cls, codes: Codes, is_bos: Tensor | None = None) -> SparsitySums:
        """The sums of one batch of codes `[B, m]`; `is_bos`, bool `[B]`, marks the beginnings of text."""
        n_bins = codes.shape[1] + 1
        bins = codes.l0_per_row()  # [B]
        if is_bos is not None:
            bins = bins + n_bins * is_bos.to(bins.device)
        histogram = torch.bincount(bins, minlength=2 * n_bins).view(2, n_bins)
        return cls(histogram, firing_counts(codes))

    def __add__(self, other: SparsitySums) -> SparsitySums:
        return SparsitySums(self.l0_histogram + other.l0_histogram, self.counts + other.counts)

    def histogram(self, bos: bool = True) -> Tensor:
        """Tokens per L0, int64 `[largest L0 + 1]`, on the CPU; `bos=False`: without beginnings of text."""
        counts = (self.l0_histogram.sum(0) if bos else self.l0_histogram[0]).cpu()
        occurs = counts.nonzero()
        return counts[: int(occurs[-1]) + 1] if len(occurs) else counts[:1]

    @property
    def n_tokens(self) -> int:
        return int(self.l0_histogram.sum())

    def frequencies(self) -> Tensor:
        """Fraction of all tokens at which each latent fires: fp64 `[m]`."""
        return self.counts.double() / self.n_tokens

    def metrics(self) -> dict[str, float]:
        """L0 of all tokens and of those that do not begin a text, dead and dense fractions of the latents.

        Standard deviations divide by n. `l0_bos_mean` is missing if no token begins a text, the figures without BOS
        if every token does.
        """
        without_bos, only_bos = self.l0_histogram.cpu()
        metrics: dict[str, float] = {}
        metrics["l0_mean"], metrics["l0_std"] = mean_and_std(without_bos + only_bos)
        if without_bos.any():
            metrics["l0_mean_without_bos"], metrics["l0_std_without_bos"] = mean_and_std(without_bos)
        if only_bos.any():
            metrics["l0_bos_mean"], _ = mean_and_std(only_bos)
        metrics["dead_fraction"] = (self.counts == 0).double().mean().item()
        metrics["dense_fraction"] = (self.frequencies() > DENSE_ABOVE).double().mean().item()
        return metrics


def mean_and_std(histogram: Tensor) -> tuple[float, float]:
    """Mean and (population) standard deviation of the values 0, 1, 2, ... that a histogram counts."""
    values = torch.arange(len(histogram), dtype=torch.float64)
    weights = histogram.double() / histogram.sum()
    mean = (weights * values).sum()
    return mean.item(), (weights * (values - mean).square()).sum().sqrt().item()
