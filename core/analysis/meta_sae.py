"""Meta-SAEs: sparse dictionaries of the decoder directions of another dictionary (Leask et al. 2025).

A meta-dictionary is a `BatchTopK` trained on the N unit decoder rows of a dictionary. Its latents are called
meta-latents; the codes of a row are the meta-latents that the row's latent is composed of. Any small dictionary
explains some variance of any directions. What counts is how much more it explains than one of random directions.

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
from core.metrics.reconstruction import VarianceExplained
from core.metrics.sparsity import firing_counts
from core.runtime import Runtime
from core.streams.decoder_rows import DecoderRowSource, random_directions


def meta_request(
    meta: Mapping[str, Any],
    rows: Tensor,
    precision: str = "32-true",
    weights: Tensor | None = None,
    start: BatchTopK | None = None,
) -> Request:
    """The request for a meta-dictionary: a BatchTopK trained on decoder rows.

    meta     a plain configuration as in conf/meta
    rows     unit directions `[N, d]` (`core.streams.decoder_rows.directions`)
    weights  `[N]`, for `sampling: frequency`
    start    a meta-dictionary to train further for `finetune_steps` steps with its decoder fixed: only W_enc learns

    Raises UserError if the method is not a BatchTopK, or its width differs from that of the rows.
    """
    method = dict(meta["method"])
    if not issubclass(kind := method_class(method["_target_"]), BatchTopK):
        raise UserError(f"meta.method must be a BatchTopK, not {kind.__name__}.")
    if method["d_model"] != rows.shape[1]:
        raise UserError(f"meta.method.d_model is {method['d_model']}, but rows have {rows.shape[1]} dimensions.")
    source = DecoderRowSource(
        rows=rows.cpu(),  # many requests may wait at once; the stream moves them to its device
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
    methods = [method.to(device) for method in load_or_train_all(requests, run)]
    assert all(isinstance(method, BatchTopK) for method in methods)
    return [method for method in methods if isinstance(method, BatchTopK)]


@torch.no_grad()
def decompose(meta: BatchTopK, rows: Tensor) -> SparseCodes:
    """Codes `[N, M]` of unit rows `[N, d]` under the calibrated threshold: the meta-latents of each latent."""
    return meta.encode_rows(rows)


@torch.no_grad()
def decompose_together(meta: BatchTopK, rows: Tensor) -> Codes:
    """Codes `[N, M]` by the training rule over all rows at once: exactly N k entries, if that many are > 0."""
    return meta.encode_batch(rows)


@dataclass(frozen=True)
class MetaScore:
    """How well a meta-dictionary explains rows: by the training rule over all of them, and under the threshold."""

    batch: VarianceExplained
    threshold: VarianceExplained
    l0_threshold: float  # meta-latents per row
    dead_fraction: float  # of the meta-latents, active in no row by the training rule
    most_frequent: float  # share of the rows in which the most frequent meta-latent is active

    def metrics(self, suffix: str = "") -> dict[str, float]:
        values = {
            "ve": self.batch.centred,
            "ve_uncentred": self.batch.uncentred,
            "ve_threshold": self.threshold.centred,
            "ve_threshold_uncentred": self.threshold.uncentred,
            "l0_threshold": self.l0_threshold,
            "dead_meta_fraction": self.dead_fraction,
            "most_frequent_meta_rate": self.most_frequent,
        }
        return {name + suffix: value for name, value in values.items()}


@torch.no_grad()
def score(meta: BatchTopK, rows: Tensor, weights: Tensor | None = None) -> MetaScore:
    """Score a meta-dictionary on rows `[N, d]`, for instance those it was trained on."""
    together, alone = decompose_together(meta, rows), decompose(meta, rows)
    active = firing_counts(together)
    return MetaScore(
        VarianceExplained.of(rows, meta.decode(together), weights),
        VarianceExplained.of(rows, meta.decode(alone), weights),
        float(alone.l0()),
        float((active == 0).double().mean()),
        float(active.max()) / len(rows),
    )


def null_rows(rows: Tensor, seed: int) -> Tensor:
    """Random directions of the same number and width as `rows`."""
    return random_directions(len(rows), rows.shape[1], seed).to(rows.device)


def replaced_decoder(meta: BatchTopK, directions: Tensor) -> BatchTopK:
    """The meta-dictionary with other unit decoder rows `[M, d]`; encoder, bias and threshold are unchanged."""
    other = type(meta)(**meta.hyperparameters()).to(directions.device)
    other.load_state_dict(meta.state_dict() | {"W_dec": directions})
    return other.eval()
