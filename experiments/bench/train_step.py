"""The time of an optimiser step of a k-sparse dictionary over that of an encoder product, which no step can avoid.

The step is `DictionaryMethod.update`: normalising, encoding, losses, backward, projection and norm of the decoder,
clipping, fused Adam and the count of dead latents, with AuxK idle. The product `[B, d] x [d, m]` is timed right before
every step, so that a busy machine slows both alike.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from core.batch import Batch
from core.bench import (
    Clock,
    PeakMemory,
    Ratio,
    Task,
    Times,
    alternate,
    hardware,
    save_table,
    seconds_of,
    threads,
)
from core.building import plain
from core.methods.base import DictionaryMethod
from core.optimizer import ClippingAdam
from core.runtime import resolve_device
from experiments.bench import peers
from experiments.bench.common import built, fit_fleet
from experiments.bench.settings import TrainStepSettings

SETTINGS = TrainStepSettings

TRAFFIC_BYTES = 36  # per parameter and step, fp32: Adam reads 4 tensors and writes 3, a product reads the weights, the
#                     backward pass writes their gradient
COPY_BYTES = 8  # per entry of a copy


@dataclass(frozen=True)
class Row:
    """One line of the table. `times` has `step` and `product`; our own also has the other floors."""

    who: str
    kind: str
    dict_size: int
    times: Times
    version: str = ""

    @property
    def name(self) -> str:
        prefix = {"ours": "", "dense": "dense_"}.get(self.who, f"peer_{self.who}_")
        return f"{prefix}{self.kind}_m{self.dict_size}"

    @property
    def over_product(self) -> Ratio:
        return self.times.ratio("step", "product")

    def metrics(self) -> dict[str, float]:
        seconds = {f"{self.name}_seconds": self.times.median("step")}
        return {f"{self.name}_over_product": self.over_product.value, **seconds}

    def line(self, batch_size: int) -> dict[str, str | int | float | None]:
        ratio = self.over_product
        return {
            "who": self.who,
            "method": self.kind,
            "dict_size": self.dict_size,
            "step over product": ratio.value,
            "quartile 1": ratio.low,
            "quartile 3": ratio.high,
            "step, s": self.times.median("step"),
            "product, s": self.times.median("product"),
            "tokens/s": batch_size / self.times.median("step"),
            "repetitions": len(self.times.seconds["step"]),
            "version": self.version,
        }


def run(cfg: DictConfig) -> dict[str, float]:
    """The table of this project, plain PyTorch and the installed peers; memory; Lightning's overhead."""
    device = resolve_device(cfg.trainer.accelerator)
    sizes = sorted(cfg.dict_sizes)
    with threads(cfg.threads):
        rows = [own_step(cfg, kind, m, device) for m in sizes for kind in cfg.methods]
        metrics = {name: value for row in rows for name, value in own_metrics(cfg, row).items()}
        metrics |= lightning_overhead(cfg, sizes[0], device) if cfg.lightning.chunks else {}
    metrics |= memory(cfg, sizes[-1], device) if cfg.memory else {}
    others, left_out = other_steps(cfg, sizes, device)
    metrics |= {name: value for row in others for name, value in row.metrics().items()}
    metrics |= speedups(rows, others)
    notes = [hardware(device, cfg.threads), f"B {cfg.batch_size}, d {cfg.d_model}, k {cfg.k}, fp32", *left_out]
    save_table(Path(cfg.cell_folder), [row.line(cfg.batch_size) for row in [*rows, *others]], notes)
    return metrics


def own_step(cfg: DictConfig, kind: str, dict_size: int, device: torch.device) -> Row:
    """This project's step and its floors: products, and a copy of as many entries as there are parameters."""
    method = built(cfg.methods[kind], device, dict_size=dict_size)
    optimizer = method.configure_optimizers()
    batch = Batch(peers.structured_rows(cfg.batch_size, cfg.d_model, cfg.seed).to(device))
    tasks: dict[str, Task] = {"product": peers.product(batch.x, dict_size)}
    for name in cfg.product_dtypes[device.type]:
        tasks[f"product_{name}"] = peers.product(batch.x, dict_size, getattr(torch, name))
    source = torch.ones(n_parameters(method), device=device)
    target = torch.empty_like(source)
    tasks["copy"] = lambda: target.copy_(source)
    tasks["step"] = lambda: method.update(Batch(batch.x), optimizer)  # a new batch, so that every step normalises
    times = alternate(tasks, device, cfg.repetitions, cfg.warmup)
    row = Row("ours", kind, dict_size, times)
    print(f"{row.name}: {row.over_product} products, {times.median('step'):.4g} s", file=sys.stderr)
    return row


def own_metrics(cfg: DictConfig, row: Row) -> dict[str, float]:
    """Ratios of the step to the products, and to the time of its memory traffic at the bandwidth of a copy."""
    times, name = row.times, row.name
    step = times.median("step")
    bandwidth_floor = TRAFFIC_BYTES / COPY_BYTES * times.median("copy")
    products = [task for task in times.seconds if task.startswith("product")]
    n_entries = 2 * row.dict_size * cfg.d_model
    return {
        **row.metrics(),
        **{f"{name}_over_{task}": step / times.median(task) for task in products if task != "product"},
        f"{name}_over_bandwidth_floor": step / bandwidth_floor,
        f"{name}_over_larger_floor": step / max(bandwidth_floor, min(map(times.median, products))),
        f"product_m{row.dict_size}_seconds": times.median("product"),
        f"copy_m{row.dict_size}_gigabytes_per_second": n_entries * COPY_BYTES / times.median("copy") / 1e9,
    }


def n_parameters(method: DictionaryMethod) -> int:
    return method.get_parameter("W_enc").numel() + method.W_dec.numel()


# ---- the others


def other_steps(cfg: DictConfig, sizes: list[int], device: torch.device) -> tuple[list[Row], list[str]]:
    """Plain PyTorch (`dense`) at all sizes, every peer at `peers.dict_sizes`; notes name the peers that are left
    out."""
    python = peers_python(cfg)
    versions = peers.available(python, list(cfg.peers.names))
    rows, notes = [], []
    for name, version in versions.items():
        wanted = sizes if name == "dense" else list(cfg.peers.dict_sizes)
        kinds = [kind for kind in cfg.peers.kinds if kind in peers.KINDS[name]] or list(peers.KINDS[name])
        if version is None:
            notes.append(f"{name} is not installed for {python}: left out")
            continue
        for dict_size, kind in ((m, kind) for m in wanted for kind in kinds):
            case = peers.Case(
                peer=name,
                kind=kind,
                batch_size=cfg.batch_size,
                d_model=cfg.d_model,
                dict_size=dict_size,
                k=cfg.k,
                n_threads=cfg.threads,
                device=device.type,
                repetitions=cfg.peers.repetitions,
                warmup=cfg.peers.warmup,
                seed=cfg.seed,
            )
            try:
                timed = peers.time_peer(case, sys.executable if name == "dense" else python)
            except peers.PeerError as error:
                notes.append(f"{name}, {kind}, m {dict_size}: left out, {error}")
                continue
            rows.append(Row(name, kind, dict_size, timed.times, timed.version))
            print(f"{rows[-1].name}: {rows[-1].over_product} products", file=sys.stderr)
    for note in notes:
        print(note, file=sys.stderr)
    return rows, notes


def peers_python(cfg: DictConfig) -> str:
    """The setting `peers_python`; else the interpreter that `make peers` installs; else this one."""
    installed = Path(__file__).parents[2] / ".venv-peers/bin/python"
    return cfg.peers_python or (str(installed) if installed.is_file() else sys.executable)


def speedups(rows: list[Row], others: list[Row]) -> dict[str, float]:
    """The products that a step of the others takes over the products that ours takes, at the same kind and size."""
    ours = {(row.kind, row.dict_size): row for row in rows}
    return {
        f"{row.name}_over_ours": row.over_product.value / ours[key].over_product.value
        for row in others
        if (key := (row.kind, row.dict_size)) in ours
    }


# ---- memory


def memory(cfg: DictConfig, dict_size: int, device: torch.device) -> dict[str, float]:
    """Peak memory of a step beyond parameters, gradients and moments, in fp32 matrices `[B, m]`; in a new process."""
    buffers = {}
    for kind in cfg.methods:
        settings = {**plain(cfg.methods[kind]), "dict_size": dict_size}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            peak = fresh.submit(peak_extra_bytes, settings, cfg.batch_size, cfg.seed, device.type, cfg.threads).result()
        buffers[kind] = peak / (4 * cfg.batch_size * dict_size)
        print(f"{kind}: {buffers[kind]:.2f} pre-activation buffers at the peak of a step", file=sys.stderr)
    named = {f"peak_extra_preactivation_buffers_{kind}": value for kind, value in buffers.items()}
    return {"peak_extra_preactivation_buffers": max(buffers.values()), **named}


def peak_extra_bytes(settings: dict[str, Any], batch_size: int, seed: int, device_type: str, n_threads: int) -> int:
    """Peak of the second and third step beyond the memory before the first one: the batch, parameters, gradients and
    moments, all written to, so that the system counts them."""
    device = torch.device(device_type)
    with threads(n_threads):
        _few_steps(settings | {"dict_size": max(256, 4 * settings["k"])}, 64, seed, device)  # loads code, not data
        method, optimizer, batch = _prepared(settings, batch_size, seed, device)
        allocate_state(method, optimizer)
        peak = PeakMemory(device)
        method.update(batch, optimizer)
        peak.restart()
        for _ in range(2):
            method.update(batch, optimizer)
        return peak.extra()


def allocate_state(method: DictionaryMethod, optimizer: ClippingAdam) -> None:
    """Allocate gradients and moments by a step with gradients of zero, which moves no parameter."""
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter).fill_(0)  # zeros alone would not be resident
    optimizer.prepare(method.lr_factor())
    optimizer.step()


def _prepared(
    settings: Mapping[str, Any], batch_size: int, seed: int, device: torch.device
) -> tuple[DictionaryMethod, ClippingAdam, Batch]:
    method = built(settings, device)
    x = torch.randn(batch_size, method.d_model, generator=torch.Generator().manual_seed(seed))
    return method, method.configure_optimizers(), Batch(x.to(device))


def _few_steps(settings: Mapping[str, Any], batch_size: int, seed: int, device: torch.device) -> None:
    method, optimizer, batch = _prepared(settings, batch_size, seed, device)
    for _ in range(2):
        method.update(batch, optimizer)


# ---- Lightning


class BareChunks(pl.Callback):
    """After every chunk in Lightning, train the same chunk in a bare loop, on a twin of the dictionary.

    `in_fit[i]` is the time from the end of bare chunk i - 1 to the end of Lightning's chunk i, `bare[i]` the time of
    bare chunk i. Chunks before `warmup` do not count.
    """

    def __init__(self, twin: DictionaryMethod, device: torch.device, warmup: int) -> None:
        self.twin, self.optimizer, self.device = twin, twin.configure_optimizers(), device
        self.warmup = warmup
        self.in_fit: list[float] = []
        self.bare: list[float] = []
        self.clock = Clock(device)

    def on_train_start(self, *_: Any) -> None:
        self.clock.restart()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        in_fit = self.clock.seconds()
        bare = seconds_of(lambda: self.twin.train_on(batch, self.optimizer), self.device)
        if batch_idx >= self.warmup:
            self.in_fit.append(in_fit)
            self.bare.append(bare)
        self.clock.restart()


def lightning_overhead(cfg: DictConfig, dict_size: int, device: torch.device) -> dict[str, float]:
    """How much longer an optimiser step takes in a fleet's `Trainer.fit` than in a bare loop, as a fraction."""
    size, n_chunks = cfg.lightning.batches_per_chunk, cfg.lightning.warmup + cfg.lightning.chunks
    method, twin = (built(cfg.methods.batchtopk, device, dict_size=dict_size) for _ in range(2))
    x = peers.structured_rows(2 * cfg.batch_size, cfg.d_model, cfg.seed).to(device)
    bare = BareChunks(twin, device, cfg.lightning.warmup)
    fit_fleet(cfg, [method], [Batch(part) for part in x.split(cfg.batch_size)], n_chunks, size, bare)
    times = Times({"in_fit": bare.in_fit, "bare": bare.bare})
    ratio = times.ratio("in_fit", "bare")
    print(f"Lightning: {ratio.value - 1:.2%} [{ratio.low - 1:.2%}, {ratio.high - 1:.2%}]", file=sys.stderr)
    return {
        f"lightning_overhead_fraction_m{dict_size}": ratio.value - 1,
        f"lightning_overhead_fraction_m{dict_size}_quartile1": ratio.low - 1,
        f"lightning_overhead_fraction_m{dict_size}_quartile3": ratio.high - 1,
        f"bare_step_m{dict_size}_seconds": times.median("bare") / size,
    }
