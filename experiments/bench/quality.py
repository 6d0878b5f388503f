"""How well our k-sparse dictionaries reconstruct held-out activations, beside those of other libraries.

All are trained on the same rows of one file, in the same batches, steps and learning rate, and each library keeps the
rest of its method. All are scored by the same few lines: codes with a mean L0 of exactly k over the held-out rows, so
that no library gains or loses by its threshold, and beside that under the threshold which each has measured.

Shapes: n rows, d = d_model, m = dict_size.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.artifacts import Store
from core.atomic import write_table
from core.batch import Batch
from core.bench import hardware, save_table, threads
from core.building import plain
from core.checked import require
from core.input_norm import InputNorm
from core.kernels.select import mask_of_largest
from core.methods.base import DictionaryMethod
from core.metrics.reconstruction import ReconstructionSums
from core.metrics.statistics import Interval, t_interval
from core.runtime import Runtime, resolve_device
from core.streams.source import Source
from experiments.bench import peers
from experiments.bench.common import built
from experiments.bench.quality_peers import Batches, Case, train_peer
from experiments.bench.settings import QualitySettings
from experiments.bench.train_step import peers_python
from experiments.common import held_out_rows, language_model, source

SETTINGS = QualitySettings
OURS, BY_SEED = "ours", "by_seed.parquet"
ACTIVATIONS, TRAIN, HELD_OUT = "activations", "train.npy", "held_out.npy"
CALIBRATION_BATCHES = 32  # of the training, that our threshold is measured on


@dataclass(frozen=True)
class Weights:
    """A k-sparse dictionary of any library: f = select(ReLU((x - b_dec) W_enc^T + b_enc)), x_hat = f W_dec + b_dec."""

    W_enc: Tensor  # [m, d]
    W_dec: Tensor  # [m, d]
    b_enc: Tensor  # [m]
    b_dec: Tensor  # [d]
    threshold: float | None = None

    @classmethod
    def read(cls, path: Path, device: torch.device) -> Weights:
        with np.load(path, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(file[name]).to(device) for name in file.files}
        threshold = tensors.pop("threshold", None)
        return cls(**tensors, threshold=None if threshold is None else float(threshold))


@dataclass(frozen=True)
class Score:
    """
    fvu            fraction of the variance that is not explained, at a mean L0 of exactly k
    dead           share of the latents that fire on no held-out row then
    threshold_l0   mean L0 under the dictionary's own threshold, and
    threshold_fvu  the FVU under it; NaN where inference has no threshold
    """

    fvu: float
    dead: float
    threshold_l0: float
    threshold_fvu: float


def check(cfg: DictConfig) -> None:
    """Raises UserError where the steps need more rows than are written."""
    n_batches = cfg.stream.n_tokens // cfg.stream.batch_size
    require(cfg.n_steps <= n_batches, "n_steps", cfg.n_steps, f"be at most the {n_batches} batches of stream.n_tokens")


def run(cfg: DictConfig) -> dict[str, float]:
    """Train and score ours and the installed peers; the ratios of ours to each peer's FVU are paired by seed."""
    device = resolve_device(cfg.trainer.accelerator)
    folder = activations(cfg)
    x = torch.from_numpy(np.load(folder / HELD_OUT)).to(device)
    scores: dict[str, list[Score]] = {}
    with threads(cfg.threads), torch.no_grad():
        score = partial(scored, x=x, kind=cfg.kind, k=cfg.k)
        scores[OURS] = [score(own_weights(cfg, folder / TRAIN, seed, device)) for seed in cfg.training_seeds]
        found, versions, notes = peer_weights(cfg, folder / TRAIN, device)
        scores |= {peer: [score(weights) for weights in found[peer]] for peer in found}
    save_seeds(cfg, scores)
    lines = [line(who, each, scores[OURS], versions.get(who, "")) for who, each in scores.items()]
    sizes = f"B {cfg.stream.batch_size}, m {cfg.dict_size}, k {cfg.k}, {cfg.n_steps} steps, lr {cfg.lr}"
    where = f"{language_model(cfg).name}, {cfg.stream.site}, {cfg.input_norm}, {len(cfg.training_seeds)} seeds"
    save_table(Path(cfg.cell_folder), lines, [f"{cfg.kind}, {sizes}", where, hardware(device, cfg.threads), *notes])
    return {name: value for who, each in scores.items() for name, value in metrics(who, each, scores[OURS]).items()}


# ---- activations


def activations(cfg: DictConfig) -> Path:
    """The folder with `TRAIN` and `HELD_OUT`, normalised rows `[n, d]`; written once, for all cells."""
    given = source(cfg)
    spec = {
        "source": given.spec,
        "held_out": plain(cfg.evaluation),
        "input_norm": cfg.input_norm,
    }
    return Store(cfg.artifacts_dir).get_or_make(ACTIVATIONS, spec, partial(write_activations, cfg, given))


def write_activations(cfg: DictConfig, given: Source, folder: Path) -> None:
    stream, norm, size = given.open(Runtime.of(cfg)), InputNorm(cfg.input_norm), given.batch_size
    out: np.memmap | None = None
    for place in range(given.n_batches):
        x = next(stream).x
        if out is None:
            norm.to(x.device).fit(x)
            shape = (given.n_batches * size, x.shape[1])
            out = np.lib.format.open_memmap(folder / TRAIN, mode="w+", dtype=np.float32, shape=shape)
        out[place * size : (place + 1) * size] = norm(x)[0].cpu().numpy()
    assert out is not None
    out.flush()
    lm, rows = language_model(cfg), held_out_rows(cfg).split(cfg.evaluation.rows_per_batch)
    x = torch.cat([norm(lm.capture(part, cfg.stream.site).flatten(0, 1))[0].cpu() for part in rows])
    np.save(folder / HELD_OUT, x.numpy())


# ---- dictionaries


def own_weights(cfg: DictConfig, rows: Path, seed: int, device: torch.device) -> Weights:
    """Ours, trained with the settings of `methods` in the configuration."""
    method = built(plain(cfg.methods[cfg.kind]), device, seed=seed)
    method.n_steps = cfg.n_steps
    optimizer = method.configure_optimizers()
    with torch.enable_grad():
        for x in our_batches(cfg, rows, seed):
            method.update(Batch(x), optimizer)
    method.finish(map(Batch, list(our_batches(cfg, rows, seed, CALIBRATION_BATCHES))))
    return weights_of(method)


def our_batches(cfg: DictConfig, rows: Path, seed: int, n: int | None = None) -> Iterator[Tensor]:
    device = resolve_device(cfg.trainer.accelerator).type
    return iter(Batches(rows, cfg.stream.batch_size, n or cfg.n_steps, seed, device))


def weights_of(method: DictionaryMethod) -> Weights:
    rule = method.eval().inference_rule()
    b_enc = method.W_dec.new_zeros(method.dict_size) if rule.b_enc is None else rule.b_enc
    threshold = None if rule.threshold is None else float(rule.threshold)
    return Weights(rule.W_enc, method.W_dec, b_enc, method.b_dec, threshold)


def peer_weights(
    cfg: DictConfig, rows: Path, device: torch.device
) -> tuple[dict[str, list[Weights]], dict[str, str], list[str]]:
    """The peers' dictionaries, one for each seed; their versions; notes that name the peers which are left out."""
    python = peers_python(cfg)
    found: dict[str, list[Weights]] = {}
    versions: dict[str, str] = {}
    notes: list[str] = []
    for peer, installed in peers.available(python, list(cfg.peers)).items():
        if installed is None:
            notes.append(f"{peer} is not installed for {python}: left out (`make peers` installs it)")
            continue
        with tempfile.TemporaryDirectory() as folder:
            case = Case(
                peer=peer,  # type: ignore[arg-type]
                kind=cfg.kind,
                rows=str(rows),
                folder=folder,
                batch_size=cfg.stream.batch_size,
                n_steps=cfg.n_steps,
                dict_size=cfg.dict_size,
                k=cfg.k,
                lr=cfg.lr,
                decay_fraction=cfg.decay_fraction,
                seeds=list(cfg.training_seeds),
                n_threads=cfg.threads,
                device=device.type,
            )
            try:
                versions[peer] = train_peer(case, python)
                found[peer] = [Weights.read(Path(folder) / f"{seed}.npz", device) for seed in cfg.training_seeds]
            except peers.PeerError as error:
                notes.append(f"{peer}: left out, {error}")
    for note in notes:
        print(note, file=sys.stderr)
    return found, versions, notes


# ---- scores


@torch.no_grad()
def scored(weights: Weights, x: Tensor, kind: peers.Kind, k: int) -> Score:
    """On rows `[n, d]`. BatchTopK: the n k largest entries of all rows together; TopK: the k largest of each row."""
    z = ((x - weights.b_dec) @ weights.W_enc.T + weights.b_enc).relu()  # [n, m]
    largest = mask_of_largest(z.flatten(), k * len(z)).view_as(z) if kind == "batchtopk" else mask_of_largest(z, k)
    fvu, l0 = fvu_and_l0(weights, x, z * largest)
    dead = float((~(largest & (z > 0)).any(0)).double().mean())
    if abs(l0 - k) > 0.01 * k:
        print(f"mean L0 is {l0:.4g}, not {k}: there are no more positive entries", file=sys.stderr)
    if kind == "topk" or weights.threshold is None:
        return Score(fvu, dead, math.nan, math.nan)
    threshold_fvu, threshold_l0 = fvu_and_l0(weights, x, z * (z > weights.threshold))
    return Score(fvu, dead, threshold_l0, threshold_fvu)


def fvu_and_l0(weights: Weights, x: Tensor, codes: Tensor) -> tuple[float, float]:
    x_hat = codes @ weights.W_dec + weights.b_dec
    return float(ReconstructionSums.of(x, x_hat).fvu), float((codes > 0).double().sum(1).mean())


def ratio(ours: Sequence[Score], theirs: Sequence[Score]) -> Interval:
    """Our FVU over theirs: the geometric mean over pairs of one seed, with a t interval of the logarithms. One seed
    has no interval (NaN)."""
    logs = [math.log(a.fvu / b.fvu) for a, b in zip(ours, theirs, strict=True)]
    if len(logs) == 1:
        return Interval(math.exp(logs[0]), math.nan, math.nan, 1)
    interval = t_interval(logs)
    return Interval(math.exp(interval.mean), math.exp(interval.low), math.exp(interval.high), interval.n)


def means(each: Sequence[Score]) -> dict[str, float]:
    """Means over seeds, without those that a method does not have."""
    table = pd.DataFrame([asdict(score) for score in each]).mean()
    return {str(name): float(value) for name, value in table.items() if not math.isnan(value)}


def metrics(who: str, each: Sequence[Score], ours: Sequence[Score]) -> dict[str, float]:
    named = {f"{name}_{who}": value for name, value in means(each).items()}
    if who == OURS:
        return named
    over = ratio(ours, each)
    ends = {} if over.n == 1 else {f"over_{who}_low": over.low, f"over_{who}_high": over.high}
    return {**named, f"over_{who}": over.mean, **ends}


def line(who: str, each: Sequence[Score], ours: Sequence[Score], version: str) -> dict[str, str | float | None]:
    mean = means(each)
    over = None if who == OURS else ratio(ours, each)
    return {
        "who": who,
        "version": version,
        "FVU at exact L0": mean["fvu"],
        "ours over it": None if over is None else over.mean,
        "low": None if over is None or over.n == 1 else over.low,
        "high": None if over is None or over.n == 1 else over.high,
        "dead": mean["dead"],
        "L0 under its threshold": mean.get("threshold_l0"),
        "FVU under its threshold": mean.get("threshold_fvu"),
    }


def save_seeds(cfg: DictConfig, scores: Mapping[str, Sequence[Score]]) -> None:
    """`BY_SEED`: a row for each library and seed."""
    rows: list[dict[str, Any]] = [
        {"who": who, "seed": seed, **asdict(score)}
        for who, each in scores.items()
        for seed, score in zip(cfg.training_seeds, each, strict=True)
    ]
    write_table(pd.DataFrame(rows), Path(cfg.cell_folder) / BY_SEED)
