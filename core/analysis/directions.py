"""Comparing decoder directions: sparse regression, nearest latents, shared neighbours, split latents.

Shapes: N rows, A atoms, d = d_model, M meta-latents; all directions are unit rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.sparse import csr_array, triu
from torch import Tensor
from torch.nn.functional import embedding_bag

from core.errors import UserError
from core.kernels.codes import SparseCodes

SIMILAR = 0.7  # latents of two dictionaries above this cosine count as the same, or as split (Leask et al. 2025)
FLOORS = (0.5, 0.3, 0.2, 0.1, 0.0)  # of the cosines that are collected; the next one only if the one before is too high
BISECTIONS = 30


@torch.no_grad()
def matching_pursuit(rows: Tensor, atoms: Tensor, k: int, rows_at_once: int = 4096) -> Tensor:
    """Orthogonal matching pursuit: `[N, d]` rebuilt from k atoms of `[A, d]` each, with coefficients of either sign.

    Each step chooses the unit-norm atom with the largest |correlation| with the residual, then fits all chosen atoms by
    least squares (Pati et al. 1993). It uses the Gram matrix, so that a step costs one product with it.
    Raises UserError unless 1 <= k <= min(A, d).
    """
    if not 1 <= k <= min(atoms.shape):
        raise UserError(f"meta.method.k={k}: a pursuit needs 1 to {min(atoms.shape)} atoms per row.")
    gram = atoms @ atoms.T  # [A, A]
    return torch.cat([_pursue(part, atoms, gram, k) for part in rows.split(rows_at_once)])


def _pursue(rows: Tensor, atoms: Tensor, gram: Tensor, k: int) -> Tensor:
    n = len(rows)
    correlation = rows @ atoms.T  # [n, A]
    residual = correlation.clone()
    chosen = torch.empty(n, 0, dtype=torch.long, device=rows.device)
    weights = rows.new_zeros(n, 0)
    for _ in range(k):
        free = residual.abs().scatter_(1, chosen, -1.0)
        chosen = torch.cat([chosen, free.argmax(1, keepdim=True)], 1)  # [n, j]
        G = gram[chosen.unsqueeze(2), chosen.unsqueeze(1)].double()  # [n, j, j]
        target = correlation.gather(1, chosen).double().unsqueeze(2)
        weights = torch.linalg.lstsq(G, target).solution.squeeze(2).to(rows.dtype)
        residual = correlation - embedding_bag(chosen, gram, mode="sum", per_sample_weights=weights)
    return embedding_bag(chosen, atoms, mode="sum", per_sample_weights=weights)


@torch.no_grad()
def max_cosines(a: Tensor, b: Tensor, within: bool = False, rows_at_once: int = 4096) -> tuple[Tensor, Tensor]:
    """The largest cosine of each unit row of a `[P, d]` with a unit row of b `[Q, d]`, and which: `[P]`, `[P]`.

    within  a and b are the same set, and a row is not compared with itself
    """
    values, indices = [], []
    for start in range(0, len(a), rows_at_once):
        cosines = a[start : start + rows_at_once] @ b.T
        if within:
            here = torch.arange(len(cosines), device=a.device)
            cosines[here, here + start] = -torch.inf
        best = cosines.max(1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), torch.cat(indices)


def p_larger(a: Tensor, b: Tensor) -> float:
    """One-sided Mann-Whitney p-value that values of `a` are stochastically larger than those of `b`."""
    return float(stats.mannwhitneyu(a.cpu().numpy(), b.cpu().numpy(), alternative="greater").pvalue)


# ---- which latents are related: through meta-latents, or through latents of a smaller dictionary


class GraphOverlap(NamedTuple):
    """Two graphs over the same latents. The first joins those that share a meta-latent, the second those near the same
    latent of a smaller dictionary."""

    n_edges: int  # of the first
    n_edges_neighbours: int  # of the second, as close to `n_edges` as a cosine allows
    cosine: float  # above which a latent is near
    shared: float  # share of the first's edges that the second has
    chance: float  # the expected share for random edges

    def metrics(self) -> dict[str, float]:
        return {
            "graph_shared": self.shared,
            "graph_shared_by_chance": self.chance,
            "graph_edges": float(self.n_edges),
            "graph_edges_neighbours": float(self.n_edges_neighbours),
            "graph_cosine": self.cosine,
        }


def graph_overlap(codes: SparseCodes, rows: Tensor, small: Tensor) -> GraphOverlap:
    """How much sharing a meta-latent coincides with sharing a neighbour, at equal numbers of edges (Leask et al. 2025).

    codes `[N, M]` of unit rows `[N, d]`; `small` `[A, d]` are the decoder directions of a smaller dictionary.
    """
    by_meta = _edges(_incidence(codes.rows.cpu().numpy(), codes.cols.cpu().numpy(), codes.shape))
    n = by_meta.nnz
    near, cosine = _neighbours_with(rows, small, n)
    by_neighbour = _edges(near)
    n_pairs = len(rows) * (len(rows) - 1) / 2
    both = by_meta.multiply(by_neighbour).nnz
    return GraphOverlap(n, by_neighbour.nnz, cosine, both / max(1, n), by_neighbour.nnz / n_pairs)


def _incidence(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> csr_array:
    return csr_array((np.ones(len(rows), dtype=np.int32), (rows, cols)), shape=shape)


def _edges(incidence: csr_array) -> csr_array:
    """Pairs of rows, i < j, that have a column in common."""
    return triu(incidence @ incidence.T, k=1, format="csr")


def _neighbours_with(rows: Tensor, small: Tensor, n_edges: int) -> tuple[csr_array, float]:
    """Incidence of rows and small latents above a cosine, the largest one that gives at least `n_edges` edges."""
    for floor in FLOORS:
        value, i, j = _cosines_above(rows, small, floor)
        shape = (len(rows), len(small))
        if _at_least(_incidence(i, j, shape), n_edges) or floor == FLOORS[-1]:
            break
    low, high = floor, 1.0 + 1e-6
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        kept = value > middle
        low, high = (middle, high) if _at_least(_incidence(i[kept], j[kept], shape), n_edges) else (low, middle)
    kept = value > low
    return _incidence(i[kept], j[kept], shape), low


def _at_least(incidence: csr_array, n_edges: int) -> bool:
    """Whether there are that many edges. They are counted only if the columns' sizes do not decide it."""
    sizes = np.bincount(incidence.indices, minlength=1).astype(np.int64)
    pairs = sizes * (sizes - 1) // 2
    if pairs.max() >= n_edges:
        return True
    return bool(pairs.sum() >= n_edges and _edges(incidence).nnz >= n_edges)


def _cosines_above(
    rows: Tensor, small: Tensor, floor: float, rows_at_once: int = 4096
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, i, j = [], [], []
    for start in range(0, len(rows), rows_at_once):
        cosines = rows[start : start + rows_at_once] @ small.T
        at = (cosines > floor).nonzero()
        values.append(cosines[at[:, 0], at[:, 1]].cpu().numpy())
        i.append((at[:, 0] + start).int().cpu().numpy())
        j.append(at[:, 1].int().cpu().numpy())
    return np.concatenate(values), np.concatenate(i), np.concatenate(j)


# ---- latents of one dictionary that split in a larger one


def split_pairs(small: Tensor, large: Tensor, threshold: float = SIMILAR) -> Tensor:
    """int64 `[P, 2]`: (latent of `small`, latent of `large`) above the cosine, if the first has two or more of them."""
    _, i, j = _cosines_above(small, large, threshold)
    splits = np.bincount(i, minlength=len(small))[i] > 1 if len(i) else np.zeros(0, dtype=bool)
    return torch.from_numpy(np.stack([i[splits], j[splits]], 1).astype(np.int64))


class Inheritance(NamedTuple):
    """How many meta-latents children share with the latent that split into them: means over pairs of parent and
    child."""

    n_pairs: int
    parent: float  # meta-latents of a parent
    child: float  # meta-latents of a child
    kept: float  # share of the parent's meta-latents that the child has too
    kept_by_others: float  # the same, averaged over all latents of the larger dictionary

    def metrics(self) -> dict[str, float]:
        return {
            "split_pairs": float(self.n_pairs),
            "split_parent_meta": self.parent,
            "split_child_meta": self.child,
            "split_kept": self.kept,
            "split_kept_by_others": self.kept_by_others,
        }


def inheritance(codes: SparseCodes, pairs: Tensor, others: Sequence[int]) -> Inheritance:
    """Compare codes `[N, M]` of parents and children: `pairs` `[P, 2]` are rows of the codes. For `kept_by_others` each
    parent is paired with every row from `others[0]` to `others[1] - 1`. Parents without a meta-latent do not count.
    """
    C = _incidence(codes.rows.cpu().numpy(), codes.cols.cpu().numpy(), codes.shape)
    n_active = np.diff(C.indptr)
    parents, children = pairs[n_active[pairs[:, 0].numpy()] > 0].T.numpy()
    if not len(parents):
        return Inheritance(0, 0.0, 0.0, 0.0, 0.0)
    kept = C[parents].multiply(C[children]).sum(1)
    by_others = C[parents] @ np.asarray(C[others[0] : others[1]].mean(0)).ravel()
    return Inheritance(
        n_pairs=len(parents),
        parent=float(n_active[parents].mean()),
        child=float(n_active[children].mean()),
        kept=float((np.asarray(kept).ravel() / n_active[parents]).mean()),
        kept_by_others=float((by_others / n_active[parents]).mean()),
    )
