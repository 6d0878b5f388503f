"""Decoder rows (or columns) of unit norm: rescaling, and a gradient that does not work against it.

Shapes: m = dict_size, d = d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 2048  # so that the passes over a large matrix find it in the cache


@torch.no_grad()
def unit_rows_(W: Tensor) -> Tensor:
    """Rescale the rows of `[m, d]` to norm 1, in place."""
    for rows in W.split(ROWS_AT_ONCE):
        rows.div_(rows.norm(dim=1, keepdim=True))
    return W


@torch.no_grad()
def unit_columns_(W: Tensor) -> Tensor:
    """Rescale the columns of `[m, d]` to norm 1, in place."""
    return W.div_(W.norm(dim=0, keepdim=True))


@torch.no_grad()
def project_gradient(gradient: Tensor, W: Tensor) -> None:
    """Take from every row of the gradient `[m, d]` its part along the same row of W, in place."""
    for g, w in zip(gradient.split(ROWS_AT_ONCE), W.split(ROWS_AT_ONCE), strict=True):
        along = torch.linalg.vecdot(g, w) / torch.linalg.vecdot(w, w)
        g.addcmul_(along[:, None], w, value=-1)
