"""Exact selection of the largest positive pre-activations on a CUDA device.

1. Compute the maximum of every group of columns in a row (Triton). If n groups have a maximum >= t, at least n entries
   are >= t. So the n-th largest maximum is a lower bound, and a close one if there are enough groups.
2. Count the few entries that reach the bound, group by group, and write them in row-major order. Groups with a maximum
   below the bound are not read again. A sort of these candidates decides.
3. If ties or rows of unequal size leave too many candidates, determine the n-th largest value bit by bit instead, four
   bits per pass over the matrix. Of equal values the first ones are kept.

The host waits for the device once, between counting and writing. Besides the pre-activations, memory is needed for one
int32 per group (of at least 4 entries, up to 256 if few are wanted) and a few words per candidate (at most one entry in
`ENTRIES_PER_CANDIDATE`) or kept entry.

Values are compared as integers: the bits of a positive fp32 number grow with it. Ties go to the lower row-major
position, entries <= 0 are never kept, and NaN counts as the largest value, as in `core.kernels.reference`.

Shapes: B rows in the batch, d = d_model, m = dict_size, S segments, n = entries wanted from each segment.
"""

# A kernel's arguments are pointers and device values, which have no Python type.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.codes import Support, entries_kept
from core.kernels.cuda import on_device

GROUPS_PER_ENTRY = 2  # groups per entry wanted: more give a tighter bound but take longer to search
SMALLEST_GROUP, LARGEST_GROUP = 4, 256
TILE_ENTRIES = 2048  # entries handled by one program
ENTRIES_PER_CANDIDATE = 32  # sorting takes about 50 bytes per candidate
NAN = 0x7FFFFFFF  # the largest key

Selected = tuple[Support, Tensor]


def topk(z: Tensor, k: int) -> Selected:
    """The k largest entries > 0 of every row of z `[B, m]`, fp32 or bf16: their support and values in fp32."""
    return _selected(z, k, z.shape[0])


def batchtopk(z: Tensor, k: float) -> Selected:
    """The B k largest entries > 0 of z `[B, m]`, fp32 or bf16: their support and values in fp32."""
    return _selected(z, entries_kept(k, z.shape[0]), 1)


def _selected(z: Tensor, n: int, segments: int) -> Selected:
    positions, values = largest(z, n, segments)
    starts = torch.arange(z.shape[0] + 1, device=z.device) * z.shape[1]
    rows = positions // max(z.shape[1], 1)
    return Support(
        rows, positions - starts[rows], (z.shape[0], z.shape[1]), torch.searchsorted(positions, starts)
    ), values


def largest(z: Tensor, n: int, segments: int) -> tuple[Tensor, Tensor]:
    """The `n` largest entries > 0 of each of `segments` equal parts (blocks of rows) of z `[B, m]`: their row-major
    positions, int64 and increasing, and their values in fp32."""
    n = min(n, z.numel() // max(segments, 1))
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=z.device), torch.empty(0, device=z.device)
    groups = _Groups(z.contiguous(), _group_size(z, n * segments))
    below = _lower_bound(groups.maxima, n, segments).clamp(min=1) - 1
    counts, _ = groups.count(below)
    of_segment = counts.view(segments, -1).sum(1)
    n_candidates, n_kept = torch.stack([of_segment.sum(), of_segment.clamp(max=n).sum()]).tolist()
    if n_candidates == n_kept:
        return groups.write(below, counts, torch.zeros_like(counts), n_kept)
    if n_candidates > z.numel() // ENTRIES_PER_CANDIDATE:
        return groups.write(*_exact(groups, n, segments), n_kept)
    positions, values = groups.write(below, counts, torch.zeros_like(counts), n_candidates)
    keep = _largest_candidates(values, of_segment, n, n_kept)
    return positions[keep], values[keep]


def _group_size(z: Tensor, wanted: int) -> int:
    """Columns in a group, a power of two."""
    size = SMALLEST_GROUP
    while size < LARGEST_GROUP and z.numel() >= 2 * size * GROUPS_PER_ENTRY * wanted:
        size *= 2
    return size


def _lower_bound(maxima: Tensor, n: int, segments: int) -> Tensor:
    """int32 `[S]`: a key that at least n entries of a segment reach; 0 if there are fewer than n groups."""
    of_segment = maxima.view(segments, -1)
    if of_segment.shape[1] < n:
        return maxima.new_zeros(segments)
    return of_segment.topk(n, dim=1, sorted=False).values.amin(1)


def _largest_candidates(values: Tensor, of_segment: Tensor, n: int, n_kept: int) -> Tensor:
    """Indices, increasing, of the n largest candidates of each segment; segment s owns `of_segment[s]` of them."""
    key = values.view(torch.int32).masked_fill(values.isnan(), NAN).long()
    segment = torch.repeat_interleave(of_segment, output_size=values.numel())
    order = ((segment << 32) + (NAN - key)).argsort(stable=True)
    place = torch.arange(values.numel(), device=values.device) - (of_segment.cumsum(0) - of_segment)[segment]
    return order.where(place < n, values.numel()).sort().values[:n_kept]


def _exact(groups: _Groups, n: int, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n-th largest key of every segment `[S]` (0 if fewer than n entries are positive), the number of entries that
    each group keeps, and how many of these equal that key."""
    last = _nth_largest_key(groups.z, n, segments)
    counts = groups.count(last)
    above, equal = (t.view(segments, -1) for t in counts)
    missing = (n - above.sum(1)).where(last > 0, 0)
    before = equal.cumsum(1) - equal
    ties = (missing[:, None] - before).clamp(min=0).minimum(equal).int().view_as(counts[0])
    return last, counts[0] + ties, ties


def _nth_largest_key(z: Tensor, n: int, segments: int) -> Tensor:
    """int32 `[S]`: the largest key that at least n entries of the segment reach."""
    key = torch.zeros(segments, dtype=torch.int32, device=z.device)
    for shift in range(28, -1, -4):
        counts = torch.empty(z.shape[0], 16, dtype=torch.int32, device=z.device)
        with on_device(z):
            _count_reaching[(z.shape[0],)](
                z, _of_rows(key, z), counts, z.shape[1], SHIFT=shift, TILE=TILE_ENTRIES // 16
            )
        reached = counts.view(segments, -1, 16).sum(1) >= n
        key += (reached[:, 1:].sum(1) << shift).int()
    return key


def _of_rows(of_segments: Tensor, z: Tensor) -> Tensor:
    return of_segments.repeat_interleave(z.shape[0] // of_segments.numel(), output_size=z.shape[0])


class _Groups:
    """Groups of `size` neighbouring columns in every row of z `[B, m]`; `maxima` are their largest keys, int32
    `[B, groups]`."""

    def __init__(self, z: Tensor, size: int) -> None:
        self.z, self.size = z, size
        self.maxima = torch.empty(z.shape[0], triton.cdiv(z.shape[1], size), dtype=torch.int32, device=z.device)
        self._launch(_maxima)

    def count(self, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Two int32 `[B, groups]`: how many keys of a group are above, and equal to, the limit `[S]` of its segment."""
        above, equal = torch.empty_like(self.maxima), torch.empty_like(self.maxima)
        self._launch(_counts, _of_rows(limits, self.z), above, equal)
        return above, equal

    def write(self, limits: Tensor, counts: Tensor, ties: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Positions and values of the `total` entries with keys above the limit `[S]` of their segment, and of the
        first `ties` entries of every group that equal it. A group has `counts` of these entries."""
        starts = counts.flatten().cumsum(0) - counts.flatten()
        positions = torch.empty(total, dtype=torch.int64, device=self.z.device)
        values = torch.empty(total, dtype=torch.float32, device=self.z.device)
        if total:
            self._launch(_entries, _of_rows(limits, self.z), starts, ties, positions, values)
        return positions, values

    def _launch(self, kernel: Any, *tensors: Tensor) -> None:
        n_groups, tile = self.maxima.numel(), TILE_ENTRIES // self.size
        sizes = (n_groups, self.maxima.shape[1], self.z.shape[1])
        with on_device(self.z):
            kernel[(triton.cdiv(n_groups, tile),)](self.z, self.maxima, *tensors, *sizes, GROUP=self.size, TILE=tile)


@triton.jit
def _key(z):
    """int32 that grows with the value: the bits of a positive fp32 number, 0 for numbers <= 0, the maximum for NaN."""
    bits = z.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, tl.maximum(bits, 0))


@triton.jit
def _place(n_groups, groups_of_row, m, GROUP: tl.constexpr, TILE: tl.constexpr):
    """For `TILE` groups: their indices and rows `[TILE]`, the row-major positions of their entries and whether these
    exist `[TILE, GROUP]`."""
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = group // groups_of_row
    col = (group % groups_of_row * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    return group, row, row.to(tl.int64)[:, None] * m + col, (col < m) & (group < n_groups)[:, None]


@triton.jit
def _maxima(z, maxima, n_groups, groups_of_row, m, GROUP: tl.constexpr, TILE: tl.constexpr):
    group, _, at, real = _place(n_groups, groups_of_row, m, GROUP, TILE)
    key = _key(tl.load(z + at, mask=real, other=0.0))
    tl.store(maxima + group, tl.max(key, axis=1), mask=group < n_groups)


@triton.jit
def _counts(z, maxima, limits, above, equal, n_groups, groups_of_row, m, GROUP: tl.constexpr, TILE: tl.constexpr):
    group, row, at, real = _place(n_groups, groups_of_row, m, GROUP, TILE)
    limit = tl.load(limits + row, mask=group < n_groups, other=0)
    top = tl.load(maxima + group, mask=group < n_groups, other=0)
    real = real & (top >= limit)[:, None]
    key = _key(tl.load(z + at, mask=real, other=0.0))
    tl.store(above + group, tl.sum((real & (key > limit[:, None])).to(tl.int32), axis=1), mask=group < n_groups)
    tl.store(equal + group, tl.sum((real & (key == limit[:, None])).to(tl.int32), axis=1), mask=group < n_groups)


@triton.jit
def _entries(
    z,
    maxima,
    limits,
    starts,
    ties,
    positions,
    values,
    n_groups,
    groups_of_row,
    m,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    group, row, at, real = _place(n_groups, groups_of_row, m, GROUP, TILE)
    limit = tl.load(limits + row, mask=group < n_groups, other=0)
    top = tl.load(maxima + group, mask=group < n_groups, other=0)
    start = tl.load(starts + group, mask=group < n_groups, other=0)
    n_ties = tl.load(ties + group, mask=group < n_groups, other=0)
    real = real & (top >= limit)[:, None]
    value = tl.load(z + at, mask=real, other=0.0).to(tl.float32)
    key = _key(value)
    tie = real & (key == limit[:, None])
    keep = (real & (key > limit[:, None])) | (tie & (tl.cumsum(tie.to(tl.int32), axis=1) <= n_ties[:, None]))
    place = start[:, None] + tl.cumsum(keep.to(tl.int32), axis=1) - 1
    tl.store(positions + place, at, mask=keep)
    tl.store(values + place, value, mask=keep)


@triton.jit
def _count_reaching(z, keys, counts, m, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """For one row: how many entries reach key + j 2^SHIFT, for j from 0 to 15."""
    row = tl.program_id(0)
    digit = tl.arange(0, 16)
    bound = tl.load(keys + row).to(tl.int64) + (digit.to(tl.int64) << SHIFT)
    total = tl.zeros((16,), tl.int32)
    for start in range(0, m, TILE):
        col = start + tl.arange(0, TILE)
        key = _key(tl.load(z + row.to(tl.int64) * m + col, mask=col < m, other=0.0)).to(tl.int64)
        total += tl.sum(((key[None, :] >= bound[:, None]) & (col < m)[None, :]).to(tl.int32), axis=1)
    tl.store(counts + row * 16 + digit, total)
