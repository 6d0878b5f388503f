"""Initial weights; decoder rows (or columns) of unit norm; and a gradient that does not work against that norm.

Shapes: m = dict_size, d = d_model. `axes` says how many trailing axes of W_dec one norm runs over: with `[m, d]` it is
1; with `[m, n_models, d]` 1 gives each model's row a norm of its own, and 2 gives both together one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from core.methods.settings import Settings
from core.seeding import generator

ROWS_AT_ONCE = 2048  # so that the passes over a large matrix find it in the cache


def uniform(bound: float, seed: int, *purpose: str | int, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape, uniform between -+ bound; the seed's generator is chosen by the purpose."""
    random = generator(seed, "init", *purpose, *shape)
    return torch.rand(shape, generator=random).mul_(2 * bound).sub_(bound)


def initial_rows(s: Settings) -> Tensor:
    """`[m, d]`, uniform with variance 2 / m (Kaiming with fan-in m): rows have a norm of about sqrt(2 d / m)."""
    return uniform(math.sqrt(6 / s.dict_size), s.seed, shape=(s.dict_size, s.d_model))


def initial_weights(s: Settings) -> tuple[nn.Parameter, ...]:
    """W_enc of `initial_rows`; W_dec the same rows at unit norm; b_enc and b_dec zero (the BatchTopK authors' code)."""
    W = initial_rows(s)
    biases = torch.zeros(s.dict_size), torch.zeros(s.d_model)
    return tuple(nn.Parameter(tensor) for tensor in (W, unit_rows_(W.clone()), *biases))


@torch.no_grad()
def unit_rows_(W: Tensor, axes: int = 1) -> Tensor:
    """Rescale the rows to norm 1, in place."""
    for rows in _rows(W, axes).split(ROWS_AT_ONCE):
        rows.div_(rows.norm(dim=1, keepdim=True))
    return W


@torch.no_grad()
def unit_columns_(W: Tensor) -> Tensor:
    """Rescale the columns of `[m, d]` to norm 1, in place."""
    return W.div_(W.norm(dim=0, keepdim=True))


@torch.no_grad()
def project_gradient(gradient: Tensor, W: Tensor, axes: int = 1) -> None:
    """Take from every row of the gradient its part along the same row of W, in place."""
    parts = (_rows(tensor, axes).split(ROWS_AT_ONCE) for tensor in (gradient, W))
    for g, w in zip(*parts, strict=True):
        along = torch.linalg.vecdot(g, w) / torch.linalg.vecdot(w, w)
        g.addcmul_(along[:, None], w, value=-1)


def _rows(W: Tensor, axes: int) -> Tensor:
    """A view `[rows, entries of one norm]`."""
    return W.view(-1, math.prod(W.shape[-axes:]))
