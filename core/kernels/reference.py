"""Encoding and decoding as plain dense autograd. The sparse kernels must equal it. It is also the faster choice for
small dictionaries and for codes that are not sparse.

Shapes: B rows in the batch, d = d_model (or `2, d`, a pair of models), m = dict_size. Ties go to the entry with the
lower row-major position.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from core.kernels.codes import DenseCodes, entries_kept


def keep_largest(z: Tensor, n: int) -> Tensor:
    """bool mask of the `n` largest entries > 0 along the last axis, the earlier of equal ones first; NaN is largest."""
    order = z.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, True) & ~(z <= 0)


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, centre: Tensor | None = None) -> Tensor:
    """`[B, m]` = (x - centre) W_enc^T + b_enc."""
    return linear((x if centre is None else x - centre).flatten(1), W_enc.flatten(1), b_enc)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, centre: Tensor | None = None) -> DenseCodes:
    """The k largest entries > 0 of every row of the pre-activations; the selection is constant to the gradient."""
    z = pre_activations(x, W_enc, b_enc, centre)
    return DenseCodes(z.where(keep_largest(z.detach(), k), 0))


def encode_batchtopk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: float, centre: Tensor | None = None
) -> DenseCodes:
    """The B k largest entries > 0 of the whole matrix of pre-activations."""
    z = pre_activations(x, W_enc, b_enc, centre)
    keep = keep_largest(z.detach().flatten(), entries_kept(k, z.shape[0])).view_as(z)
    return DenseCodes(z.where(keep, 0))


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, centre: Tensor | None = None
) -> DenseCodes:
    """The entries above `threshold >= 0` (a scalar, or `[m]`, one per latent)."""
    z = pre_activations(x, W_enc, b_enc, centre)
    return DenseCodes(z.where(~(z <= threshold), 0))


def decode(codes: DenseCodes, W_dec: Tensor) -> Tensor:
    """`[B, m]`, `[m, d]` -> `[B, d]`, without the decoder's bias."""
    return (codes.values @ W_dec.flatten(1)).view(-1, *W_dec.shape[1:])
