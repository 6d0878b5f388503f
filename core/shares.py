"""How a group of dictionaries is split over processes, and what each of these may use of the machine."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import torch

from core.errors import UserError


def number_of_processes(setting: object, accelerator: str) -> int:
    """`trainer.processes` as a number: `auto` is one for every GPU, and one on a CPU.

    On a CPU more processes only divide its threads, and every one runs the language model again. Raises UserError.
    """
    if setting == "auto":
        return len(gpus(accelerator)) or 1
    return _from_one_on("trainer.processes", setting)


def number_of_cell_processes(setting: object, n_cells: int) -> int:
    """`trainer.cell_processes` as a number, at most that of the cells: `auto` is one per core. Raises UserError."""
    n = _n_cores() if setting == "auto" else _from_one_on("trainer.cell_processes", setting)
    return min(n, n_cells)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _from_one_on(name: str, setting: object) -> int:
    if isinstance(setting, bool) or not isinstance(setting, int) or setting < 1:
        raise UserError(f"{name}: {setting!r} is neither auto nor a number from 1 on.")
    return setting


def slots(n: int, accelerator: str) -> list[dict[str, str]]:
    """Environment variables for n processes: one visible GPU each, in turn where there are fewer; an equal share of
    this process's threads."""
    ids, n_threads = gpus(accelerator), str(max(1, torch.get_num_threads() // n))
    threads = {"OMP_NUM_THREADS": n_threads, "MKL_NUM_THREADS": n_threads}
    visible = [{"CUDA_VISIBLE_DEVICES": ids[index % len(ids)]} if ids else {} for index in range(n)]
    return [{**threads, **gpu} for gpu in visible]


def split(costs: Mapping[str, float], n: int, begun: Sequence[Collection[str]] = ()) -> list[list[str]]:
    """The keys in shares of about equal cost, each in order of its keys; n of them, or as many as there are keys.

    begun  sets of keys that have a checkpoint in common. A share lies within one of these or outside all of them, so
           that it can go on from there; there may be more than n shares then.
    """
    parts: list[list[str]] = []
    left = set(costs)
    for group in sorted(begun, key=lambda group: (-len(left.intersection(group)), sorted(group))):
        if part := left.intersection(group):
            parts.append(sorted(part))
            left -= part
    if left:
        parts.append(sorted(left))
    pieces = [1] * len(parts)
    while sum(pieces) < min(n, len(costs)):
        total = [sum(costs[key] for key in part) for part in parts]
        divisible = [index for index, part in enumerate(parts) if pieces[index] < len(part)]
        pieces[max(divisible, key=lambda index: total[index] / pieces[index])] += 1
    return [share for part, k in zip(parts, pieces, strict=True) for share in _balanced(part, costs, k)]


def _balanced(keys: Sequence[str], costs: Mapping[str, float], n: int) -> list[list[str]]:
    """The dearest first, each to the share that has cost least so far."""
    shares: list[list[str]] = [[] for _ in range(n)]
    sums = [0.0] * n
    for key in sorted(keys, key=lambda key: (-costs[key], key)):
        least = sums.index(min(sums))
        shares[least].append(key)
        sums[least] += costs[key]
    return [sorted(share) for share in shares]


def gpus(accelerator: str) -> list[str]:
    """What this process may put into CUDA_VISIBLE_DEVICES, one GPU each."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
