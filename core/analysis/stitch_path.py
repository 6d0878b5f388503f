"""Paths from a small dictionary to a large one (Leask et al. 2025): error, L0 and loss of the dictionaries on the way.

A path names the step that inserts each latent of the large dictionary, the step that removes each latent of the small
one, and the step that changes the decoder bias. Point s is the dictionary after step s; point 0 is the small one. A set
of latents inserted at once is a path of one step.

Shapes: B rows in a batch, d = d_model, n latents in the small and m in the large dictionary, S steps.
Memory: `PATH_ENTRIES` numbers for the reconstructions [b, S + 1, d] of a few rows at a time, and a few times as many
while they are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.analysis.held_out import HeldOut
from core.analysis.stitching import Components, Nearest, check_pair
from core.kernels import sparse
from core.kernels.codes import Codes, SparseCodes, entries
from core.methods.dictionary import Dictionary
from core.metrics.sparsity import firing_counts

PATH_ENTRIES = 1 << 24


@dataclass(frozen=True)
class StitchPath:
    """comes    int64 `[m]`: the step, 1 to S, that inserts each latent of the large dictionary; S + 1: none
    goes     int64 `[n]`: the step that removes each latent of the small dictionary; S + 1: none
    bias_at  the step that puts the large dictionary's decoder bias in place; S + 1: none
    phases   S names, the phase of each step
    """

    comes: Tensor
    goes: Tensor
    bias_at: int
    phases: tuple[str, ...]

    @property
    def n_steps(self) -> int:
        return len(self.phases)

    @property
    def n_latents(self) -> Tensor:
        """int64 `[S + 1]`: latents of the dictionary at each point."""
        return self._summed(torch.ones_like(self.comes), torch.ones_like(self.goes))

    def _summed(self, of_large: Tensor, of_small: Tensor) -> Tensor:
        """`[S + 1]`: the sum over the latents present at each point."""
        coming = of_large.new_zeros(self.n_steps + 2).index_add(0, self.comes, of_large).cumsum(0)
        going = of_small.new_zeros(self.n_steps + 2).index_add(0, self.goes, of_small).cumsum(0)
        return (coming + of_small.sum() - going)[:-1]


def insertion(chosen: Tensor, n_small: int) -> StitchPath:
    """Insert the chosen latents, bool `[m]`, at once."""
    return StitchPath(torch.where(chosen, 1, 2), torch.full((n_small,), 2), 2, ("insert",))


def insertion_in_order(values: Tensor, alive: Tensor, n_small: int, n_steps: int) -> StitchPath:
    """Insert the latents that are alive, bool `[m]`, by ascending value `[m]`, an equal number in each step."""
    comes = torch.full(values.shape, n_steps + 1)
    chosen = alive.nonzero().flatten()
    comes[chosen[values[chosen].argsort(stable=True)]] = _steps(torch.ones(len(chosen)), n_steps)
    return StitchPath(comes, torch.full((n_small,), n_steps + 1), n_steps + 1, ("insert",) * n_steps)


def interpolation(near: Nearest, graph: Components, n_steps_each: int) -> StitchPath:
    """From the small dictionary to the large one, each of three phases in `n_steps_each` steps:

    insert  latents of the large dictionary without a similar one, by ascending cosine
    swap    whole components of similar latents, the most similar first: those of the small one by those of the large
    one remove  the small dictionary's latents without a similar one; a last step changes the decoder bias
    """
    cosine = near.cosine.cpu()
    S = 3 * n_steps_each + 1
    comes, goes = torch.full(graph.large.shape, S), torch.full(graph.small.shape, S)
    alone = (~graph.paired[graph.large]).nonzero().flatten()
    comes[alone[cosine[alone].argsort(stable=True)]] = _steps(torch.ones(len(alone)), n_steps_each)

    best = torch.full(graph.paired.shape, -torch.inf).scatter_reduce(0, graph.large, cosine, "amax")
    pairs = graph.paired.nonzero().flatten()
    pairs = pairs[best[pairs].argsort(descending=True, stable=True)]
    step_of = torch.full(graph.paired.shape, S)
    step_of[pairs] = n_steps_each + _steps(graph.sizes[pairs].double(), n_steps_each)
    paired_large, paired_small = graph.paired[graph.large], graph.paired[graph.small]
    comes[paired_large] = step_of[graph.large[paired_large]]
    goes[paired_small] = step_of[graph.small[paired_small]]

    unpaired = (~paired_small).nonzero().flatten()
    goes[unpaired] = 2 * n_steps_each + _steps(torch.ones(len(unpaired)), n_steps_each)
    phases = [name for name in ("insert", "swap", "remove") for _ in range(n_steps_each)]
    return StitchPath(comes, goes, S, (*phases, "bias"))


def _steps(weights: Tensor, n_steps: int) -> Tensor:
    """int64: the step, 1 to `n_steps`, of each item in order; steps have about equal weight."""
    before = weights.cumsum(0) - weights
    return (before * n_steps / weights.sum()).long().clamp(max=n_steps - 1) + 1


@dataclass(frozen=True)
class Curve:
    """At the S + 1 points of a path: fp64 each.

    mse        mean squared error per coordinate
    mse_refit  the same with the best decoder bias for the point, the mean of x - f W over the rows
    l0         mean number of active latents in a row
    shift      `[S + 1, d]`: the best bias minus the point's own, in normalised space
    """

    mse: Tensor
    mse_refit: Tensor
    l0: Tensor
    shift: Tensor


def lowest(path: StitchPath, curve: Curve, values: Tensor) -> float:
    """The value up to which `insertion_in_order` should insert: there the error is lowest."""
    best = int(curve.mse.argmin())
    inserted, rest = values[path.comes <= best], values[(path.comes > best) & (path.comes <= path.n_steps)]
    if not len(inserted) or not len(rest):
        return float(rest.min()) if len(rest) else float(inserted.max()) + 1e-6
    return float(inserted.max() + rest.min()) / 2


@torch.no_grad()
def walk(
    small: Dictionary, large: Dictionary, batches: Iterable[Tensor], paths: Mapping[str, StitchPath]
) -> dict[str, Curve]:
    """Score every point of several paths in one pass over batches `[B, d]` of raw activations.

    Raises UserError for dictionaries that do not fit together.
    """
    check_pair(small, large)
    d, device = small.d_model, small.W_dec.device
    errors = {k: torch.zeros(p.n_steps + 1, dtype=torch.float64, device=device) for k, p in paths.items()}
    residuals = {k: torch.zeros(p.n_steps + 1, d, dtype=torch.float64, device=device) for k, p in paths.items()}
    fired = [torch.zeros(method.dict_size, dtype=torch.int64, device=device) for method in (small, large)]
    n = 0
    for batch in batches:
        for part in batch.split(_rows_at_a_time(paths, d)):
            x = small.norm(part)[0]
            codes = small.encode(x), large.encode(x)
            for key, path in paths.items():
                r = x[:, None] - _along(path, small, large, *codes)  # [b, S + 1, d]
                errors[key] += torch.linalg.vecdot(r, r).sum(0, dtype=torch.float64)
                residuals[key] += r.sum(0, dtype=torch.float64)
            for counts, code in zip(fired, codes, strict=True):
                counts += firing_counts(code)
            n += len(x)
    return {
        key: Curve(
            errors[key].cpu() / (n * d),
            ((errors[key] / n - (residuals[key] / n).square().sum(1)) / d).cpu(),
            path._summed(fired[1].cpu(), fired[0].cpu()).double() / n,
            residuals[key].cpu() / n,
        )
        for key, path in paths.items()
    }


@torch.no_grad()
def losses_along(
    small: Dictionary,
    large: Dictionary,
    path: StitchPath,
    held_out: HeldOut,
    shift: Tensor | None = None,
) -> Tensor:
    """The language model's loss on the downstream rows, fp64 nats per token `[S + 1]`, with each point's reconstruction
    at all positions. `shift` `[S + 1, d]` is added to the decoder bias of each point: a `Curve`'s refits it."""
    check_pair(small, large)
    lm, rows = held_out.lm, held_out.downstream_rows  # [R, T]
    shift = None if shift is None else shift.to(lm.device, torch.float32)
    size = max(1, min(held_out.rows_per_batch, _rows_at_a_time({"": path}, small.d_model) // rows.shape[1]))
    total = torch.zeros(path.n_steps + 1, dtype=torch.float64, device=lm.device)
    for first in range(0, len(rows), size):
        here = slice(first, min(first + size, len(rows)))
        tokens, activations = rows[here].to(lm.device), held_out.activations(here)
        x, of_tokens = small.norm(activations.flatten(0, 1))
        x_hats = _along(path, small, large, small.encode(x), large.encode(x))
        if shift is not None:
            x_hats = x_hats + shift
        for point, x_hat in enumerate(x_hats.unbind(1)):
            raw = small.norm.undo(x_hat, of_tokens).view(activations.shape).to(activations.dtype)
            logits = lm.logits_with(raw, tokens, held_out.site)[:, :-1].flatten(0, 1).float()
            total[point] += F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").double()
    return total.cpu() / rows[:, 1:].numel()


def _rows_at_a_time(paths: Mapping[str, StitchPath], d: int) -> int:
    return max(1, PATH_ENTRIES // (d * max(path.n_steps + 1 for path in paths.values())))


def _along(path: StitchPath, small: Dictionary, large: Dictionary, codes_small: Codes, codes_large: Codes) -> Tensor:
    """Reconstructions at every point, `[B, S + 1, d]`. Sums are ordered so that the small dictionary's part is exactly
    0 once all its latents are removed."""
    n_points = path.n_steps + 1
    coming = _sums_by(path.comes, n_points, codes_large, large.W_dec).cumsum(1)
    staying = _sums_by(path.goes - 1, n_points, codes_small, small.W_dec).flip(1).cumsum(1).flip(1)
    switched = torch.arange(n_points, device=coming.device)[:, None] >= path.bias_at
    return coming + staying + torch.where(switched, large.b_dec, small.b_dec)


def _sums_by(group: Tensor, n_groups: int, codes: Codes, W_dec: Tensor) -> Tensor:
    """Codes `[B, m]` decoded group by group, `[B, n_groups, d]`. `group` `[m]`; latents of higher groups do not
    count."""
    rows, cols, values = entries(codes)
    at = group.to(cols.device)[cols]
    kept = at < n_groups
    place, order = (rows * n_groups + at)[kept].sort(stable=True)
    n_places = codes.shape[0] * n_groups
    split = SparseCodes(place, cols[kept][order], values[kept][order], (n_places, codes.shape[1]))
    return sparse.decode(split, W_dec).view(codes.shape[0], n_groups, -1)
