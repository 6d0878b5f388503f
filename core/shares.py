"""How a group of dictionaries is split over processes, and which part of the machine each process may use."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import torch

from core.errors import UserError


def number_of_processes(setting: object, accelerator: str) -> int:
    """`trainer.processes` as a number: `auto` is one per GPU, and one on a CPU.

    On a CPU, more processes only share the same threads, and each runs the language model again. Raises UserError.
    """
    if setting == "auto":
        return len(gpus(accelerator)) or 1
    return _positive("trainer.processes", setting)


def number_of_cell_processes(setting: object, n_cells: int) -> int:
    """`trainer.cell_processes` as a number, at most one per cell: `auto` is one per core. Raises UserError."""
    n = _n_cores() if setting == "auto" else _positive("trainer.cell_processes", setting)
    return min(n, n_cells)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(name: str, setting: object) -> int:
    if isinstance(setting, bool) or not isinstance(setting, int) or setting < 1:
        raise UserError(f"{name}: {setting!r} must be `auto` or a whole number of at least 1.")
    return setting


def slots(n: int, accelerator: str) -> list[dict[str, str]]:
    """Environment variables for n processes: one visible GPU each (shared in turn if there are fewer), and an equal
    share of this process's threads."""
    ids, n_threads = gpus(accelerator), str(max(1, torch.get_num_threads() // n))
    threads = {"OMP_NUM_THREADS": n_threads, "MKL_NUM_THREADS": n_threads}
    visible = [{"CUDA_VISIBLE_DEVICES": ids[index % len(ids)]} if ids else {} for index in range(n)]
    return [{**threads, **gpu} for gpu in visible]


def split(costs: Mapping[str, float], n: int, begun: Sequence[Collection[str]] = ()) -> list[list[str]]:
    """Split the keys into shares of about equal cost, each sorted: n shares, or one per key if there are fewer keys.

    begun  sets of keys that share a checkpoint. Each share lies within one set or outside all of them, so that it can
           continue from the checkpoint. There may then be more than n shares.
    """
    parts: list[list[str]] = []
    remaining = set(costs)
    for group in sorted(begun, key=lambda group: (-len(remaining.intersection(group)), sorted(group))):
        if part := remaining.intersection(group):
            parts.append(sorted(part))
            remaining -= part
    if remaining:
        parts.append(sorted(remaining))
    pieces = [1] * len(parts)
    while sum(pieces) < min(n, len(costs)):
        total = [sum(costs[key] for key in part) for part in parts]
        divisible = [index for index, part in enumerate(parts) if pieces[index] < len(part)]
        pieces[max(divisible, key=lambda index: total[index] / pieces[index])] += 1
    return [share for part, k in zip(parts, pieces, strict=True) for share in _balanced(part, costs, k)]


def _balanced(keys: Sequence[str], costs: Mapping[str, float], n: int) -> list[list[str]]:
    """Assigns the keys from the most to the least expensive, each to the share that is cheapest so far."""
    shares: list[list[str]] = [[] for _ in range(n)]
    sums = [0.0] * n
    for key in sorted(keys, key=lambda key: (-costs[key], key)):
        least = sums.index(min(sums))
        shares[least].append(key)
        sums[least] += costs[key]
    return [sorted(share) for share in shares]


def gpus(accelerator: str) -> list[str]:
    """The GPUs of this process, each as a value for CUDA_VISIBLE_DEVICES."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
