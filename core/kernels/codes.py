"""The output of a dictionary's encoder: the activations of the latents, stored sparsely if few are positive.

Shapes: B rows in the batch, m = dict_size, n = entries kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor


class ByColumn(NamedTuple):
    """The entries sorted by column: entry `order[e]` is in row `rows[e]`; column j owns the entries from `offsets[j]`
    to `offsets[j + 1]`."""

    order: Tensor  # [n]
    offsets: Tensor  # [m + 1]
    rows: Tensor  # [n]


class Support:
    """The positions of the entries of a sparse matrix. Derived indices are computed once and shared by all products.

    `rows` and `cols` `[n]` are int64, sorted by row and then by column.
    """

    def __init__(self, rows: Tensor, cols: Tensor, shape: tuple[int, int], offsets: Tensor | None = None) -> None:
        self.rows, self.cols, self.shape = rows, cols, shape
        if offsets is None:
            offsets = torch.searchsorted(rows, torch.arange(shape[0] + 1, device=rows.device))
        self.offsets = offsets  # [B + 1]; row i owns the entries from offsets[i] to offsets[i + 1]

    @cached_property
    def by_column(self) -> ByColumn:
        if self.cols.device.type == "cpu":  # a counting sort, several times faster than argsort
            positions = np.arange(self.cols.numel())
            t = csr_array((positions, self.cols.numpy(), self.offsets.numpy()), shape=self.shape).tocsc()
            order, offsets, rows = (torch.from_numpy(a).long() for a in (t.data, t.indptr, t.indices))
            return ByColumn(order, offsets, rows)
        order = self.cols.argsort(stable=True)
        starts = torch.arange(self.shape[1] + 1, device=self.cols.device)
        return ByColumn(order, torch.searchsorted(self.cols[order], starts), self.rows[order])


class SparseCodes:
    """Codes `[B, m]` stored as entries, sorted by row and then by column; differentiable in `values`.

    `pre` `[n]` holds the entries' pre-activations, if a loss depends on them.
    """

    def __init__(self, rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        self.support, self.values = Support(rows, cols, shape), values
        self.pre: Tensor | None = None

    @classmethod
    def on(cls, support: Support, values: Tensor, pre: Tensor | None = None) -> SparseCodes:
        """Codes with the given values `[n]` on a support that others may share."""
        codes = cls.__new__(cls)
        codes.support, codes.values, codes.pre = support, values, pre
        return codes

    @property
    def rows(self) -> Tensor:
        return self.support.rows

    @property
    def cols(self) -> Tensor:
        return self.support.cols

    @property
    def shape(self) -> tuple[int, int]:
        return self.support.shape

    def dense(self) -> Tensor:
        """`[B, m]`."""
        return self.values.new_zeros(self.shape).index_put((self.rows, self.cols), self.values)

    def l0_per_row(self) -> Tensor:
        """`[B]` int64, the number of entries > 0."""
        return self.rows.new_zeros(self.shape[0]).index_add(0, self.rows, (self.values > 0).long())

    def l0(self) -> Tensor:
        """The mean over rows of the number of entries > 0, a scalar."""
        return (self.values > 0).sum() / self.shape[0]

    def fired(self) -> Tensor:
        """bool `[m]`: which latents are > 0 in some row."""
        counts = self.cols.new_zeros(self.shape[1]).index_add(0, self.cols, (self.values > 0).long())
        return counts > 0


@dataclass(slots=True)
class DenseCodes:
    """Codes as a full matrix `[B, m]`. `pre` holds the pre-activations, if a loss depends on them."""

    values: Tensor
    pre: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dense(self) -> Tensor:
        """`[B, m]`."""
        return self.values

    def l0_per_row(self) -> Tensor:
        """`[B]` int64, the number of entries > 0."""
        return self.values.clamp(min=0).sign().sum(1).long()  # several times faster than summing a mask

    def l0(self) -> Tensor:
        """The mean over rows of the number of entries > 0, a scalar."""
        return self.values.clamp(min=0).sign().sum() / self.shape[0]

    def fired(self) -> Tensor:
        """bool `[m]`: which latents are > 0 in some row."""
        return self.values.amax(0) > 0


Codes = SparseCodes | DenseCodes


def entries_kept(k: float, B: int) -> int:
    """How many entries BatchTopK keeps of B rows. k may be a fraction, since it is a mean over rows."""
    return round(k * B)


def entries(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values `[n]` of sparse or dense codes, sorted by row and then by column."""
    if isinstance(codes, SparseCodes):
        return codes.rows, codes.cols, codes.values
    rows, cols = codes.values.nonzero(as_tuple=True)
    return rows, cols, codes.values[rows, cols]
