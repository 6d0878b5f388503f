"""How the time of a BatchTopK step grows with the dictionary size, k, the batch, and the number of dictionaries.

One axis varies at a time around a base point. Steps and their encoder products are timed in turn, as in
bench_train_step. A fleet of n dictionaries is timed as a whole, in a real `Trainer.fit` on batches from memory.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from core.atomic import write_table
from core.batch import Batch
from core.bench import Clock, Task, alternate, hardware, save_table, threads
from core.runtime import resolve_device
from experiments.bench.common import built, fit_fleet
from experiments.bench.peers import product, structured_rows
from experiments.bench.settings import ScalingSettings

SETTINGS = ScalingSettings

CURVES = "scaling.parquet"
AXES = ("dict_size", "k", "batch_size")


def run(cfg: DictConfig) -> dict[str, float]:
    """Write the curves to `scaling.parquet`; the metrics are its points."""
    device = resolve_device(cfg.trainer.accelerator)
    with threads(cfg.threads):
        steps = [one_step(cfg, axis, value, device) for axis in AXES for value in cfg.axes[axis]]
    with threads(cfg.fleet.threads):
        fleets = [one_fleet(cfg, n, device) for n in cfg.fleet.sizes]
        fleet_threads = torch.get_num_threads()
    table = pd.DataFrame([*steps, *fleets])
    folder = Path(cfg.cell_folder)
    write_table(table, folder / CURVES)
    notes = [
        f"steps around {named(cfg.base)}: CPU time, {hardware(device, cfg.threads)}",
        f"fleets of {named(cfg.fleet.shape)}, in a Trainer.fit: wall time, {fleet_threads} threads",
    ]
    save_table(folder, [*steps, *fleets], notes)
    return {
        **{f"{row['axis']}_{row['value']}_over_product": row["over_product"] for row in steps},
        **{f"fleet_of_{row['value']}_rows_per_second": row["rows_per_second"] for row in fleets},
    }


def named(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def one_step(cfg: DictConfig, axis: str, value: int, device: torch.device) -> dict[str, Any]:
    """One point: the step and the product of a shape, timed in turn."""
    shape = {**cfg.base, axis: value}
    x = structured_rows(shape["batch_size"], shape["d_model"], cfg.seed).to(device)
    method = built(cfg.step, device, **shape_of(shape))
    optimizer = method.configure_optimizers()
    tasks: dict[str, Task] = {
        "product": product(x, shape["dict_size"]),
        "step": lambda: method.update(Batch(x), optimizer),
    }
    times = alternate(tasks, device, cfg.repetitions, cfg.warmup)
    ratio = times.ratio("step", "product")
    print(f"{axis} {value}: {ratio} products", file=sys.stderr)
    return {
        "axis": axis,
        "value": value,
        "over_product": ratio.value,
        "quartile1": ratio.low,
        "quartile3": ratio.high,
        "step_seconds": times.median("step"),
        "product_seconds": times.median("product"),
        "rows_per_second": shape["batch_size"] / times.median("step"),
    }


class ChunkTimes(Callback):
    """Wall time of every chunk in a fit."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device, wall=True)
        self.seconds: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        self.clock.restart()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(self.clock.seconds())
        self.clock.restart()


def one_fleet(cfg: DictConfig, n: int, device: torch.device) -> dict[str, Any]:
    """One point: rows per second of n dictionaries in a `Trainer.fit`, counted for every dictionary."""
    f = cfg.fleet
    batches = structured_rows(2 * f.shape.batch_size, f.shape.d_model, cfg.seed).to(device).split(f.shape.batch_size)
    methods = [built(cfg.step, device, **shape_of(f.shape), seed=seed) for seed in range(n)]
    times = ChunkTimes(device)
    fit_fleet(cfg, methods, [Batch(x) for x in batches], f.warmup + f.chunks, f.batches_per_chunk, times)
    seconds = statistics.median(times.seconds[f.warmup :]) / f.batches_per_chunk
    rate = n * f.shape.batch_size / seconds
    print(f"fleet of {n}: {rate:,.0f} rows/s", file=sys.stderr)
    return {"axis": "n_dictionaries", "value": n, "step_seconds": seconds, "rows_per_second": rate}


def shape_of(shape: Mapping[str, Any]) -> dict[str, int]:
    """The part of a shape that is a setting of a method: all but the batch."""
    return {name: shape[name] for name in ("d_model", "dict_size", "k")}
