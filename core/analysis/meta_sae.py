"""Meta-SAEs: sparse dictionaries of the decoder directions of another dictionary (Leask et al. 2025).

A meta-dictionary is a `BatchTopK` whose activations are the N unit decoder rows of a dictionary; its latents are called
meta-latents, and the codes of a row say of which meta-latents that latent is composed. Any small dictionary explains
some variance of any directions, so that what counts is the excess over one trained on random directions.

Shapes: N rows, d = d_model, M meta-latents, k active ones per row on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.fleet import Request, Start, load_or_train_all
from core.kernels.codes import Codes, SparseCodes
from core.methods.batchtopk import BatchTopK
from core.methods.settings import method_class
from core.runtime import Runtime
from core.streams.decoder_rows import DecoderRowSource, random_directions


def meta_request(
    meta: Mapping[str, Any],
    rows: Tensor,
    precision: str = "32-true",
    weights: Tensor | None = None,
    start: BatchTopK | None = None,
) -> Request:
    """One meta-dictionary: a BatchTopK of decoder rows.

    meta     a plain configuration as in conf/meta
    rows     unit directions `[N, d]` (`core.streams.decoder_rows.directions`)
    weights  `[N]`, for `sampling: frequency`
    start    a meta-dictionary to go on from for `finetune_steps` steps with its decoder as it is: only W_enc learns

    Raises UserError if the method is no BatchTopK, or of another width than the rows.
    """
    method = dict(meta["method"])
    if not issubclass(kind := method_class(method["_target_"]), BatchTopK):
        raise UserError(f"meta.method must be a BatchTopK, not {kind.__name__}.")
    if method["d_model"] != rows.shape[1]:
        raise UserError(f"meta.method.d_model is {method['d_model']}, but rows have {rows.shape[1]} dimensions.")
    source = DecoderRowSource(
        rows=rows,
        n_steps=meta["n_steps"] if start is None else meta["finetune_steps"],
        batch_size=meta["batch_size"],
        sampling=meta["sampling"],
        seed=meta["seed"],
        calibration_batches=meta["calibration_batches"],
        batches_per_chunk=meta["batches_per_chunk"],
        weights=weights,
    )
    return Request(method, source, precision, None if start is None else Start(start, fixed=("W_dec", "b_dec")))


def trained_metas(requests: Sequence[Request], run: Runtime, device: torch.device) -> list[BatchTopK]:
    """The meta-dictionaries on a device, from the store; missing ones are trained first (`load_or_train_all`)."""
    found = [method.to(device) for method in load_or_train_all(requests, run)]
    assert all(isinstance(method, BatchTopK) for method in found)
    return [method for method in found if isinstance(method, BatchTopK)]


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
