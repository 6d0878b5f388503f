"""Meta-SAEs: sparse dictionaries of the decoder directions of another dictionary (Leask et al. 2025).

A meta-dictionary is a `BatchTopK` whose activations are the N unit decoder rows of a dictionary; its latents are called
meta-latents, and the codes of a row say of which meta-latents that latent is composed. Any small dictionary explains
some variance of any directions, so that what counts is the excess over one trained on random directions.

Shapes: N rows, d = d_model, M meta-latents, k active ones per row on average.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from core.artifacts import Store, content_key
from core.errors import UserError
from core.fleet import KIND
from core.kernels.codes import Codes, SparseCodes
from core.methods.batchtopk import BatchTopK
from core.methods.saved import load_dictionary, save_dictionary
from core.methods.together import Fleet
from core.streams.decoder_rows import DecoderRows, Sampling, random_directions
from core.streams.module import ActivationData
from core.training import Checkpoints, TokenProgress, discard_finished, make_trainer


@dataclass(frozen=True, eq=False)
class MetaRequest:
    """One meta-dictionary, and everything that decides it.

    rows                 unit directions `[N, d]` (`core.streams.decoder_rows.directions`)
    method               plain configuration of a `BatchTopK`
    n_steps, batch_size  optimiser steps, and rows in each
    sampling, seed       which rows: `core.streams.decoder_rows.DecoderRows`
    calibration_batches  that measure the inference threshold
    batches_per_chunk    optimiser steps in one Lightning step
    weights              `[N]`, for `sampling: frequency`
    start                a meta-dictionary to go on from with its decoder as it is: only W_enc learns
    """

    rows: Tensor
    method: Mapping[str, Any]
    n_steps: int
    batch_size: int
    sampling: Sampling
    seed: int
    calibration_batches: int
    batches_per_chunk: int
    precision: str = "32-true"
    weights: Tensor | None = None
    start: BatchTopK | None = None

    @classmethod
    def of(
        cls,
        meta: DictConfig,
        rows: Tensor,
        precision: str = "32-true",
        weights: Tensor | None = None,
        start: BatchTopK | None = None,
    ) -> MetaRequest:
        """The request of a configuration as in conf/meta; with `start` of `finetune_steps` steps."""
        plain = OmegaConf.to_container(meta, resolve=True)
        assert isinstance(plain, dict)
        names = ("method", "batch_size", "sampling", "seed", "calibration_batches", "batches_per_chunk")
        n_steps = plain["n_steps" if start is None else "finetune_steps"]
        settings = {str(name): plain[name] for name in names}
        return cls(rows=rows, n_steps=n_steps, precision=precision, weights=weights, start=start, **settings)

    @cached_property
    def batches_spec(self) -> dict[str, Any]:
        """What decides the batches: requests with equal ones train together."""
        return {
            "rows": _digest(self.rows),
            "n_rows": len(self.rows),
            "weights": None if self.sampling != "frequency" or self.weights is None else _digest(self.weights),
            "n_steps": self.n_steps,
            "batch_size": self.batch_size,
            "sampling": self.sampling,
            "seed": self.seed,
            "calibration_batches": self.calibration_batches,
            "batches_per_chunk": self.batches_per_chunk,
            "precision": self.precision,
        }

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What decides the meta-dictionary."""
        start = None if self.start is None else _digest(*self.start.state_dict().values())
        return {"method": dict(self.method), "start": start, **self.batches_spec}

    @cached_property
    def key(self) -> str:
        return content_key(self.spec)

    def build(self) -> BatchTopK:
        """The meta-dictionary before training. Raises UserError if it does not fit the rows."""
        method = instantiate(dict(self.method))
        if not isinstance(method, BatchTopK):
            raise UserError(f"meta.method must be a BatchTopK, not {type(method).__name__}.")
        if method.d_model != self.rows.shape[1]:
            raise UserError(f"meta.method.d_model is {method.d_model}, but rows have {self.rows.shape[1]} dimensions.")
        method.n_steps = self.n_steps
        if self.start is not None:
            kept = {name: getattr(self.start, name).detach().cpu() for name in ("W_enc", "W_dec", "b_dec")}
            method.load_state_dict(method.state_dict() | kept)
            method.W_dec.requires_grad_(False)
            method.b_dec.requires_grad_(False)
        return method


def train_meta(request: MetaRequest, cfg: DictConfig) -> BatchTopK:
    """The meta-dictionary from the store of `cfg.artifacts_dir`, trained first if it is not there: `train_metas`."""
    return train_metas([request], cfg)[0]


def train_metas(requests: Sequence[MetaRequest], cfg: DictConfig) -> list[BatchTopK]:
    """Each request's meta-dictionary, in evaluation mode on the device of its rows.

    What the store lacks is trained; those on equal batches together. A stopped training goes on from its checkpoint, to
    the same parameters bit for bit on a CPU. `cfg` has `artifacts_dir`, `output_dir`, `name`, `trainer` and `logging`.
    Raises UserError for settings that do not fit, NonFiniteLoss, and Interrupted.
    """
    store = Store(cfg.artifacts_dir)
    groups: dict[str, dict[str, MetaRequest]] = defaultdict(dict)
    for request in requests:
        if not store.has(KIND, request.spec):
            groups[content_key(request.batches_spec)][request.key] = request
    for group in groups.values():
        with ExitStack() as locks:
            for key in sorted(group):  # in one order everywhere: two processes cannot wait for each other
                locks.enter_context(store.lock(KIND, group[key].spec))
            missing = [group[key] for key in sorted(group) if not store.has(KIND, group[key].spec)]
            if missing:
                _train(missing, store, cfg)
    return [_load(store.path(KIND, request.spec), request.rows.device) for request in requests]


def _train(requests: Sequence[MetaRequest], store: Store, cfg: DictConfig) -> None:
    """One Lightning run over equal batches; the requests are missing, and locked."""
    started, first = time.time(), requests[0]
    stream = DecoderRows(first.rows, first.batch_size, first.sampling, first.seed, first.weights)
    data = ActivationData(stream, first.n_steps, first.batches_per_chunk)
    methods, keys = [request.build() for request in requests], [request.key for request in requests]
    fleet = Fleet(methods, data, cfg.logging.log_every_steps, keys)
    run_key, batches_key = content_key({"requests": keys}), content_key(first.batches_spec)
    folder = store.root / "training" / batches_key / run_key
    checkpoints = Checkpoints(folder, cfg.trainer.checkpoint_every_seconds, keys)
    n_rows, per_chunk = first.n_steps * first.batch_size, first.batches_per_chunk * first.batch_size
    progress = TokenProgress("meta-dictionary", n_rows, per_chunk, cfg.logging.quiet_seconds, unit="rows")
    name = f"{cfg.name}-{run_key}"
    trainer = make_trainer(cfg, Path(cfg.output_dir) / "logs", name, data.n_chunks, [progress, checkpoints])
    checkpoints.fit(trainer, fleet, data)
    calibration = [next(stream) for _ in range(first.calibration_batches)]
    seconds = checkpoints.earlier_seconds + time.time() - started
    for index, request in enumerate(requests):
        if index not in fleet.stopped:
            method = methods[index].to(stream.device)
            method.finish(calibration)
            training = {**fleet.last(index), "seconds_together": seconds, "together": len(requests)}
            store.put(KIND, request.spec, partial(save_dictionary, method, training))
    discard_finished(store.root / "training", lambda key: (store.root / KIND / key).is_dir())
    for error in fleet.stopped.values():
        raise error


def _load(folder: Path, device: torch.device) -> BatchTopK:
    method = load_dictionary(folder)
    assert isinstance(method, BatchTopK)
    return method.to(device)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def decompose(meta: BatchTopK, rows: Tensor) -> SparseCodes:
    """Codes `[N, M]` of unit rows `[N, d]` under the calibrated threshold: what meta-latents each latent is made of."""
    return meta.encode_rows(rows)


@torch.no_grad()
def decompose_together(meta: BatchTopK, rows: Tensor) -> Codes:
    """Codes `[N, M]` by the training rule over all rows at once: exactly N k entries, if so many are > 0."""
    return meta.encode_batch(rows)


@dataclass(frozen=True)
class VarianceExplained:
    """1 - sum_i p_i |w_i - w_hat_i|^2 over sum_i p_i |w_i - w_bar|^2 (`centred`, as SAEBench) or sum_i p_i |w_i|^2.

    p_i are equal weights, or given ones; w_bar is the mean of the rows under these weights.
    """

    centred: float
    uncentred: float

    @classmethod
    def of(cls, rows: Tensor, rows_hat: Tensor, weights: Tensor | None = None) -> VarianceExplained:
        """Of rows and their reconstructions, both `[N, d]`; weights `[N]`, of any positive sum."""
        w, w_hat = rows.detach().double(), rows_hat.detach().double()
        p = torch.ones_like(w[:, 0]) if weights is None else weights.to(w)
        p = p / p.sum()
        error, mean = p @ (w - w_hat).square().sum(1), p @ w
        spread, energy = p @ (w - mean).square().sum(1), p @ w.square().sum(1)
        return cls(float(1 - error / spread), float(1 - error / energy))


@dataclass(frozen=True)
class MetaScore:
    """How well a meta-dictionary explains rows: by the training rule over all of them, and under the threshold."""

    batch: VarianceExplained
    threshold: VarianceExplained
    l0_threshold: float  # meta-latents per row
    dead_fraction: float  # of the meta-latents, active in no row by the training rule
    most_frequent: float  # share of the rows in which the most frequent meta-latent is active

    def metrics(self, suffix: str = "") -> dict[str, float]:
        named = {
            "ve": self.batch.centred,
            "ve_uncentred": self.batch.uncentred,
            "ve_threshold": self.threshold.centred,
            "ve_threshold_uncentred": self.threshold.uncentred,
            "l0_threshold": self.l0_threshold,
            "dead_meta_fraction": self.dead_fraction,
            "most_frequent_meta_rate": self.most_frequent,
        }
        return {name + suffix: value for name, value in named.items()}


@torch.no_grad()
def score(meta: BatchTopK, rows: Tensor, weights: Tensor | None = None) -> MetaScore:
    """Score a meta-dictionary on rows `[N, d]`, for instance those it was trained on."""
    together, alone = decompose_together(meta, rows), decompose(meta, rows)
    active = counts(together)
    return MetaScore(
        VarianceExplained.of(rows, meta.decode(together), weights),
        VarianceExplained.of(rows, meta.decode(alone), weights),
        float(alone.l0()),
        float((active == 0).double().mean()),
        float(active.max()) / len(rows),
    )


def counts(codes: Codes) -> Tensor:
    """In how many rows each latent is > 0: int64 `[M]`."""
    if isinstance(codes, SparseCodes):
        return codes.cols[codes.values > 0].bincount(minlength=codes.shape[1])
    return (codes.values > 0).sum(0)


def null_rows(rows: Tensor, seed: int) -> Tensor:
    """Random directions in the place of `rows`: the same N and d."""
    return random_directions(len(rows), rows.shape[1], seed).to(rows.device)


def replaced_decoder(meta: BatchTopK, directions: Tensor) -> BatchTopK:
    """The meta-dictionary with other decoder rows, unit `[M, d]`; its encoder, bias and threshold are as before."""
    other = type(meta)(**meta.hyperparameters()).to(directions.device)
    other.load_state_dict(meta.state_dict() | {"W_dec": directions})
    return other.eval()
