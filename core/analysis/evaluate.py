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

from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.metrics.downstream import SplicedSums
from core.metrics.reconstruction import ReconstructionSums
from core.metrics.sparsity import SparsitySums
from core.models.language_model import Edit, LanguageModel

COMPAT_TOKENS = 4096  # the BatchTopK authors score one batch of activations, and 32 rows of 128 tokens


@dataclass(frozen=True)
class DownstreamReference:
    """What every dictionary at a site is compared with, in nats per token over `rows`."""

    site: str
    rows: Tensor  # [R, T]
    mean: Tensor  # [d], the mean activation over all tokens of the rows
    clean: float
    zero_ablated: float
    mean_ablated: float
    clean_logits: Tensor | None = None  # [R, T, V]


@torch.no_grad()
def downstream_reference(
    lm: LanguageModel, site: str, rows: Tensor, rows_per_batch: int, keep_logits: bool = False
) -> DownstreamReference:
    """Cross-entropies on `rows` `[R, T]`: clean, and with every activation at the site set to zero or to their mean.

    `keep_logits` keeps the clean logits, R T V numbers, and so saves a pass for every dictionary scored.
    """
    batches = rows.split(rows_per_batch)
    total = torch.zeros(lm.width(site), dtype=torch.float64, device=lm.device)
    for tokens in batches:
        total += lm.capture(tokens, site).double().sum((0, 1))
    mean = (total / rows.numel()).float()
    edits = (None, Edit(site, torch.zeros_like), Edit(site, lambda x: mean.expand_as(x)))
    sums = torch.zeros(len(edits), dtype=torch.float64, device=lm.device)
    for tokens in batches:
        for i, edit in enumerate(edits):
            sums[i] += lm.token_losses(tokens, edit).double().sum()
    clean, zero, mean_ablated = (sums / rows[:, 1:].numel()).tolist()
    clean_logits = torch.cat([lm.logits(tokens) for tokens in batches]) if keep_logits else None
    return DownstreamReference(site, rows, mean, clean, zero, mean_ablated, clean_logits)


@dataclass(frozen=True)
class Evaluation:
    """Sums over the evaluation rows, from which every figure follows.

    normalised  reconstruction in the space in which the dictionary works (after its input normalisation)
    raw         reconstruction of the activations as the language model has them
    """

    normalised: ReconstructionSums
    raw: ReconstructionSums
    sparsity: SparsitySums
    spliced: SplicedSums
    reference: DownstreamReference

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
            **self.spliced.metrics(self.reference.zero_ablated, self.reference.mean_ablated),
        }


def _spread_metrics(sums: ReconstructionSums, suffix: str) -> dict[str, float]:
    values = {"fvu": sums.fvu, "fve": sums.fve, "cosine": sums.mean_cosine, "l2_ratio": sums.mean_l2_ratio}
    return {name + suffix: value for name, value in values.items()}


def evaluate_dictionary(
    method: Dictionary,
    lm: LanguageModel,
    site: str,
    rows: Tensor,
    n_downstream_rows: int,
    rows_per_batch: int,
    reference: DownstreamReference | None = None,
    captured: Tensor | None = None,
) -> Evaluation:
    """Score one dictionary under its inference rule; see `evaluate_dictionaries`."""
    found = evaluate_dictionaries({"": method}, lm, site, rows, n_downstream_rows, rows_per_batch, reference, captured)
    return found[""]


@torch.no_grad()
def evaluate_dictionaries(
    methods: Mapping[str, Dictionary],
    lm: LanguageModel,
    site: str,
    rows: Tensor,
    n_downstream_rows: int,
    rows_per_batch: int,
    reference: DownstreamReference | None = None,
    captured: Tensor | None = None,
) -> dict[str, Evaluation]:
    """Score dictionaries at one site under their inference rules; they share the language model's passes.

    Reconstruction and sparsity are measured on all tokens of `rows` `[R, T]`, downstream effects on the first
    `n_downstream_rows`, with the reconstruction in place of the activation at every position. `reference` saves the
    ablations where it was made before, on those same rows; `captured` `[R, T, d]`, the activations of `rows` at the
    site, saves the passes that make them. The methods end in the mode they came in.
    """
    downstream_rows = rows[:n_downstream_rows]
    if reference is None:
        reference = downstream_reference(lm, site, downstream_rows, rows_per_batch)
    elif reference.site != site or not torch.equal(reference.rows.cpu(), downstream_rows.cpu()):
        raise ValueError(f"The reference was made at {reference.site} on other rows or for another site than {site}.")
    with _mode(methods, training=False):
        reconstructions = _reconstruct_rows(methods, lm, site, rows, rows_per_batch, captured)
        spliced = _splice_rows(methods, lm, reference, rows_per_batch, captured)
    found = {name: Evaluation(*reconstructions[name], spliced[name], reference) for name in methods}
    for name, evaluation in found.items():
        _check_finite(name, site, evaluation)
    return found


@torch.no_grad()
def evaluate_compat(
    method: Dictionary,
    lm: LanguageModel,
    site: str,
    rows: Tensor,
    n_tokens: int = COMPAT_TOKENS,
    reference: DownstreamReference | None = None,
    captured: Tensor | None = None,
) -> dict[str, float]:
    """The figures as the BatchTopK authors' code takes them: training rule, one batch of `n_tokens` tokens.

    BatchTopK then selects its latents over the whole batch, as in training, where `evaluate_dictionary` applies the
    threshold. Rows beyond `n_tokens` are not looked at; `captured` are the activations of `rows`, as above. The
    method's mode and buffers are as before afterwards.
    """
    rows = compat_rows(rows, n_tokens)
    methods = {"": method}
    if reference is None:
        reference = downstream_reference(lm, site, rows, len(rows))
    with _mode(methods, training=True):
        reconstructions = _reconstruct_rows(methods, lm, site, rows, len(rows), captured)
        spliced = _splice_rows(methods, lm, reference, len(rows), captured)
    evaluation = Evaluation(*reconstructions[""], spliced[""], reference)
    _check_finite("", site, evaluation)
    return {f"{name}_compat": value for name, value in evaluation.metrics().items()}


def compat_rows(rows: Tensor, n_tokens: int = COMPAT_TOKENS) -> Tensor:
    """The first rows `[R, T]` that have `n_tokens` tokens together."""
    return rows[: n_compat_rows(n_tokens, *rows.shape)]


def n_compat_rows(n_tokens: int, n_rows: int, n_ctx: int) -> int:
    """How many rows have `n_tokens` tokens together. Raises UserError unless there are so many."""
    n = n_tokens // n_ctx
    if not 0 < n <= n_rows:
        raise UserError(
            f"evaluation.compat_tokens={n_tokens} needs 1 row or more of {n_ctx} tokens, and at most "
            f"evaluation.n_rows={n_rows}: raise evaluation.n_rows, or change evaluation.compat_tokens."
        )
    return n


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


def _reconstruct_rows(
    methods: Mapping[str, Dictionary],
    lm: LanguageModel,
    site: str,
    rows: Tensor,
    rows_per_batch: int,
    captured: Tensor | None = None,
) -> dict[str, _RowSums]:
    sums: dict[str, _RowSums] = {}
    for start in range(0, len(rows), rows_per_batch):
        here = slice(start, start + rows_per_batch)
        tokens = rows[here]  # [R, T]
        activations = lm.capture(tokens, site) if captured is None else captured[here]
        x = activations.flatten(0, 1).float()  # [R T, d]
        is_bos = tokens.flatten().to(x.device) == lm.bos_token_id
        for name, method in methods.items():
            new, old = _row_sums(method, x, is_bos), sums.get(name)
            sums[name] = new if old is None else _RowSums(old[0] + new[0], old[1] + new[1], old[2] + new[2])
    return sums


def _splice_rows(
    methods: Mapping[str, Dictionary],
    lm: LanguageModel,
    reference: DownstreamReference,
    rows_per_batch: int,
    captured: Tensor | None = None,
) -> dict[str, SplicedSums]:
    sums: dict[str, SplicedSums] = {}
    site, rows, clean_logits = reference.site, reference.rows, reference.clean_logits
    for start in range(0, len(rows), rows_per_batch):
        here = slice(start, min(start + rows_per_batch, len(rows)))
        tokens = rows[here]  # [R, T]
        x = lm.capture(tokens, site) if captured is None else captured[here]
        clean = lm.logits_with(x, tokens, site) if clean_logits is None else clean_logits[here]  # [R, T, V]
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
        (f"The logits with dictionary {name!r} spliced in at {site}", evaluation.spliced.kl),
    ):
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"{what} are not finite on the evaluation rows.")
