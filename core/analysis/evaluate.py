"""Score dictionaries on held-out text: reconstruction, sparsity, and what splicing them in does to the language model.

Shapes: R rows of text, T tokens in a row, d = width of the site, m = dict_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core.analysis.held_out import DownstreamReference, HeldOut
from core.methods.dictionary import Dictionary
from core.metrics.downstream import SplicedSums
from core.metrics.reconstruction import ReconstructionSums
from core.metrics.sparsity import SparsitySums


@dataclass(frozen=True)
class Evaluation:
    """Sums over the evaluation rows, from which every figure follows.

    normalised  reconstruction in the dictionary's space, after its input normalisation
    raw         reconstruction of the activations as the language model has them
    """

    normalised: ReconstructionSums
    raw: ReconstructionSums
    sparsity: SparsitySums
    spliced: SplicedSums | None  # None, as the reference, where no row is a downstream row
    reference: DownstreamReference | None

    @property
    def l0_histogram(self) -> Tensor:
        """Tokens per L0, int64 `[largest L0 + 1]`."""
        return self.sparsity.histogram()

    @property
    def l0_histogram_without_bos(self) -> Tensor:
        """The same without the tokens that begin a text."""
        return self.sparsity.histogram(bos=False)

    def metrics(self) -> dict[str, float]:
        """All figures, flat. Cross-entropies and KL are in nats per token; `_raw` marks the raw space."""
        return {
            "n_tokens": float(self.sparsity.n_tokens),
            "nmse_token_std": self.raw.nmse_token_std,
            "nmse_raw_energy": self.raw.nmse_raw_energy,
            **_spread_metrics(self.normalised, ""),
            **_spread_metrics(self.raw, "_raw"),
            **self.sparsity.metrics(),
            **self._downstream_metrics(),
        }

    def _downstream_metrics(self) -> dict[str, float]:
        if self.spliced is None or self.reference is None:
            return {}
        return self.spliced.metrics(self.reference.zero_ablated, self.reference.mean_ablated)


def _spread_metrics(sums: ReconstructionSums, suffix: str) -> dict[str, float]:
    values = {"fvu": sums.fvu, "fve": sums.fve, "cosine": sums.mean_cosine, "l2_ratio": sums.mean_l2_ratio}
    return {name + suffix: value for name, value in values.items()}


def evaluate_dictionary(method: Dictionary, held_out: HeldOut) -> Evaluation:
    """Score one dictionary under its inference rule; see `evaluate_dictionaries`."""
    return evaluate_dictionaries({"": method}, held_out)[""]


def evaluate_dictionaries(methods: Mapping[str, Dictionary], held_out: HeldOut) -> dict[str, Evaluation]:
    """Score dictionaries at one site under their inference rules; they share the language model's passes.

    Reconstruction and sparsity are measured on all rows, the loss on the downstream rows, with the reconstruction in
    place of the activation at every position. Without downstream rows those figures are left out. The methods end in
    the mode they came in.
    """
    return _evaluate(methods, held_out, training=False)


def evaluate_compat(method: Dictionary, one_batch: HeldOut) -> dict[str, float]:
    """The figures as the BatchTopK authors' code computes them: by the training rule, on one batch of rows
    (`HeldOut.one_batch`).

    BatchTopK then selects its latents over the whole batch, as in training, where `evaluate_dictionary` applies the
    threshold. Mode and buffers of the method are as before afterwards.
    """
    evaluation = _evaluate({"": method}, one_batch, training=True)[""]
    return {f"{name}_compat": value for name, value in evaluation.metrics().items()}


@torch.no_grad()
def _evaluate(methods: Mapping[str, Dictionary], held_out: HeldOut, training: bool) -> dict[str, Evaluation]:
    reference = held_out.compared() if len(held_out.downstream_rows) else None
    with _mode(methods, training):
        reconstructions = _reconstruct_rows(methods, held_out)
        spliced = {} if reference is None else _splice_rows(methods, held_out, reference.clean_logits)
    evaluations = {name: Evaluation(*reconstructions[name], spliced.get(name), reference) for name in methods}
    for name, evaluation in evaluations.items():
        _check_finite(name, held_out.site, evaluation)
    return evaluations


class _RowSums(NamedTuple):
    normalised: ReconstructionSums
    raw: ReconstructionSums
    sparsity: SparsitySums


def _row_sums(method: Dictionary, x: Tensor, is_bos: Tensor) -> _RowSums:  # x [B, d], is_bos [B]
    x_normalised, shift = method.norm(x)
    codes = method.encode(x_normalised)
    x_hat = method.decode(codes)  # [B, d]
    return _RowSums(
        ReconstructionSums.of(x_normalised, x_hat),
        ReconstructionSums.of(x, method.norm.undo(x_hat, shift)),
        SparsitySums.of(codes, is_bos),
    )


def _reconstruct_rows(methods: Mapping[str, Dictionary], held_out: HeldOut) -> dict[str, _RowSums]:
    sums: dict[str, _RowSums] = {}
    for start in range(0, len(held_out.rows), held_out.rows_per_batch):
        here = slice(start, start + held_out.rows_per_batch)
        x = held_out.activations(here).flatten(0, 1).float()  # [r T, d]
        is_bos = held_out.starts[here].flatten().to(x.device)
        for name, method in methods.items():
            new, old = _row_sums(method, x, is_bos), sums.get(name)
            sums[name] = new if old is None else _RowSums(old[0] + new[0], old[1] + new[1], old[2] + new[2])
    return sums


def _splice_rows(
    methods: Mapping[str, Dictionary], held_out: HeldOut, clean_logits: Tensor | None
) -> dict[str, SplicedSums]:
    sums: dict[str, SplicedSums] = {}
    lm, site, n_rows = held_out.lm, held_out.site, len(held_out.downstream_rows)
    for start in range(0, n_rows, held_out.rows_per_batch):
        here = slice(start, min(start + held_out.rows_per_batch, n_rows))
        tokens, x = held_out.rows[here], held_out.activations(here)  # [r, T], [r, T, d]
        clean = lm.logits_with(x, tokens, site) if clean_logits is None else clean_logits[here]  # [r, T, V]
        for name, method in methods.items():
            spliced = lm.logits_with(method.reconstruct(x), tokens, site)
            new = SplicedSums.of(clean, spliced, tokens.to(clean.device))
            sums[name] = sums[name] + new if name in sums else new
    return sums


@contextmanager
def _mode(methods: Mapping[str, Dictionary], training: bool) -> Iterator[None]:
    """Put methods into training or evaluation mode; at the end every module's mode and every buffer is as it was."""
    modules = [module for method in methods.values() for module in method.modules()]
    modes = [module.training for module in modules]
    buffers = [(buffer, buffer.clone()) for method in methods.values() for buffer in method.buffers()]
    try:
        for method in methods.values():
            method.train(training)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)


def _check_finite(name: str, site: str, evaluation: Evaluation) -> None:
    """Stop where a sum is NaN or infinite, rather than report it."""
    for what, value in (
        (f"The activations at {site}", evaluation.raw.energy),
        (f"The reconstructions of dictionary {name!r} at {site}", evaluation.raw.error),
        *([] if evaluation.spliced is None else [(f"The logits with {name!r} spliced in", evaluation.spliced.kl)]),
    ):
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"{what} are not finite on the evaluation rows.")
