"""The synthetic problem of O'Neill et al. 2025 with more samples than fit into memory as dense codes.

A sample is stored as its K active codes, with an index (2 bytes) and a value (4 bytes) each. Dense codes of a thousand
atoms would take 4,000 bytes. Observations are computed batch by batch.

Shapes: n samples, B of a batch, N true codes, M observed dimensions, K active codes; D `[N, M]`, atoms are rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from core.errors import UserError
from core.seeding import generator
from core.synthetic.sparse_codes import SparseCodeLaw

MOST_CODES = 2**16  # an index has 16 bits
DRAWN_AT_ONCE = 4096  # samples; changing it changes the samples of a seed


class LargeSparseCodes:
    """n fixed samples from a law of sparse codes, and the minibatches of passes over them.

    indices  `[n, K]` uint16, all different within a row
    values   `[n, K]` float32, > 0
    Raises UserError for n < 1 and for more codes than an index can name.
    """

    def __init__(self, law: SparseCodeLaw, n: int, seed: int, purpose: str = "train") -> None:
        if law.N > MOST_CODES:
            raise UserError(f"source.N: {law.N} codes, but a 16-bit index allows at most {MOST_CODES:,}.")
        if n < 1:
            raise UserError(f"source.n_{purpose}: {n} must be at least 1.")
        self.law, self.seed, self.D = law, seed, law.dictionary(seed)
        self.indices = torch.empty(n, law.K, dtype=torch.uint16)
        self.values = torch.empty(n, law.K)
        g = generator(seed, "large_sparse_codes", purpose)
        for start in range(0, n, DRAWN_AT_ONCE):
            part = slice(start, min(start + DRAWN_AT_ONCE, n))
            indices, self.values[part] = law.active(part.stop - start, g)
            self.indices[part] = indices.to(torch.uint16)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def n_bytes(self) -> int:
        """Memory of the samples, without the dictionary."""
        return self.indices.nbytes + self.values.nbytes

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Active codes of an optimiser step's samples: indices `[B, K]`, int64, and values `[B, K]`.

        A pass shows every sample at most once, in its own order, and leaves out a smaller last batch. The batch of a
        step depends only on the step. Raises UserError if size > n.
        """
        if not 1 <= size <= len(self):
            raise UserError(f"batch_size: {size} must be between 1 and the {len(self):,} samples there are.")
        epoch, place = divmod(step, len(self) // size)
        if epoch != self._epoch:
            order = generator(self.seed, "large_sparse_codes", "order", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=order)
        return self.active(self._order[place * size : (place + 1) * size])

    def active(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """As `batch`, for the given samples."""
        return self.indices[rows].to(torch.int64), self.values[rows]

    def observed(self, indices: Tensor, values: Tensor) -> Tensor:
        """X = S D `[B, M]`, from the K active atoms of each sample."""
        return embedding_bag(indices, self.D, mode="sum", per_sample_weights=values)

    def dense(self, indices: Tensor, values: Tensor) -> Tensor:
        """S `[B, N]`."""
        return torch.zeros(len(indices), self.law.N).scatter_(1, indices, values)
