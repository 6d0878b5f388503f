"""What a crosscoder's decoder says about its latents: relative norms, classes and twins.

Source: Minder et al. 2025, eq. 3 and sec. 3. Shapes: m latents, 2 models (0 base, 1 chat), d = d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

CLASSES = {"base_only": (0.0, 0.1), "shared": (0.4, 0.6), "chat_only": (0.9, 1.0)}  # intervals of Delta_norm
TWIN_COSINE = 0.9
ROWS_AT_ONCE = 1024


def relative_norm(W_dec: Tensor) -> Tensor:
    """Delta_norm `[m]` = (1 + (|d_chat| - |d_base|) / max of both) / 2, from W_dec `[m, 2, d]`.

    0: base-only, 1: chat-only. The authors' column `dec_norm_diff` is 1 - Delta_norm. NaN where both norms are 0.
    """
    base, chat = torch.linalg.vector_norm(W_dec.double(), dim=2).T
    return (1 + (chat - base) / torch.maximum(base, chat)) / 2


def in_class(delta: Tensor, name: str) -> Tensor:
    """bool `[m]`: whether Delta_norm lies in the interval of a class, ends included."""
    low, high = CLASSES[name]
    return (delta >= low) & (delta <= high)


class ExplainedVariance:
    """Fraction of variance explained in each model and in both, over batches: 1 - var(x - x_hat) / var(x), summed over
    d. Both variances are around the mean over all rows."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: list[Tensor] = []  # of x, x - x_hat `[M, d]`, and of their squares, in float64

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """x and x_hat `[B, M, d]`."""
        parts = [x.double(), (x - x_hat).double()]
        new = [*(part.sum(0) for part in parts), *(part.square().sum(0) for part in parts)]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.n += len(x)

    def metrics(self) -> dict[str, float]:
        """`fve`, `fve_base`, `fve_chat`."""
        total, error = (
            (squares - sums.square() / self.n).sum(1)
            for sums, squares in zip(self.sums[:2], self.sums[2:], strict=True)
        )
        base, chat = (1 - error / total).tolist()
        return {"fve": float(1 - error.sum() / total.sum()), "fve_base": base, "fve_chat": chat}


def twins(W_dec: Tensor, chat_only: Tensor, base_only: Tensor, cosine: float = TWIN_COSINE) -> Tensor:
    """`[n, 2]`: pairs (chat-only latent, base-only latent) whose directions in their own models have a cosine above the
    bound. Each latent is in one pair at most: pairs are taken greedily, the largest cosine first. Masks are bool `[m]`.
    """
    chat, base = chat_only.nonzero().squeeze(1), base_only.nonzero().squeeze(1)
    d_base = normalize(W_dec[base, 0].double(), dim=1)
    hits = []
    for part in chat.split(ROWS_AT_ONCE):
        cosines = normalize(W_dec[part, 1].double(), dim=1) @ d_base.T
        i, j = (cosines > cosine).nonzero(as_tuple=True)
        hits += list(zip(cosines[i, j].tolist(), part[i].tolist(), base[j].tolist(), strict=True))
    pairs, taken = [], set()
    for _, a, b in sorted(hits, reverse=True):
        if a not in taken and b not in taken:
            pairs.append((a, b))
            taken |= {a, b}
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
