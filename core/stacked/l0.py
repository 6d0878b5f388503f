"""The best nonnegative codes with at most K non-zeros, found by trying every support.

Shapes as in `core.stacked.inference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations, islice
from math import comb

import torch
from torch import Tensor

from core.errors import UserError
from core.stacked.inference import as_stack

MOST_FITS = 10**9  # supports times samples times runs: minutes on one core
CHUNK_NUMBERS = 2**22  # fp64 numbers of one [supports, n, M] buffer


def n_supports(N: int, K: int) -> int:
    """Supports with 1 to K of N atoms."""
    return sum(comb(N, size) for size in range(1, K + 1))


def check_sizes(N: int, M: int, K: int, n_samples: int) -> None:
    """Raises UserError for a K that has no unique codes, and for more fits than `MOST_FITS`."""
    if not 1 <= K <= min(N, M):
        raise UserError(f"K={K}: between 1 and min(N, M) = min({N}, {M}), or the codes of a support are not unique.")
    count = n_supports(N, K)
    if count * n_samples > MOST_FITS:
        raise UserError(
            f"The L0 oracle would try {count:,} supports (up to K={K} of N={N} atoms) on {n_samples:,} samples: "
            f"{count * n_samples:,} fits, the limit is {MOST_FITS:,}. Use fewer samples, a smaller K or N, or fista."
        )


@torch.no_grad()
def l0_oracle(X: Tensor, D: Tensor, K: int) -> Tensor:
    """argmin ||x - s D|| over s >= 0 with at most K non-zeros, for every sample, computed in fp64.

    On a support the least-squares codes have a closed form. If one of them is negative, the best nonnegative codes are
    on a smaller support. So supports of every size up to K are tried, and those without negative codes are compared. Of
    equally good supports the smaller one wins.

    Raises UserError if K > N or K > M, or if the fits are more than `MOST_FITS`.
    """
    X, D, unbatched = as_stack(X, D)
    (R, n, M), N = X.shape, D.shape[1]
    check_sizes(N, M, K, R * n)
    S = torch.stack([_one_run(x, d, K) for x, d in zip(X.double(), D.double(), strict=True)]).to(X)
    return S[0] if unbatched else S


def _one_run(x: Tensor, D: Tensor, K: int) -> Tensor:
    n, M = x.shape
    best, S = x.square().sum(1), x.new_zeros(n, len(D))  # the empty support
    for supports in _supports(len(D), K, max(1, CHUNK_NUMBERS // (n * M)), x.device):
        atoms = D[supports]  # [c, K', M]
        codes = x @ torch.linalg.pinv(atoms)  # [c, n, K']
        errors = torch.baddbmm(x.expand(len(supports), n, M), codes, atoms, alpha=-1).square_().sum(2)  # [c, n]
        error, which = errors.masked_fill_((codes < 0).any(2), torch.inf).min(0)
        rows = (error < best).nonzero()[:, 0]
        best[rows] = error[rows]
        S[rows] = 0
        S[rows[:, None], supports[which[rows]]] = codes[which[rows], rows]
    return S


def _supports(N: int, K: int, chunk: int, device: torch.device) -> Iterator[Tensor]:
    """All supports as index tensors [c, size], smaller sizes first, c <= chunk."""
    for size in range(1, K + 1):
        every = combinations(range(N), size)
        while part := list(islice(every, chunk)):
            flat = torch.tensor(list(chain.from_iterable(part)), device=device)
            yield flat.view(-1, size)
