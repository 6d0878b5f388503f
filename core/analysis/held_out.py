"""The held-out text that dictionaries are scored on, and the losses that they are compared with.

Shapes: R rows of text, T tokens in a row, d = width of the site, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.errors import UserError
from core.models.language_model import Edit, LanguageModel


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

    `keep_logits` keeps the clean logits, R T V numbers, which saves a pass for every dictionary scored.
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


@dataclass(frozen=True, eq=False, kw_only=True)
class HeldOut:
    """Rows of text, and how the language model reads them.

    rows               tokens `[R, T]`
    starts             bool `[R, T]`, the tokens put there to open a document (`core.text.rows.Rows`)
    n_downstream_rows  the number of first rows on which the language model's loss is measured; all, if there are fewer
    rows_per_batch     rows that go through the model at a time
    reference          the losses to compare with, on the downstream rows; None: they are computed when they are needed
    captured           the activations of all rows at the site, `[R, T, d]`; None: the model computes them each time

    Raises ValueError for a reference that was made at another site or on other rows.
    """

    lm: LanguageModel
    site: str
    rows: Tensor
    starts: Tensor
    n_downstream_rows: int
    rows_per_batch: int
    reference: DownstreamReference | None = None
    captured: Tensor | None = None

    def __post_init__(self) -> None:
        known, rows = self.reference, self.downstream_rows
        if known is not None and (known.site != self.site or not torch.equal(known.rows.cpu(), rows.cpu())):
            raise ValueError(f"The reference was made at {known.site}, on other rows or for another site: {self.site}.")

    @property
    def downstream_rows(self) -> Tensor:
        return self.rows[: self.n_downstream_rows]

    def activations(self, here: slice) -> Tensor:
        """Those of some of the rows, `[r, T, d]`, as the model has them."""
        return self.lm.capture(self.rows[here], self.site) if self.captured is None else self.captured[here]

    def compared(self) -> DownstreamReference:
        """The reference, computed where there is none."""
        if self.reference is not None:
            return self.reference
        return downstream_reference(self.lm, self.site, self.downstream_rows, self.rows_per_batch)

    def first(self, n_rows: int) -> HeldOut:
        """The first rows alone, at most all, and all of them downstream rows; the reference stays if it has as many."""
        n_rows = min(n_rows, len(self.rows))
        kept = None if self.reference is None or len(self.reference.rows) != n_rows else self.reference
        captured = None if self.captured is None else self.captured[:n_rows]
        rows, starts = self.rows[:n_rows], self.starts[:n_rows]
        return replace(self, rows=rows, starts=starts, n_downstream_rows=n_rows, reference=kept, captured=captured)

    def one_batch(self, n_tokens: int) -> HeldOut:
        """The first rows that have `n_tokens` tokens together, in one batch, without a reference; all rows, if they
        have fewer. Raises UserError for less than a row."""
        n = n_compat_rows(min(n_tokens, self.rows.numel()), *self.rows.shape)
        return replace(self.first(n), rows_per_batch=n, reference=None)


def n_compat_rows(n_tokens: int, n_rows: int, n_ctx: int) -> int:
    """How many rows have `n_tokens` tokens together. Raises UserError if there are fewer."""
    n = n_tokens // n_ctx
    if not 0 < n <= n_rows:
        raise UserError(
            f"evaluation.compat_tokens={n_tokens} needs 1 row or more of {n_ctx} tokens, and at most "
            f"evaluation.n_rows={n_rows}: raise evaluation.n_rows, or change evaluation.compat_tokens."
        )
    return n
