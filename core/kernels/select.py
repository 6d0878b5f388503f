"""Exact selection of the largest positive pre-activations, without ever holding all of them.

The pre-activations are made in blocks of rows that reuse one buffer, and of each block only the few entries survive
that may be among the largest. On the CPU the survivors are found by comparison with a lower bound that is certain:
the entries of a block are put in groups, and where n groups have a maximum >= t, n entries are >= t. A partition of
the survivors then decides exactly. Other devices use `topk` on the whole matrix.

Shapes: B rows in the batch, R rows in a block, d = d_model, m = dict_size, n = entries kept. Ties go to the entry with
the lower row-major position. Entries <= 0 are never kept; NaN counts as the largest value, so that it is not hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from core.kernels.codes import Support

BLOCK_ENTRIES = 1 << 24  # pre-activations held at once on the CPU: 64 MiB in fp32
GROUPS_PER_ENTRY = 2  # groups for every entry wanted: more give a tighter bound and a longer search for it
LARGEST_GROUP = 64
POSITIVE = float(np.finfo(np.float32).smallest_subnormal)

Selected = tuple[Support, Tensor]
Select = Callable[[Tensor, Tensor, Tensor | None], Selected]


def select_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> Selected:
    """The k largest entries > 0 of every row of x W_enc^T + b_enc: their support and values."""
    if not _on_cpu(x):
        return _of_mask(_pre_activations(x, W_enc, b_enc), lambda z: mask_of_largest(z, k))
    return _of_blocks(x, W_enc, b_enc, lambda z: _row_candidates(z, k), lambda z: mask_of_largest(z, k))


class NotSparse(Exception):  # noqa: N818 - it is no error, only an answer
    """More entries stand above the threshold than are wanted."""


def select_above(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, densest: float = 1.0) -> Selected:
    """The entries above `threshold` (a scalar, or `[m]`, one per latent).

    Raises NotSparse if a part of the matrix has more than a share `densest` of its entries above it.
    """

    def mask(z: Tensor) -> Tensor:
        return ~(z <= threshold)

    def choose(z: Tensor) -> np.ndarray:
        found = np.flatnonzero(mask(z).numpy())
        if found.size > densest * z.numel():
            raise NotSparse
        return found

    if _on_cpu(x):
        return _of_blocks(x, W_enc, b_enc, choose, mask)
    support, values = _of_mask(_pre_activations(x, W_enc, b_enc), mask)
    if values.numel() > densest * x.shape[0] * W_enc.shape[0]:
        raise NotSparse
    return support, values


def select_batchtopk(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> Selected:
    """The B k largest entries > 0 of the whole matrix x W_enc^T + b_enc."""
    n = k * x.shape[0]
    if not _on_cpu(x):
        return _of_mask(_pre_activations(x, W_enc, b_enc), lambda z: mask_of_largest(z.flatten(), n).view_as(z))
    index, values = np.empty(0, np.int64), x.new_empty(0).numpy()
    bound = POSITIVE
    for first_row, z in _blocks(x, W_enc, b_enc):
        if _has_nan(z):
            z = _pre_activations(x, W_enc, b_enc)
            return _of_mask(z, lambda z: mask_of_largest(z.flatten(), n).view_as(z))
        matrix = z.numpy()
        found = np.flatnonzero(matrix >= bound) if values.size >= n else np.empty(0, np.int64)
        if values.size < n or found.size > n:  # the rows before say too little about this block
            found = np.flatnonzero(matrix >= max(bound, _lower_bound(z, n)))
        index = np.concatenate([index, found + first_row * z.shape[1]])
        values = np.concatenate([values, matrix.ravel()[found]])
        if values.size >= n:
            keep = _largest(values, n)
            index, values = index[keep], values[keep]
            bound = np.nextafter(values.min(), np.inf, dtype=values.dtype)  # an equal one further down would lose
    return _support(torch.from_numpy(index), (x.shape[0], W_enc.shape[0])), torch.from_numpy(values)


def mask_of_largest(z: Tensor, n: int) -> Tensor:
    """bool mask of the `n` largest entries > 0 along the last axis, on any device."""
    n = min(n, z.shape[-1])
    last = z.topk(n, dim=-1, sorted=False).values
    last = last.where(~last.isnan(), torch.inf).amin(-1, keepdim=True)
    above = ~(z <= last)
    missing = n - above.sum(-1, keepdim=True)
    equal = z == last
    return (above | (equal & (equal.cumsum(-1) <= missing))) & ~(z <= 0)


def _pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, out: Tensor | None = None) -> Tensor:
    if b_enc is None:
        return torch.mm(x, W_enc.T, out=out)
    return torch.addmm(b_enc, x, W_enc.T, out=out)


def _blocks(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """(index of the first row, pre-activations `[R, m]`) of block after block; each overwrites the one before."""
    n_rows = min(x.shape[0], max(1, BLOCK_ENTRIES // W_enc.shape[0]))
    buffer = x.new_empty(n_rows, W_enc.shape[0])
    for first in range(0, x.shape[0], n_rows):
        rows = x[first : first + n_rows]
        yield first, _pre_activations(rows, W_enc, b_enc, out=buffer[: rows.shape[0]])


def _of_blocks(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    choose: Callable[[Tensor], np.ndarray],
    mask_if_nan: Callable[[Tensor], Tensor],
) -> Selected:
    """What `choose` (block -> row-major positions in it) keeps of every block."""
    indices, values = [], []
    for first_row, z in _blocks(x, W_enc, b_enc):
        found = np.flatnonzero(mask_if_nan(z).numpy()) if _has_nan(z) else choose(z)
        indices.append(found + first_row * z.shape[1])
        values.append(z.numpy().ravel()[found])
    index = torch.from_numpy(np.concatenate(indices))
    return _support(index, (x.shape[0], W_enc.shape[0])), torch.from_numpy(np.concatenate(values))


def _of_mask(z: Tensor, choose: Callable[[Tensor], Tensor]) -> Selected:
    """What `choose` (matrix -> bool mask) keeps, on any device; waits for the device once to learn how many."""
    index = choose(z).flatten().nonzero().squeeze(1)
    return _support(index, (z.shape[0], z.shape[1])), z.flatten()[index]


def _support(index: Tensor, shape: tuple[int, int]) -> Support:
    starts = torch.arange(shape[0] + 1, device=index.device) * shape[1]
    offsets = torch.searchsorted(index, starts)
    rows = torch.repeat_interleave(offsets.diff(), output_size=index.numel())
    return Support(rows, index - starts[rows], shape, offsets)


def _row_candidates(z: Tensor, k: int) -> np.ndarray:
    """Row-major positions of the k largest entries > 0 of every row of `[R, m]`."""
    n_rows, m = z.shape
    matrix = z.numpy()
    maxima = _group_maxima(z, k)
    bound = np.partition(maxima, maxima.shape[1] - k, axis=1)[:, maxima.shape[1] - k]
    found = np.flatnonzero(matrix >= np.maximum(bound, POSITIVE)[:, None])
    starts = np.searchsorted(found, np.arange(n_rows + 1) * m)
    surplus = np.flatnonzero(np.diff(starts) > k)
    if surplus.size == 0:
        return found
    return found[_trim_rows(matrix.ravel()[found], starts, surplus, k)]


def _trim_rows(values: np.ndarray, starts: np.ndarray, surplus: np.ndarray, k: int) -> np.ndarray:
    """bool mask that leaves k candidates in each of the rows `surplus`; row i owns starts[i] : starts[i + 1]."""
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


def _lower_bound(z: Tensor, n: int) -> float:
    """A value that at least `n` entries of `[R, m]` reach; -inf where the block has fewer than `n`."""
    if z.numel() < n:
        return -np.inf
    maxima = _group_maxima(z, -(-n // z.shape[0])).ravel()
    return float(np.partition(maxima, maxima.size - n)[maxima.size - n])


def _group_maxima(z: Tensor, k: int) -> np.ndarray:
    """Maxima `[R, g]`, g >= k, of groups of columns that stand far apart; the last columns may belong to none."""
    m = z.shape[1]
    size = 1
    while size < LARGEST_GROUP and m // (2 * size) >= GROUPS_PER_ENTRY * k:
        size *= 2
    groups = m // size
    return z[:, : groups * size].unflatten(1, (size, groups)).amax(1).numpy()


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """bool mask of the `n` largest values, the earlier of equal ones first."""
    last = np.partition(values, values.size - n)[values.size - n]
    keep = values > last
    equal = np.flatnonzero(values == last)
    keep[equal[: n - np.count_nonzero(keep)]] = True
    return keep


def _has_nan(z: Tensor) -> bool:
    """Whether a product has a NaN: one in an input row fills its row, one in a weight fills its column."""
    return bool(z[0].isnan().any() or z[:, 0].isnan().any())


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
