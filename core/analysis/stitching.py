"""Stitching (Leask et al. 2025): which latents of a large dictionary are new to a small one at the same site.

A latent of the large dictionary, inserted alone into the small one, lowers the small one's error (novel) or does not
(reconstruction). The change has a closed form, so that one product per batch scores all latents: with the small
dictionary's residual r = x - x_hat, the latent's activation f_i and its decoder row w_i,
    dMSE_i = E[-2 f_i (r . w_i) + f_i^2 |w_i|^2] / d
Insertion changes neither the small dictionary's decoder bias nor the encoders. Everything is measured in the
dictionaries' space, after their input normalisation, as means over coordinates.

Shapes: B rows in a batch, d = d_model, n latents in the small and m in the large dictionary, K blocks of rows.
Memory beyond the weights: the codes of one batch, at most [B, n + m] numbers if they are dense, and sums [K, m] in
fp64; never [n_rows, m]. Similarities are computed in chunks of `CHUNK_ENTRIES` numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from core.errors import UserError
from core.kernels.codes import Codes, SparseCodes
from core.kernels.sparse import sampled_product
from core.methods.dictionary import Dictionary
from core.metrics.sparsity import firing_counts
from core.seeding import derived_seed
from core.streams.decoder_rows import directions

CHUNK_ENTRIES = 1 << 24  # similarities, or resampled means, computed at a time: 64 or 128 MiB
CLASSES = ("novel", "reconstruction", "undecided", "dead")
NOVEL, RECONSTRUCTION, UNDECIDED, DEAD = range(4)
PAPER_THRESHOLD = 0.7  # cosine below which the paper calls a latent novel without inserting it


def check_pair(small: Dictionary, large: Dictionary) -> None:
    """Raises UserError unless both dictionaries can read the same activations: equal d, site and normalisation."""
    if small is large:
        raise UserError("small and large are the same dictionary: stitching needs two of a family.")
    if small.d_model != large.d_model:
        raise UserError(
            f"The small dictionary has d_model={small.d_model}, the large one {large.d_model}: stitching needs two "
            "dictionaries of one site of one model."
        )
    hooks = [getattr(method, "source", {}).get("hook") for method in (small, large)]
    if None not in hooks and hooks[0] != hooks[1]:
        raise UserError(f"The dictionaries were made for {hooks[0]} and {hooks[1]}: stitching needs one site.")
    if small.norm.kind != large.norm.kind:
        raise UserError(
            f"input_norm: the small dictionary has {small.norm.kind!r}, the large one {large.norm.kind!r}; their "
            "errors cannot be compared. Take two with the same."
        )
    if not torch.equal(small.norm.scale, large.norm.scale):
        raise UserError(
            f"input_norm=scalar: the dictionaries divide by {float(small.norm.scale):.6g} and "
            f"{float(large.norm.scale):.6g}; train both on one stream."
        )
    if small.training or large.training:
        raise ValueError("Stitching uses the rule of inference: call eval() on both dictionaries.")


# ---- what inserting each latent changes


@dataclass(frozen=True)
class LatentScores:
    """Sums over rows of activations, from which every figure follows.

    changes       fp64 `[K, m]`: change of the squared error by inserting a latent alone, over the rows of a block
    n_rows        fp64 `[K]`: rows in each block
    fired         int64 `[m]`: at how many rows each large latent fires
    error_small, error_large    squared errors of the two unchanged dictionaries
    active_small, active_large  active latents, summed over rows
    """

    changes: Tensor
    n_rows: Tensor
    fired: Tensor
    error_small: float
    error_large: float
    active_small: float
    active_large: float
    d_model: int

    @property
    def total_rows(self) -> float:
        return float(self.n_rows.sum())

    @property
    def delta_mse(self) -> Tensor:
        """fp64 `[m]`."""
        return self.changes.sum(0) / (self.total_rows * self.d_model)

    @property
    def dead(self) -> Tensor:
        """bool `[m]`: never active on these rows."""
        return self.fired == 0

    def metrics(self) -> dict[str, float]:
        n, nd = self.total_rows, self.total_rows * self.d_model
        return {
            "n_rows_scored": n,
            "mse_small": self.error_small / nd,
            "mse_large": self.error_large / nd,
            "l0_small": self.active_small / n,
            "l0_large": self.active_large / n,
        }

    def interval(self, seed: int, confidence: float = 0.95, n_resamples: int = 1000) -> tuple[Tensor, Tensor]:
        """Ends of the percentile bootstrap interval of `delta_mse` over blocks, fp64 `[m]` each.

        Raises UserError for fewer than 8 blocks."""
        K = len(self.changes)
        if K < 8:
            raise UserError(f"The bootstrap needs 8 batches of text rows or more, not {K}: raise evaluation.n_rows.")
        rng = np.random.default_rng(derived_seed(seed, "stitching", "bootstrap"))
        draws = torch.from_numpy(rng.multinomial(K, np.full(K, 1 / K), size=n_resamples)).double()
        draws = draws.to(self.changes.device)
        rows = (draws @ self.n_rows)[:, None] * self.d_model  # [resamples, 1]
        ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64, device=draws.device)
        width = max(1, CHUNK_ENTRIES // (2 * n_resamples))
        parts = [torch.quantile(draws @ part / rows, ends, dim=0) for part in self.changes.split(width, 1)]
        low, high = torch.cat(parts, 1)
        return low, high

    def classes(self, seed: int, confidence: float = 0.95, n_resamples: int = 1000) -> Tensor:
        """int64 `[m]`, indices into `CLASSES`: novel if the whole interval of dMSE is below 0, reconstruction if all of
        it is above 0, dead if the latent never fired."""
        low, high = self.interval(seed, confidence, n_resamples)
        classes = torch.full_like(self.fired, UNDECIDED)
        classes[high < 0] = NOVEL
        classes[low > 0] = RECONSTRUCTION
        classes[self.dead] = DEAD
        return classes


@torch.no_grad()
def score_latents(small: Dictionary, large: Dictionary, batches: Iterable[Tensor], n_blocks: int = 64) -> LatentScores:
    """Score all latents of `large` against `small` on batches `[B, d]` of raw activations, each of whole text rows.

    Batch i belongs to block i modulo `n_blocks`. With sparse codes, a latent costs time only at the rows where it
    fires. Raises UserError for dictionaries that do not fit together (`check_pair`), and for batches without rows.
    """
    check_pair(small, large)
    device, m = large.W_dec.device, large.dict_size
    changes = torch.zeros(n_blocks, m, dtype=torch.float64, device=device)
    n_rows = torch.zeros(n_blocks, dtype=torch.float64, device=device)
    fired = torch.zeros(m, dtype=torch.int64, device=device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # as the last four of LatentScores
    squared_norms = large.W_dec.square().sum(1)  # [m]
    n_batches = 0
    for x in batches:
        x = small.norm(x)[0]
        codes_small, codes_large = small.encode(x), large.encode(x)
        r = x - small.decode(codes_small)  # [B, d]
        block = n_batches % n_blocks
        changes[block] += changes_of_error(codes_large, r, large.W_dec, squared_norms)
        n_rows[block] += len(x)
        fired += firing_counts(codes_large)
        sums[0] += r.double().square().sum()
        sums[1] += (x - large.decode(codes_large)).double().square().sum()
        sums[2] += codes_small.l0() * len(x)
        sums[3] += codes_large.l0() * len(x)
        n_batches += 1
    if not n_batches or not n_rows.sum() > 0:
        raise UserError("There are no activations to score latents on: raise evaluation.n_rows.")
    if not bool(changes.isfinite().all()):
        raise FloatingPointError("The changes of the error are not finite: look for NaN in the activations.")
    used = min(n_batches, n_blocks)
    error_small, error_large, active_small, active_large = sums.tolist()
    return LatentScores(
        changes[:used], n_rows[:used], fired, error_small, error_large, active_small, active_large, small.d_model
    )


def changes_of_error(codes: Codes, r: Tensor, W_dec: Tensor, squared_norms: Tensor) -> Tensor:
    """Sum over rows of -2 f_i (r . w_i) + f_i^2 |w_i|^2 for every latent: codes `[B, m]`, r `[B, d]` -> fp64 `[m]`."""
    if isinstance(codes, SparseCodes):
        f, cols = codes.values, codes.cols
        terms = f * (f * squared_norms[cols] - 2 * sampled_product(r, W_dec, codes.support))
        return torch.bincount(cols, weights=terms.double(), minlength=codes.shape[1])
    sums = []
    width = max(1, CHUNK_ENTRIES // len(r))
    for f, W, norms in zip(codes.dense().split(width, 1), W_dec.split(width), squared_norms.split(width), strict=True):
        sums.append((f * torch.addcmul(-2 * (r @ W.T), f, norms)).sum(0, dtype=torch.float64))
    return torch.cat(sums)


class Error(NamedTuple):
    """A dictionary's mean squared error per coordinate, the same with the best decoder bias, and mean L0."""

    mse: float
    mse_refit: float
    l0: float


@torch.no_grad()
def error_and_bias(method: Dictionary, batches: Iterable[Tensor]) -> tuple[Error, Tensor]:
    """The dictionary's score on batches `[B, d]` of raw activations; and the refitted bias `[d]`, in normalised space,
    which is the mean of x - f W over them."""
    total = torch.zeros(method.d_model, dtype=torch.float64, device=method.W_dec.device)
    error, active, n = total.new_zeros(()), total.new_zeros(()), 0
    for x in batches:
        x = method.norm(x)[0]
        codes = method.encode(x)
        r = (x - method.decode(codes)).double()
        total, error = total + r.sum(0), error + r.square().sum()
        active, n = active + codes.l0() * len(x), n + len(x)
    refit = error / n - (total / n).square().sum()
    scored = Error(float(error) / n / method.d_model, float(refit) / method.d_model, float(active) / n)
    return scored, method.b_dec + (total / n).float()


# ---- similarity of decoder rows


class Nearest(NamedTuple):
    """For every latent of the large dictionary `[m]`: the largest cosine with a row of the small one, and which row."""

    cosine: Tensor
    partner: Tensor


def _similarities(small: Dictionary, large: Dictionary) -> Iterator[tuple[int, Tensor]]:
    """(first latent, cosines `[chunk, n]`) of the large dictionary's latents with all of the small one's, in chunks."""
    check_pair(small, large)
    W_small, W_large = directions(small.W_dec, "small"), directions(large.W_dec, "large")
    n_rows = max(1, CHUNK_ENTRIES // len(W_small))
    for first in range(0, len(W_large), n_rows):
        yield first, W_large[first : first + n_rows] @ W_small.T


def nearest(small: Dictionary, large: Dictionary) -> Nearest:
    """c_i = max_j cos(w_i of the large dictionary, w_j of the small one), and that j."""
    best = [cosines.max(1) for _, cosines in _similarities(small, large)]
    return Nearest(torch.cat([part.values for part in best]), torch.cat([part.indices for part in best]))


class Components(NamedTuple):
    """Connected components of the bipartite graph of similar latents, labelled from 0; int64 `[n]` and `[m]`.

    `paired`, bool `[n_components]`: the component has latents of both dictionaries.
    """

    small: Tensor
    large: Tensor
    paired: Tensor

    @property
    def sizes(self) -> Tensor:
        """int64 `[n_components]`: latents of both dictionaries."""
        return torch.cat([self.small, self.large]).bincount(minlength=len(self.paired))


def components(small: Dictionary, large: Dictionary, threshold: float) -> Components:
    """Join latents of the two dictionaries if cos >= threshold. Memory: the edges, and one chunk of cosines."""
    rows, cols = [], []
    for first, cosines in _similarities(small, large):
        row, col = (cosines >= threshold).nonzero(as_tuple=True)
        rows.append((row + first).cpu().numpy())
        cols.append(col.cpu().numpy())
    n, m = small.dict_size, large.dict_size
    edges = (np.concatenate(rows) + n, np.concatenate(cols))
    graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(n + m, n + m))
    count, labels = connected_components(graph, directed=False)
    paired = np.intersect1d(labels[:n], labels[n:])
    label = torch.from_numpy(labels.astype(np.int64))
    both = torch.zeros(count, dtype=torch.bool).index_fill(0, torch.from_numpy(paired.astype(np.int64)), True)
    return Components(label[:n], label[n:], both)


def parents(near: Nearest, n_small: int, threshold: float) -> Components:
    """The same with one edge from each large latent, to the most similar small one: a component is a small latent and
    its children. At a low threshold these components stay small, while those of `components` merge into one."""
    cosine, partner = near.cosine.cpu(), near.partner.cpu()
    alone = cosine < threshold
    large = partner.where(~alone, n_small + alone.cumsum(0) - 1)
    paired = torch.zeros(n_small + int(alone.sum()), dtype=torch.bool).index_fill(0, partner[~alone], True)
    return Components(torch.arange(n_small), large, paired)


# ---- how well the cosine predicts the change


@dataclass(frozen=True)
class Prediction:
    """The rule `novel if c_i < threshold` against dMSE_i < 0.

    auc        P(c of a novel latent < c of another)
    spearman   rank correlation of c and dMSE
    threshold  where the mean of the two classes' accuracies is highest, on these same latents
    """

    auc: float
    spearman: float
    threshold: float
    balanced_accuracy: float
    balanced_accuracy_paper: float  # at the paper's threshold


def predict_novel(cosine: Tensor, delta_mse: Tensor) -> Prediction | None:
    """For the given latents, `[l]` each, without dead ones. None if all have one class or one cosine."""
    c, change = cosine.double().cpu().numpy(), delta_mse.cpu().numpy()
    novel = change < 0
    if novel.all() or not novel.any() or (c == c[0]).all():
        return None
    false_positive, true_positive, scores = roc_curve(novel, -c, drop_intermediate=False)
    best = int(np.argmax(true_positive - false_positive))
    accuracy = (true_positive + 1 - false_positive) / 2
    above = c[c > -scores[best]] if best else c
    edge = float(above.min()) if len(above) else 1.0
    threshold = edge if best == 0 else (edge - float(scores[best])) / 2  # between two latents
    below = c < PAPER_THRESHOLD
    paper = (below[novel].mean() + (~below)[~novel].mean()) / 2
    rank = float(spearmanr(c, change).statistic)
    return Prediction(float(roc_auc_score(novel, -c)), rank, threshold, float(accuracy[best]), float(paper))
