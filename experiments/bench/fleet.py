"""A grid of dictionaries trained by the fleet on one pass of the language model, against the same grid one by one.

Both start from empty stores and train the same requests. Every dictionary must be the same, bit for bit on the CPU.
Cells are not scored, which would cost the same in both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from hydra import compose
from omegaconf import DictConfig

from core.artifacts import Store
from core.bench import Entry, hardware, save_table, threads
from core.building import build
from core.fleet import KIND, Request, load_or_train, prefetch
from core.methods.saved import load_dictionary
from core.models.language_model import load_language_model
from core.runtime import Runtime, resolve_device
from core.streams.activation_source import ActivationSource
from experiments.bench.settings import FleetSettings
from hydra_plugins.blocks_sweeper.sweeper import cells_of

SETTINGS = FleetSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """Train both ways, compare all weights, and take the ratio of wall times."""
    requests = requests_of_grid(cfg)
    warm_up(requests[0])
    with threads(cfg.threads), tempfile.TemporaryDirectory() as folder:
        runs = {name: replace(Runtime.of(cfg), artifacts_dir=f"{folder}/{name}") for name in ("together", "alone")}
        together = wall_seconds(lambda: prefetch(requests, runs["together"]))
        alone = wall_seconds(lambda: one_by_one(requests, runs["alone"]))
        difference = largest_difference(requests, *(Store(one.artifacts_dir) for one in runs.values()))
        device = resolve_device(cfg.trainer.accelerator)
        note = hardware(device, torch.get_num_threads())
    if difference != 0 and device.type == "cpu":
        raise RuntimeError(f"Trained together and alone, dictionaries differ by {difference:.2g} of their entries.")
    print(f"fleet {together:.1f} s, one by one {alone:.1f} s: {alone / together:.2f} times faster", file=sys.stderr)
    n_tokens = sum(request.source.n_batches * request.source.batch_size for request in requests)
    rows: list[dict[str, Entry]] = [
        {"way": way, "s": seconds, "dictionaries": len(requests), "tokens/s over all": n_tokens / seconds}
        for way, seconds in (("fleet", together), ("one by one", alone))
    ]
    grid = f"{cfg.grid_of} at {cfg.scale} scale, {' '.join(cfg.overrides) or 'all of it'}"
    same = "equal bit for bit" if difference == 0 else f"equal to {difference:.2g} of the largest entry"
    equal = f"{len(requests)} dictionaries, {same}; {alone / together:.2f} times faster together"
    save_table(Path(cfg.cell_folder), rows, [equal, f"grid of {grid}", note])
    return {
        "fleet_speedup": alone / together,
        "fleet_seconds": together,
        "one_by_one_seconds": alone,
        "largest_difference_fraction": difference,
        "n_dictionaries": len(requests),
        "n_tokens_each": n_tokens / len(requests),
    }


def requests_of_grid(cfg: DictConfig) -> list[Request]:
    """The dictionaries that the cells of the experiment `grid_of` ask for, without repetitions."""
    common = [f"experiment={cfg.grid_of}", f"scale={cfg.scale}", f"artifacts_dir={cfg.artifacts_dir}"]
    common += [f"trainer.{name}={cfg.trainer[name]}" for name in ("accelerator", "precision")]
    blocks = compose("config", overrides=common).grid[cfg.scale]
    cells = [compose("config", overrides=[*common, *cell]) for cell in cells_of(blocks, list(cfg.overrides))]
    module = import_module(cells[0].module)
    return list({request.key: request for cell in cells for request in module.dictionaries(cell)}.values())


def warm_up(request: Request) -> None:
    """Harvest the text and load the model once, so that neither way pays for it."""
    assert isinstance(request.source, ActivationSource)
    load_language_model(request.source.model)
    next(build(request.source.data).documents("train", request.source.seed))


def wall_seconds(task: Callable[[], object]) -> float:
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def one_by_one(requests: Sequence[Request], run: Runtime) -> None:
    for request in requests:
        load_or_train(request, run)


def largest_difference(requests: Sequence[Request], first: Store, second: Store) -> float:
    """Over all parameters and buffers of all dictionaries, the largest difference between two stores, as a fraction of
    the tensor's largest entry. 0 means equal bit for bit, NaN in the same places included."""

    def weights(store: Store, request: Request) -> dict[str, torch.Tensor]:
        return load_dictionary(store.path(KIND, request.spec)).cpu().state_dict()

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        if a.numpy().tobytes() == b.numpy().tobytes():
            return 0.0
        return float((a - b).abs().amax() / a.abs().amax().clamp(min=torch.finfo(torch.float32).tiny))

    pairs = [(weights(first, request), weights(second, request)) for request in requests]
    return max(difference(a[name], b[name]) for a, b in pairs for name in a)
