"""Exact selection of the largest positive pre-activations, without holding all of them in memory.

On the CPU the pre-activations are computed in blocks that reuse one buffer. Of each block only the few candidates are
kept that may be among the largest. A partition of all candidates then decides exactly. There are two ways to get them:
  by groups   the entries of a block of rows are divided into groups. If n groups have a maximum >= t, at least n
              entries are >= t, and only the groups with such a maximum are read again
  by columns  (BatchTopK on large matrices) a bound is estimated from a few rows, a little too low, and compared with
              blocks of columns that fit into the cache. If fewer than n entries reach it, it was too high, and the
              selection is repeated by groups
CUDA devices use `core.kernels.cuda_select`, other devices `topk` on the whole matrix.

With `sizes` `[m]`, a pre-activation is multiplied by its latent's size before it is compared, and is returned so.

Shapes: B rows in the batch, R rows in a block, d = d_model, m = dict_size, n = entries kept. Ties go to the entry with
the lower row-major position. Entries <= 0 are never kept. NaN counts as the largest value, so that it is not hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.kernels.codes import Support, entries_kept
from core.kernels.device import in_bf16, triton_kernels

BLOCK_ENTRIES = 1 << 24  # pre-activations in a block of rows: 64 MiB in fp32
CACHED_ENTRIES = 1 << 22  # in a block of columns: 16 MiB
GATHER_COST = 8  # cost of reading one entry by its index, relative to one entry of a whole matrix
SAMPLED_ROWS = 64  # rows from which the bound is estimated
SAMPLE_MARGIN = 1.25  # entries that should reach the estimated bound, per entry wanted
POSITIVE = float(np.finfo(np.float32).smallest_subnormal)

Selected = tuple[Support, Tensor]
Select = Callable[[Tensor, Tensor, Tensor | None], Selected]


def select_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, sizes: Tensor | None = None) -> Selected:
    """The k largest entries > 0 of every row of x W_enc^T + b_enc: their support and values."""
    if triton := triton_kernels(x):
        return triton.select.topk(_pre_activations(x, W_enc, b_enc, sizes), k)
    if not _on_cpu(x):
        return _of_mask(_pre_activations(x, W_enc, b_enc, sizes), lambda z: mask_of_largest(z, k))
    return _of_blocks(x, W_enc, b_enc, lambda z: _row_candidates(z, k), lambda z: mask_of_largest(z, k), sizes)


class NotSparse(Exception):  # noqa: N818 - it is an answer, not an error
    """More entries are above the threshold than allowed."""


def select_above(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, densest: float = 1.0) -> Selected:
    """The entries above `threshold` (a scalar, or `[m]`, one per latent).

    Raises NotSparse if in some block of the matrix more than a share `densest` of the entries is above it.
    """

    def mask(z: Tensor) -> Tensor:
        return ~(z <= threshold)

    def choose(z: Tensor) -> np.ndarray:
        positions = np.flatnonzero(mask(z).numpy())
        if positions.size > densest * z.numel():
            raise NotSparse
        return positions

    if _on_cpu(x):
        return _of_blocks(x, W_enc, b_enc, choose, mask)
    support, values = _of_mask(_pre_activations(x, W_enc, b_enc), mask)
    if values.numel() > densest * x.shape[0] * W_enc.shape[0]:
        raise NotSparse
    return support, values


def select_batchtopk(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: float, sizes: Tensor | None = None) -> Selected:
    """The B k largest entries > 0 of the whole matrix x W_enc^T + b_enc."""
    B, m = x.shape[0], W_enc.shape[0]
    n = entries_kept(k, B)
    if triton := triton_kernels(x):
        return triton.select.batchtopk(_pre_activations(x, W_enc, b_enc, sizes), k)
    selected = None
    if _on_cpu(x):
        large = B * m > CACHED_ENTRIES and B >= 4 * SAMPLED_ROWS
        selected = _largest_by_columns(x, W_enc, b_enc, n, sizes) if large else None
        selected = selected or _largest_by_groups(x, W_enc, b_enc, n, sizes)
    if selected is None:
        z = _pre_activations(x, W_enc, b_enc, sizes)
        return _of_mask(z, lambda z: mask_of_largest(z.flatten(), n).view_as(z))
    index, values = selected
    return _support(torch.from_numpy(index), (B, m)), torch.from_numpy(values)


def mask_of_largest(z: Tensor, n: int) -> Tensor:
    """bool mask of the `n` largest entries > 0 along the last axis, on any device."""
    if n >= z.shape[-1]:
        return ~(z <= 0)
    last = z.topk(n, dim=-1, sorted=False).values
    last = last.where(~last.isnan(), torch.inf).amin(-1, keepdim=True)
    above = ~(z <= last)
    missing = n - above.sum(-1, keepdim=True)
    equal = z == last
    return (above | (equal & (equal.cumsum(-1) <= missing))) & ~(z <= 0)


def _pre_activations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, sizes: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    if in_bf16():
        triton = triton_kernels(x)
        assert triton is not None
        z = triton.cuda.pre_activations(x, W_enc, b_enc)
    elif b_enc is None:
        z = torch.mm(x, W_enc.T, out=out)
    else:
        z = torch.addmm(b_enc, x, W_enc.T, out=out)
    return z if sizes is None else z.mul_(sizes)


def _blocks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, sizes: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(index of the first row, pre-activations `[R, m]`) of every block. Each block overwrites the previous one."""
    n_rows = min(x.shape[0], max(1, BLOCK_ENTRIES // W_enc.shape[0]))
    buffer = x.new_empty(n_rows, W_enc.shape[0])
    for first in range(0, x.shape[0], n_rows):
        rows = x[first : first + n_rows]
        yield first, _pre_activations(rows, W_enc, b_enc, sizes, out=buffer[: rows.shape[0]])


def _of_blocks(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    choose: Callable[[Tensor], np.ndarray],
    mask_if_nan: Callable[[Tensor], Tensor],
    sizes: Tensor | None = None,
) -> Selected:
    """The entries that `choose` (block -> row-major positions in it) keeps, over all blocks."""
    indices, values = [], []
    for first_row, z in _blocks(x, W_enc, b_enc, sizes):
        positions = np.flatnonzero(mask_if_nan(z).numpy()) if _has_nan(z) else choose(z)
        indices.append(positions + first_row * z.shape[1])
        values.append(z.numpy().ravel()[positions])
    index = torch.from_numpy(np.concatenate(indices))
    return _support(index, (x.shape[0], W_enc.shape[0])), torch.from_numpy(np.concatenate(values))


def _of_mask(z: Tensor, choose: Callable[[Tensor], Tensor]) -> Selected:
    """The entries that `choose` (matrix -> bool mask) keeps, on any device. Waits for the device once."""
    index = choose(z).flatten().nonzero().squeeze(1)
    return _support(index, (z.shape[0], z.shape[1])), z.flatten()[index]


def _support(index: Tensor, shape: tuple[int, int]) -> Support:
    starts = torch.arange(shape[0] + 1, device=index.device) * shape[1]
    offsets = torch.searchsorted(index, starts)
    rows = torch.repeat_interleave(offsets.diff(), output_size=index.numel())
    return Support(rows, index - rows * shape[1], shape, offsets)


Positions = tuple[np.ndarray, np.ndarray]  # row-major positions, sorted, and the values there


def _largest_by_groups(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, n: int, sizes: Tensor | None
) -> Positions | None:
    """The n largest entries > 0 of x W_enc^T + b_enc; None if there is a NaN."""
    m = W_enc.shape[0]
    index, values = np.empty(0, np.int64), x.new_empty(0).numpy()
    bound = POSITIVE
    for first_row, z in _blocks(x, W_enc, b_enc, sizes):
        if _has_nan(z):
            return None
        groups = Groups.of(z, -(-n // x.shape[0]))
        positions = groups.entries_from(max(bound, groups.reached_by(n)))
        index = np.concatenate([index, positions + first_row * m])
        values = np.concatenate([values, z.numpy().ravel()[positions]])
        if values.size >= n:
            keep = _largest(values, n)
            index, values = index[keep], values[keep]
            bound = np.nextafter(values.min(), np.inf, dtype=values.dtype)  # a later equal entry would lose the tie
    return index, values


def _largest_by_columns(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, n: int, sizes: Tensor | None
) -> Positions | None:
    """The same; None also if the estimated bound was too high."""
    B, m = x.shape[0], W_enc.shape[0]
    sample = x[:: B // SAMPLED_ROWS].contiguous()
    z = _pre_activations(sample, W_enc, b_enc, sizes)
    if _has_nan(z):
        return None
    wanted = int(SAMPLE_MARGIN * n * len(sample) / B) + 1
    bound = max(POSITIVE, Groups.of(z, -(-wanted // len(sample))).reached_by(wanted))
    width = max(1, CACHED_ENTRIES // B)
    buffer = x.new_empty(B * min(width, m))
    indices, values = [], []
    for first in range(0, m, width):
        W = W_enc[first : first + width]
        b, s = (None if each is None else each[first : first + width] for each in (b_enc, sizes))
        z = _pre_activations(x, W, b, s, out=buffer[: B * len(W)].view(B, len(W)))
        if _has_nan(z):
            return None
        positions = np.flatnonzero(z.numpy() >= bound)
        rows, columns = np.divmod(positions, len(W))
        indices.append(rows * m + (columns + first))
        values.append(z.numpy().ravel()[positions])
    if sum(map(len, values)) < n and bound > POSITIVE:
        return None
    index, value = np.concatenate(indices), np.concatenate(values)
    order = index.argsort(kind="stable")
    index, value = index[order], value[order]
    keep = _largest(value, n) if value.size > n else slice(None)
    return index[keep], value[keep]


class Groups(NamedTuple):
    """The entries of a block of pre-activations z `[R, m]`, in groups of columns that are far apart.

    Column j belongs to group j modulo the number of groups. The last columns, fewer than `size`, belong to none.
    """

    z: np.ndarray  # [R, m]
    maxima: np.ndarray  # [R, g]
    size: int  # entries in a group

    @classmethod
    def of(cls, z: Tensor, k: int) -> Groups:
        """Groups to select about k entries per row. Larger groups mean fewer maxima but more entries to read again;
        every entry wanted needs at least two groups."""
        m = z.shape[1]
        size = 1
        while (2 * size) ** 2 * k <= 2 * m and m // (2 * size) >= 2 * k:
            size *= 2
        n_groups = m // size
        return cls(z.numpy(), z[:, : n_groups * size].unflatten(1, (size, n_groups)).amax(1).numpy(), size)

    def reached_by(self, n: int) -> float:
        """A value that at least `n` entries reach; -inf if there are fewer than n groups."""
        if self.maxima.size < n:
            return -np.inf
        return float(np.partition(self.maxima.ravel(), self.maxima.size - n)[self.maxima.size - n])

    def reached_per_row(self, k: int) -> np.ndarray:
        """`[R, 1]`: for each row a value that at least k entries reach; -inf if there are fewer than k groups."""
        n_groups = self.maxima.shape[1]
        if n_groups < k:
            return np.full((len(self.z), 1), -np.inf, self.z.dtype)
        return np.partition(self.maxima, n_groups - k, axis=1)[:, [n_groups - k]]

    def entries_from(self, bound: float | np.ndarray) -> np.ndarray:
        """Sorted row-major positions of the entries >= bound, which is a number or one per row `[R, 1]`."""
        m, n_groups = self.z.shape[1], self.maxima.shape[1]
        reached = np.flatnonzero(self.maxima >= bound)
        if reached.size * self.size * GATHER_COST > self.z.size:
            return np.flatnonzero(self.z >= bound)
        rows, first = np.divmod(reached, n_groups)
        inside = (rows * m + first)[:, None] + np.arange(self.size) * n_groups
        least = bound[rows] if isinstance(bound, np.ndarray) else bound
        positions = inside[self.z.ravel()[inside] >= least]
        if n_groups * self.size < m:
            rest_rows, rest = np.nonzero(self.z[:, n_groups * self.size :] >= bound)
            positions = np.concatenate([positions, rest_rows * m + rest + n_groups * self.size])
        positions.sort()
        return positions


def _row_candidates(z: Tensor, k: int) -> np.ndarray:
    """Row-major positions of the k largest entries > 0 of every row of `[R, m]`."""
    n_rows, m = z.shape
    groups = Groups.of(z, k)
    positions = groups.entries_from(np.maximum(groups.reached_per_row(k), POSITIVE))
    starts = np.searchsorted(positions, np.arange(n_rows + 1) * m)
    surplus = np.flatnonzero(np.diff(starts) > k)
    if surplus.size == 0:
        return positions
    return positions[_trim_rows(groups.z.ravel()[positions], starts, surplus, k)]


def _trim_rows(values: np.ndarray, starts: np.ndarray, surplus: np.ndarray, k: int) -> np.ndarray:
    """bool mask that keeps k candidates in each of the rows `surplus`; row i owns starts[i] : starts[i + 1]."""
    lengths = np.diff(starts)[surplus]
    place = np.arange(lengths.max())
    inside = place < lengths[:, None]  # [rows with surplus, longest]
    where = np.minimum(starts[surplus][:, None] + place, values.size - 1)
    padded = np.where(inside, values[where], -np.inf)
    last = np.partition(padded, padded.shape[1] - k, axis=1)[:, [padded.shape[1] - k]]
    above, equal = padded > last, padded == last
    missing = k - above.sum(1, keepdims=True)
    keep = np.ones(values.size, bool)
    keep[where[inside]] = (above | (equal & (equal.cumsum(1) <= missing)))[inside]
    return keep


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """bool mask of the `n` largest values, the earlier of equal ones first."""
    last = np.partition(values, values.size - n)[values.size - n]
    keep = values > last
    equal = np.flatnonzero(values == last)
    keep[equal[: n - np.count_nonzero(keep)]] = True
    return keep


def _has_nan(z: Tensor) -> bool:
    """Whether a product has a NaN. A NaN in an input fills its row, and one in a weight fills its column."""
    return bool(z[0].isnan().any() or z[:, 0].isnan().any())


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
