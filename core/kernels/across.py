"""BatchTopK's selection over the global batch, if several ranks each have a part of it (`core.distributed`).

Every rank selects the largest entries of its own part, as many as the global batch may keep, so that no kept entry is
missing. Then it learns which of them are among the largest of all ranks' candidates.

Shapes: B rows in this rank's batch, d = d_model, m = dict_size, n = entries kept. Ties go to the lower rank, then
to the lower row-major position, which is the lower position in the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core import distributed
from core.kernels.codes import Support, entries_kept
from core.kernels.select import Selected, mask_of_largest, select_batchtopk


def select_global_batchtopk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: float, sizes: Tensor | None = None
) -> Selected:
    """This rank's part of the W B k largest entries > 0 of x W_enc^T + b_enc over all W ranks: support and values. They
    are multiplied by `sizes` `[m]`, where it is given, before they are compared."""
    support, values = select_batchtopk(x, W_enc, b_enc, k * distributed.n_ranks(), sizes)
    if not distributed.is_active():
        return support, values
    kept = among_largest(values, entries_kept(k, x.shape[0] * distributed.n_ranks()))
    return Support(support.rows[kept], support.cols[kept], support.shape), values[kept]


def mask_of_batchtopk(z: Tensor, k: float) -> Tensor:
    """bool `[B, m]`: the same selection, from given pre-activations."""
    flat = z.flatten()
    n = entries_kept(k, z.shape[0] * distributed.n_ranks())
    mask = mask_of_largest(flat, n)
    if distributed.is_active():
        candidates = mask.nonzero().squeeze(1)
        mask[candidates[~among_largest(flat[candidates], n)]] = False
    return mask.view_as(z)


@torch.no_grad()
def among_largest(values: Tensor, n: int) -> Tensor:
    """bool, for each of this rank's values `[c]`: whether it is among the n largest > 0 of all ranks.

    Ties go to the lower rank, and within a rank to the earlier value. NaN counts as the largest. c is above n only if
    all values are NaN; then only the first n count.
    """
    padded = values.new_zeros(n)
    padded[: values.numel()] = values[:n]
    begin, mask = distributed.rank() * n, torch.zeros_like(values, dtype=torch.bool)
    mask[:n] = mask_of_largest(distributed.all_rows(padded), n)[begin : begin + min(n, values.numel())]
    return mask
