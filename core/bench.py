"""Benchmarks as ratios: the compared tasks take turns in one process, so that a busy machine slows all of them alike.

A result is the median of the ratios of all rounds, with their quartiles.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from core.atomic import write_atomically

TABLE = "table.json"  # beside results.json: the table for the report

Task = Callable[[], object]
Entry = str | int | float | None


class Ratio(NamedTuple):
    """The median of the rounds' ratios, and their quartiles."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Times:
    """Seconds of every repetition, by task; entry i of every task is from round i."""

    seconds: Mapping[str, list[float]]

    def median(self, task: str) -> float:
        return statistics.median(self.seconds[task])

    def ratio(self, task: str, floor: str) -> Ratio:
        each = [a / b for a, b in zip(self.seconds[task], self.seconds[floor], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else (each[0],) * 3
        return Ratio(middle, low, high)


class Clock:
    """Seconds since `restart`. On CUDA it first waits for the device; on the CPU it counts the process's CPU time, or
    wall time if `wall`."""

    def __init__(self, device: torch.device, wall: bool = False) -> None:
        self.device, self.wall = device, wall
        self.restart()

    def restart(self) -> None:
        self.started = self._now()

    def seconds(self) -> float:
        return self._now() - self.started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.perf_counter() if self.wall else time.process_time()


def seconds_of(task: Task, device: torch.device, wall: bool = False) -> float:
    """Seconds of a task: by CUDA events on a GPU, else by `Clock`."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        task()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    clock = Clock(device, wall)
    task()
    return clock.seconds()


def alternate(
    tasks: Mapping[str, Task], device: torch.device, repetitions: int, warmup: int, wall: bool = False
) -> Times:
    """Time every task once in each round, in the given order; the first `warmup` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(warmup + repetitions):
        for name, task in tasks.items():
            taken = seconds_of(task, device, wall)
            if round_number >= warmup:
                seconds[name].append(taken)
    return Times(seconds)


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """torch computes with `n` threads in this block; None keeps their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def hardware(device: torch.device, n_threads: int) -> str:
    """The hardware in one line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{_cpu_model()}, {n_threads} of {os.cpu_count()} threads, {platform.system()} {platform.machine()}"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


class PeakMemory:
    """Peak of the bytes in use since `restart`, beyond those in use when the object was created.

    On CUDA the allocator reports them. On the CPU they are Linux's resident set and its high-water mark, to about half
    a megabyte; freed memory is returned to the system first, if the C library can do that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._in_use()

    def restart(self) -> None:
        """Forget the peak so far, but not the bytes in use at creation."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def extra(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _status("VmHWM") - self.before

    def _in_use(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device)
        trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
        if trim is not None:
            trim(0)
        return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes, from a line `VmRSS:   1234 kB`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: peak memory on the CPU can only be measured on Linux.")


def save_table(folder: Path, rows: Sequence[Mapping[str, Entry]], notes: Sequence[str]) -> None:
    """Write rows with equal columns, and notes (hardware, versions, omissions), to `TABLE`."""
    content = {"rows": [dict(row) for row in rows], "notes": list(notes)}
    write_atomically(folder / TABLE, json.dumps(content, indent=1))
