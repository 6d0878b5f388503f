"""One dictionary over several processes: what they tell each other. Without a process group all of this does nothing.

Every process (rank) runs the language model on rows of its own and trains the same dictionary on its part of the global
batch, which is the ranks' batches in the order of the ranks. `stream.batch_size` and `stream.buffer_tokens` are global:
of W ranks each serves and holds the W-th part. What depends on the whole batch is exchanged, in every step:
  the gradient             its mean over ranks, one sum of one flat vector (a second copy of the gradient, for a moment)
  BatchTopK's selection    every rank's candidates, at most B k numbers each, of which all find the largest
  latents that fired       one byte each; the smallest entry kept, one number
  aux=normalized           the mean and the variance of the error over the batch
  logged means             once for every chunk of steps
Parameters then stay equal on all ranks, since every rank makes the same step; this is checked before one is stored.

Nothing is sharded: every rank holds the whole dictionary, its gradient, its moments, and a whole language model. So W
devices make a training faster, and a dictionary that does not fit on one does not fit on W.

The processes are ours (`core.workers`), not Lightning's: its launchers run the command line again, which under a Hydra
sweep starts every cell of the sweep anew in every rank, or fork and pickle what has a GPU open. Fresh workers that are
handed the requests and a file to meet at know nothing of the sweep. Lightning's `DDPStrategy` finds the group there and
does the rest (which rank saves and logs, barriers); its wrapper around the module is left out (`core.training`), as it
expects one backward pass for each call of the module, and ours has one for each of many dictionaries and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import UserError

Made = TypeVar("Made")
PATIENCE = timedelta(hours=2)  # of one rank for another: the first waits while text is tokenised or a model loads


@contextmanager
def group(rank: int, n_ranks: int, meeting_point: Path, on_gpu: bool) -> Iterator[None]:
    """Join the other ranks within. `meeting_point` is a file that all can reach and that is not there yet."""
    dist.init_process_group("nccl" if on_gpu else "gloo", f"file://{meeting_point}", PATIENCE, n_ranks, rank)
    yield
    dist.destroy_process_group()  # not after an error: the others are still in it, and the process ends at once


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def n_ranks() -> int:
    return dist.get_world_size() if is_active() else 1


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def share(name: str, total: int, n: int) -> int:
    """The part of a global size that each of n ranks has. Raises UserError if it is not whole."""
    if total % n:
        raise UserError(f"{name} ({total:,}) must be a multiple of trainer.devices ({n}): each has an equal part.")
    return total // n


# ---- exchange; every rank must call these, with tensors of one shape


def from_first(make: Callable[[], Made]) -> Made:
    """What `make` returns on rank 0; the others do not call it."""
    if not is_active():
        return make()
    made = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made)
    return cast(Made, made[0])


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """The mean over ranks."""
    return _reduced(x, dist.ReduceOp.SUM) / n_ranks() if is_active() else x.detach()


@torch.no_grad()
def minimum(x: Tensor) -> Tensor:
    """The smallest over ranks, entry by entry."""
    return _reduced(x, dist.ReduceOp.MIN) if is_active() else x.detach()


@torch.no_grad()
def anywhere(mask: Tensor) -> Tensor:
    """bool, entry by entry: whether it is true on some rank."""
    return _reduced(mask.to(torch.uint8), dist.ReduceOp.MAX).bool() if is_active() else mask


@torch.no_grad()
def all_rows(x: Tensor) -> Tensor:
    """`[B, ...]` of every rank -> `[W B, ...]`, in the order of the ranks."""
    if not is_active():
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n_ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def mean_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Put the mean over ranks in the place of every gradient. Which parameters have one is the same on all ranks."""
    if not is_active():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.div_(n_ranks()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def among_largest(values: Tensor, n: int) -> Tensor:
    """bool, for each of this rank's values `[c]`: whether it is one of the n largest > 0 of all ranks.

    Ties go to the lower rank, and within a rank to the value that stands first. NaN counts as the largest. Where there
    are more than n values, all are NaN, and the first n are looked at.
    """
    from core.kernels.select import mask_of_largest

    padded = values.new_zeros(n)
    padded[: values.numel()] = values[:n]
    begin, mask = rank() * n, torch.zeros_like(values, dtype=torch.bool)
    mask[:n] = mask_of_largest(all_rows(padded), n)[begin : begin + min(n, values.numel())]
    return mask


def check_equal(tensors: Iterable[Tensor]) -> None:
    """Raises RuntimeError unless every tensor has the same bits on all ranks."""
    if not is_active():
        return
    for tensor in tensors:
        bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        if not torch.equal(_reduced(bits, dist.ReduceOp.MIN), _reduced(bits, dist.ReduceOp.MAX)):
            raise RuntimeError("The ranks' dictionaries have drifted apart; nothing is stored.")


def _reduced(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    x = x.detach().clone()
    dist.all_reduce(x, operation)
    return x
