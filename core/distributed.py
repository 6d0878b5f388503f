"""One dictionary over several processes: what they exchange. Without a process group all of this does nothing.

Every process (rank) runs the language model on its own rows and trains the same dictionary on its part of the global
batch, which is the ranks' batches in the order of the ranks. `stream.batch_size` and `stream.buffer_tokens` are global:
each of W ranks serves and holds 1 / W of them. Every step exchanges what depends on the whole batch:
  the gradient             its mean over ranks, as one sum of one flat vector (briefly a second copy of the gradient)
  BatchTopK's selection    every rank's candidates, at most B k numbers each; all ranks select the largest of them
  latents that fired       one byte each; and one number, the smallest entry kept
  aux=normalized           the mean and the variance of the error over the batch
  logged means             once per chunk of steps
All ranks make the same step, so their parameters stay equal. This is checked before a dictionary is stored.

Nothing is sharded: every rank holds the whole dictionary, its gradient, its moments, and a whole language model. So W
devices train faster, but a dictionary that does not fit on one device does not fit on W.

The processes are our own (`core.workers`). Lightning's launchers either run the command line again, which under a Hydra
sweep would start every cell in every rank, or fork and pickle objects that have a GPU open. Our workers are fresh, get
only the requests and a file to meet at, and know nothing of the sweep. Lightning's `DDPStrategy` uses their group and
does the rest (which rank saves and logs, barriers). Its wrapper around the module is left out (`core.training`): it
expects one backward pass per call of the module, and we make one for each of many dictionaries and steps.
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

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # of one rank waiting for another, for instance while text is tokenised or a model loads


@contextmanager
def group(rank: int, n_ranks: int, meeting_point: Path, on_gpu: bool) -> Iterator[None]:
    """Join the other ranks inside the block. `meeting_point` is a file that all can reach and that must not exist."""
    dist.init_process_group("nccl" if on_gpu else "gloo", f"file://{meeting_point}", TIMEOUT, n_ranks, rank)
    yield
    dist.destroy_process_group()  # not after an error: the others are still in the group, and the process ends anyway


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def n_ranks() -> int:
    return dist.get_world_size() if is_active() else 1


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def share(name: str, total: int, n: int) -> int:
    """The part of a global size for each of n ranks. Raises UserError if n does not divide it."""
    if total % n:
        raise UserError(f"{name} ({total:,}) must be a multiple of trainer.devices ({n}): each gets an equal part.")
    return total // n


# ---- exchange; every rank must call these, with tensors of the same shape


def from_first(make: Callable[[], T]) -> T:
    """On every rank, what `make` returns on rank 0. The other ranks do not call it."""
    if not is_active():
        return make()
    values = [make() if rank() == 0 else None]
    dist.broadcast_object_list(values)
    return cast(T, values[0])


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
    """bool, entry by entry: whether the mask is true on some rank."""
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
    """Replace every gradient by its mean over ranks. The same parameters must have a gradient on all ranks."""
    if not is_active():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.div_(n_ranks()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def check_equal(tensors: Iterable[Tensor]) -> None:
    """Raises RuntimeError unless every tensor has the same bits on all ranks."""
    if not is_active():
        return
    for tensor in tensors:
        bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        if not torch.equal(_reduced(bits, dist.ReduceOp.MIN), _reduced(bits, dist.ReduceOp.MAX)):
            raise RuntimeError("The ranks' dictionaries are not equal, so nothing is stored.")


def _reduced(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    x = x.detach().clone()
    dist.all_reduce(x, operation)
    return x
