"""Triton kernels for CUDA: sums of scaled rows and products sampled at a support, and the dense product in bf16.

Import this module only where Triton is installed (CUDA builds of PyTorch bring it). Tables may be fp32 or bf16; sums
are in fp32, and so are results. No kernel uses atomics: the same input gives the same bits. The selection of the
largest entries is in `core.kernels.cuda_select`.

Shapes: B rows in the batch, d = d_model, m = dict_size, n = entries kept.
"""

# A kernel's arguments are pointers and device values, which have no Python type.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 64  # entries that one program sums; a longer segment is shared by several
ENTRIES = 8  # entries gathered at once
WIDEST = 256  # columns handled by one program
BIAS_COLUMNS = 8  # keeps rows of bf16 aligned to 16 bytes


def sums_of_rows(weights: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """out_i = sum of weights_e table[index_e] over e from offsets_i to offsets_{i + 1}.

    weights `[n]`, index `[n]` int64, offsets `[rows + 1]` int64 from 0 to n, table `[t, d]` -> fp32 `[rows, d]`. A
    segment of more than `PIECE` entries (a latent that fires often) is cut at every e that is a multiple of `PIECE`.
    The sums of the parts, at most 2 n / PIECE rows of fp32, are then added in order.
    """
    weights, index, table = weights.contiguous(), index.contiguous(), table.contiguous()
    rows, n, d = offsets.numel() - 1, index.numel(), table.shape[1]
    out = torch.zeros(rows, d, dtype=torch.float32, device=table.device)
    if n == 0 or d == 0:
        return out
    width = min(triton.next_power_of_2(d), WIDEST)
    chunks, across = triton.cdiv(n, PIECE), triton.cdiv(d, width)
    parts = torch.empty(2 * chunks, d, dtype=torch.float32, device=table.device)
    sizes = {"STEPS": rows.bit_length(), "PIECE": PIECE, "ENTRIES": ENTRIES, "WIDTH": width}
    with on_device(table):
        _sum_pieces[(rows + 2 * chunks, across)](weights, index, offsets, table, out, parts, rows, n, d, **sizes)
        _sum_parts[(chunks, across)](offsets, parts, out, rows, n, d, **sizes)
    return out


def sampled_product(left: Tensor, right: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """fp32 `[n]`: left[rows_e] . right[cols_e]; left `[B, d]`, right `[m, d]`, rows and cols `[n]` int64."""
    left, right = left.contiguous(), right.contiguous()
    n, d = rows.numel(), left.shape[1]
    out = torch.zeros(n, dtype=torch.float32, device=left.device)
    if n == 0 or d == 0:
        return out
    width = min(triton.next_power_of_2(d), WIDEST)
    with on_device(left):
        grid = (triton.cdiv(n, ENTRIES),)
        _sample[grid](left, right, rows.contiguous(), cols.contiguous(), out, n, d, ENTRIES=ENTRIES, WIDTH=width)
    return out


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """fp32 `[B, m]` = bf16(x) bf16(W_enc)^T + b_enc, summed in fp32.

    The bias needs no extra pass over the result: its three bf16 parts, which add up to its fp32 value, become columns
    of W_enc that are multiplied by ones. So a bias that is not finite gives NaN.
    """
    x, W = x.bfloat16(), W_enc.bfloat16()
    if b_enc is not None:
        parts = _bf16_parts(b_enc.float())
        W = torch.cat([W, *(part[:, None] for part in parts), W.new_zeros(len(W), BIAS_COLUMNS - len(parts))], dim=1)
        x = torch.cat([x, x.new_ones(len(x), BIAS_COLUMNS)], dim=1)
    if x.device.type == "cuda":
        return torch.mm(x, W.T, out_dtype=torch.float32)
    return x.float() @ W.float().T  # only CUDA has `out_dtype`


def _bf16_parts(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bf16 numbers whose sum is b: each has 8 of its 24 significant bits."""
    high = b.bfloat16()
    rest = b - high.float()
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, since Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()


@triton.jit
def _segment_of(offsets, entry, rows, STEPS: tl.constexpr):
    """The segment that owns an entry, by bisection; offsets[low] <= entry < offsets[high] in every step."""
    low = tl.full((), 0, tl.int32)
    high = low + rows
    for _ in range(STEPS):
        middle = (low + high) // 2
        right = tl.load(offsets + middle) <= entry
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit
def _weighted_sum(weights, index, table, first, last, across, d, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 `[WIDTH]`: the sum of weights_e table[index_e] over e from `first` to `last`, in the columns `across`."""
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        real = entry < last
        weight = tl.load(weights + entry, mask=real, other=0.0).to(tl.float32)
        row = tl.load(index + entry, mask=real, other=0)
        inside = real[:, None] & (across < d)[None, :]
        values = tl.load(table + row[:, None] * d + across[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * values, axis=0)
    return total


@triton.jit
def _sum_pieces(
    weights,
    index,
    offsets,
    table,
    out,
    parts,
    rows,
    n,
    d,
    STEPS: tl.constexpr,
    PIECE: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The first `rows` programs sum the short segments. Then every chunk of `PIECE` entries has two programs for long
    segments: one sums the chunk's part of the segment that owns its first entry, the other that of a segment which
    starts later in the chunk."""
    program = tl.program_id(0)
    across = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if program < rows:
        first = tl.load(offsets + program)
        last = tl.load(offsets + program + 1)
        if last - first <= PIECE:
            total = _weighted_sum(weights, index, table, first, last, across, d, ENTRIES, WIDTH)
            tl.store(out + program.to(tl.int64) * d + across, total, mask=across < d)
    else:
        part = program - rows
        start = part // 2 * PIECE
        stop = tl.minimum(start + PIECE, n)
        starts_inside = part % 2 == 1
        segment = _segment_of(offsets, tl.where(starts_inside, stop - 1, start), rows, STEPS)
        first = tl.load(offsets + segment)
        last = tl.load(offsets + segment + 1)
        if (last - first > PIECE) & ((first > start) == starts_inside):
            first = tl.maximum(first, start)
            last = tl.minimum(last, stop)
            total = _weighted_sum(weights, index, table, first, last, across, d, ENTRIES, WIDTH)
            tl.store(parts + part.to(tl.int64) * d + across, total, mask=across < d)


@triton.jit
def _sum_parts(
    offsets,
    parts,
    out,
    rows,
    n,
    d,
    STEPS: tl.constexpr,
    PIECE: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds the parts of long segments in order. The program of the chunk in which a segment ends does it."""
    chunk = tl.program_id(0)
    across = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = chunk * PIECE
    segment = _segment_of(offsets, start, rows, STEPS)
    first = tl.load(offsets + segment)
    last = tl.load(offsets + segment + 1)
    if (last - first > PIECE) & (last <= start + PIECE):
        began = first // PIECE
        total = tl.zeros((WIDTH,), tl.float32)
        if first % PIECE != 0:
            total += tl.load(parts + (2 * began + 1) * d + across, mask=across < d, other=0.0)
            began += 1
        for place in range(began, chunk + 1, ENTRIES):
            chunks = place + tl.arange(0, ENTRIES)
            inside = (chunks <= chunk)[:, None] & (across < d)[None, :]
            total += tl.sum(
                tl.load(parts + (2 * chunks)[:, None] * d + across[None, :], mask=inside, other=0.0), axis=0
            )
        tl.store(out + segment.to(tl.int64) * d + across, total, mask=across < d)


@triton.jit
def _sample(left, right, rows, cols, out, n, d, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = entry < n
    row = tl.load(rows + entry, mask=real, other=0)[:, None]
    col = tl.load(cols + entry, mask=real, other=0)[:, None]
    total = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for start in range(0, d, WIDTH):
        across = start + tl.arange(0, WIDTH)[None, :]
        inside = real[:, None] & (across < d)
        a = tl.load(left + row * d + across, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(right + col * d + across, mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + entry, tl.sum(total, axis=1), mask=real)
