"""Encoding and decoding with k of m latents: one dense product, and everything else on the kept entries.

A dense step makes five products of 2 B d m operations (pre-activations, decoding, and their three gradients). Here only
the first is dense. The others cost 2 B d k each: sums of scaled rows (`embedding_bag`; Triton on CUDA) and products
sampled at the support. Pre-activations are not kept for the backward pass. `core.kernels.reference` computes the same
in plain autograd.

Shapes: B rows in the batch, d = d_model, m = dict_size, n = entries kept. For a pair of models on the same tokens,
`[.., d]` may be `[.., 2, d]` in x, centre, W_enc and W_dec alike; a pre-activation then sums over both models.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from core.kernels import reference
from core.kernels.across import mask_of_batchtopk, select_global_batchtopk
from core.kernels.codes import Codes, DenseCodes, SparseCodes, Support
from core.kernels.device import in_bf16, triton_kernels
from core.kernels.select import NotSparse, Select, mask_of_largest, select_above, select_topk

# PyTorch prints this warning once in every program that makes a CSR tensor, as `sampled_product` does.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# How products with codes are made; results are equal up to rounding. `auto` decides by dict_size / k where k is known,
# else by the share of entries that matter in every batch.
ProductPath = Literal["auto", "sparse", "dense"]
MIN_LATENTS_PER_ENTRY = 4  # `auto` is sparse from m = 4 k on, where both are about equally fast (on a CPU, d = 192)


def use_sparse(path: ProductPath, dict_size: int, k: float) -> bool:
    """Whether codes with k of `dict_size` latents per row are handled sparsely. Results are equal up to rounding."""
    return path == "sparse" or (path == "auto" and dict_size >= MIN_LATENTS_PER_ENTRY * k)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    centre: Tensor | None = None,
    path: ProductPath = "sparse",
    sizes: Tensor | None = None,
) -> Codes:
    """The k largest entries > 0 of every row of (x - centre) W_enc^T + b_enc, x `[B, d]`, W_enc `[m, d]`.

    Subtracting `centre` `[d]` here is cheaper: its gradient, - sum_ij df_ij W_enc_j, then costs only one product of a
    vector and a matrix. The gradient treats the selection as constant.

    sizes  `[m]`, > 0: entries are compared by their product with the size of their latent; codes are without it
    """
    if not use_sparse(path, W_enc.shape[0], k):
        z = reference.pre_activations(x, W_enc, b_enc, centre)
        return DenseCodes(z.where(mask_of_largest(_times(z.detach(), sizes), k), 0))
    return _encode(x, W_enc, b_enc, centre, partial(select_topk, k=k, sizes=sizes), sizes)


def encode_batchtopk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: float,
    centre: Tensor | None = None,
    path: ProductPath = "sparse",
    sizes: Tensor | None = None,
) -> Codes:
    """The B k largest entries > 0 of the whole matrix (x - centre) W_enc^T + b_enc; fewer if fewer are > 0. With
    several ranks (`core.distributed`), the largest of all their matrices. `sizes` as in `encode_topk`."""
    if not use_sparse(path, W_enc.shape[0], k):
        z = reference.pre_activations(x, W_enc, b_enc, centre)
        return DenseCodes(z.where(mask_of_batchtopk(_times(z.detach(), sizes), k), 0))
    return _encode(x, W_enc, b_enc, centre, partial(select_global_batchtopk, k=k, sizes=sizes), sizes)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, centre: Tensor | None = None
) -> SparseCodes:
    """The entries of (x - centre) W_enc^T + b_enc above `threshold >= 0` (a scalar, or `[m]`, one per latent)."""
    return _encode(x, W_enc, b_enc, centre, partial(select_above, threshold=threshold.detach()))


def encode_relu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, centre: Tensor | None = None, path: ProductPath = "auto"
) -> Codes:
    """ReLU((x - centre) W_enc^T + b_enc); `path` as in `pre_activations_above`."""
    pre = pre_activations_above(x, W_enc, b_enc, x.new_zeros(()), centre, path)
    return DenseCodes(pre.values.relu()) if isinstance(pre, DenseCodes) else pre


def pre_activations_above(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    floor: Tensor,
    centre: Tensor | None = None,
    path: ProductPath = "auto",
) -> Codes:
    """z = (x - centre) W_enc^T + b_enc, for a rule that ignores entries below `floor` (a scalar, or `[m]`).

    Sparse: only the entries of z above the floor. Dense: all of z, whatever the floor. `auto` counts the entries of
    each batch and is sparse if fewer than one in `MIN_LATENTS_PER_ENTRY` is above the floor.
    """
    if path != "dense":
        densest = 1.0 if path == "sparse" else 1 / MIN_LATENTS_PER_ENTRY
        try:
            return _encode(x, W_enc, b_enc, centre, partial(select_above, threshold=floor.detach(), densest=densest))
        except NotSparse:
            pass
    return DenseCodes(reference.pre_activations(x, W_enc, b_enc, centre))


def decode(codes: Codes, W_dec: Tensor) -> Tensor:
    """codes `[B, m]`, W_dec `[m, d]` -> `[B, d]`, without the decoder's bias."""
    if isinstance(codes, DenseCodes):
        return reference.decode(codes, W_dec)
    return _Decode.apply(codes.values, W_dec.flatten(1), codes.support).view(-1, *W_dec.shape[1:])


def _encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    centre: Tensor | None,
    select: Select,
    sizes: Tensor | None = None,
) -> SparseCodes:
    """`sizes` is what `select` multiplied the values with."""
    flat_centre = None if centre is None else centre.flatten()
    values, support = _Encode.apply(x.flatten(1), W_enc.flatten(1), b_enc, flat_centre, select, sizes)
    return SparseCodes.on(support, values)


def _times(z: Tensor, sizes: Tensor | None) -> Tensor:
    return z if sizes is None else z * sizes


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        centre: Tensor | None,
        select: Select,
        sizes: Tensor | None,
    ) -> tuple[Tensor, Support]:
        x_centred = x if centre is None else x - centre
        support, values = select(x_centred, W_enc, b_enc)
        if sizes is not None:
            values = values / sizes[support.cols]
        ctx.support, ctx.in_bf16 = support, in_bf16()
        ctx.save_for_backward(_factor(x_centred, ctx.in_bf16), W_enc)
        return values, support

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_values: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x_centred, W_enc = ctx.saved_tensors
        support: Support = ctx.support
        order, offsets, rows = support.by_column
        d_by_column = d_values[order]
        wants_x, wants_W, wants_b, wants_centre, *_ = ctx.needs_input_grad
        d_x = d_W = d_b = d_centre = None
        if wants_x:
            d_x = _sums_of_rows(d_values, support.cols, support.offsets, _factor(W_enc, ctx.in_bf16))
        if wants_W:
            d_W = _sums_of_rows(d_by_column, rows, offsets, x_centred)
        if wants_b or wants_centre:
            d_b = torch.segment_reduce(d_by_column, "sum", offsets=offsets)
            d_centre = -(d_b @ W_enc) if wants_centre else None
        return d_x, d_W, d_b if wants_b else None, d_centre, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support) -> Tensor:
        ctx.support, ctx.in_bf16 = support, in_bf16()
        W_dec = _factor(W_dec, ctx.in_bf16)
        ctx.save_for_backward(values, W_dec)
        return _sums_of_rows(values, support.cols, support.offsets, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        support: Support = ctx.support
        d_out = _factor(d_out, ctx.in_bf16)
        d_values = d_W = None
        if ctx.needs_input_grad[0]:
            d_values = sampled_product(d_out, W_dec, support)
        if ctx.needs_input_grad[1]:
            order, offsets, rows = support.by_column
            d_W = _sums_of_rows(values[order], rows, offsets, d_out)
        return d_values, d_W, None


def _factor(x: Tensor, to_bf16: bool) -> Tensor:
    """x in the precision of a factor of a product."""
    return x.bfloat16() if to_bf16 else x


def _sums_of_rows(weights: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """out_i = sum of weights_e table[index_e] over e from offsets_i to offsets_{i + 1}."""
    if triton := triton_kernels(table):
        return triton.cuda.sums_of_rows(weights, index, offsets, table)
    return embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def sampled_product(left: Tensor, right: Tensor, support: Support) -> Tensor:
    """`[n]`: left_i . right_j for every entry (i, j) of the support; left `[B, d]`, right `[m, d]`."""
    if triton := triton_kernels(left):
        return triton.cuda.sampled_product(left, right, support.rows, support.cols)
    zeros = left.new_zeros(support.cols.numel())
    pattern = torch.sparse_csr_tensor(support.offsets, support.cols, zeros, support.shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
