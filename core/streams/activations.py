"""A stream of a language model's activations at one site, shuffled over tokens, deterministic and resumable.

Shapes: R rows of T tokens go through the model at a time, N tokens fit into the buffer, d = width of the site.

A fixed buffer on the device is filled with N tokens, permuted once, served as batches of B rows, and filled again (the
scheme of the BatchTopK authors' code: no half-mixing). Fill number i depends only on the seed and on the text before
it, so the state of a stream is small: the text's position at the start of the current fill, and the number of batches
served since. A resumed stream computes the current fill again and serves the same batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from core import distributed
from core.batch import Batch
from core.errors import UserError
from core.models.language_model import LanguageModel
from core.seeding import generator
from core.text.rows import RowStream, counts_of, say_counts


def check_sizes(batch_size: int, buffer_tokens: int, n_ctx: int) -> None:
    """Raises UserError if the buffer is not a whole number of batches and of rows."""
    if buffer_tokens % batch_size or buffer_tokens % n_ctx:
        raise UserError(
            f"stream.buffer_tokens ({buffer_tokens:,}) must be a multiple of stream.batch_size ({batch_size}) "
            f"and of stream.n_ctx ({n_ctx})."
        )


def reported(rows: Mapping[str, Any]) -> dict[str, float]:
    """The counts of a text's position, after they were said where a user should know them."""
    counts = counts_of(rows)
    if distributed.rank() == 0:
        say_counts(counts, "training")
    return counts


class ActivationStream:
    """An endless iterator of `Batch`es with `x` `[batch_size, d]` in fp32, not normalised: each dictionary
    does that itself. The buffer stores `dtype`; with the model's own dtype nothing is lost.

    `buffer_tokens` must be a multiple of `batch_size` and of `n_ctx`. The buffer is announced, then allocated once.
    Raises UserError for sizes that do not fit together and FloatingPointError for activations that are not finite.
    """

    def __init__(
        self,
        lm: LanguageModel,
        site: str,
        rows: RowStream,
        batch_size: int,
        buffer_tokens: int,
        rows_per_forward: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_sizes(batch_size, buffer_tokens, rows.n_ctx)
        self.lm, self.site, self.rows = lm, site, rows
        self.batch_size, self.buffer_tokens, self.rows_per_forward = batch_size, buffer_tokens, rows_per_forward
        self.seed, self.dtype = seed, dtype
        self.batches_per_fill = buffer_tokens // batch_size
        self.fill, self.served = 0, 0  # number of the current fill; batches served from it
        self._rows_at_fill = rows.state_dict()
        self._buffer: Tensor | None = None  # [N, d], allocated by the first fill

    def __iter__(self) -> Iterator[Batch]:
        return self

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def width(self) -> int:
        return self.lm.width(self.site)

    def __next__(self) -> Batch:
        self.prepare()
        chosen = self._order[self.served * self.batch_size : (self.served + 1) * self.batch_size]
        self.served += 1
        assert self._buffer is not None
        return Batch(self._buffer[chosen].float(), self._tokens[chosen], self._positions[chosen])

    def prepare(self) -> None:
        """Fill the buffer, unless it holds the next batch."""
        if self._buffer is None or self.served == self.batches_per_fill:
            self._refill(advance=self.served == self.batches_per_fill)

    def in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """The current fill in the order served, on the CPU: x `[N, d]` in the buffer's dtype, tokens, positions."""
        self.prepare()
        assert self._buffer is not None
        x = torch.empty(self._buffer.shape, dtype=self.dtype)
        for part, chosen in zip(x.split(self.batch_size), self._order.split(self.batch_size), strict=True):
            part.copy_(self._buffer[chosen])
        return x, self._tokens[self._order].cpu(), self._positions[self._order].cpu()

    def state_dict(self) -> dict[str, Any]:
        """Enough to continue with exactly the next batch."""
        used_up = self.served == self.batches_per_fill
        return {
            "fill": self.fill + used_up,
            "served": 0 if used_up else self.served,
            "rows": self.rows.state_dict() if used_up else self._rows_at_fill,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fill, self.served = state["fill"], state["served"]
        self._rows_at_fill = state["rows"]
        self.rows.load_state_dict(state["rows"])
        if self._buffer is not None:
            self._refill(advance=False)

    def report(self) -> dict[str, float]:
        """How often the text was read, and what was replaced in it (`core.text.rows.counts_of`)."""
        return reported(self.rows.state_dict())

    def _refill(self, advance: bool) -> None:
        if advance:
            self.fill, self.served = self.fill + 1, 0
            self._rows_at_fill = self.rows.state_dict()
        if self._buffer is None:
            self._allocate()
        n_rows = self.buffer_tokens // self.rows.n_ctx
        for start in range(0, n_rows, self.rows_per_forward):
            self._fill_rows(start, min(self.rows_per_forward, n_rows - start))
        g = generator(self.seed, "shuffle", self.fill)
        self._order = torch.randperm(self.buffer_tokens, generator=g).to(self.lm.device)

    def _stored(self, x: Tensor) -> Tensor:
        """Activations in the buffer's dtype. Raises UserError if that cannot hold them."""
        stored = x.to(self.dtype)
        if not torch.isfinite(stored).all():
            name, largest = str(self.dtype).removeprefix("torch."), x.abs().max().item()
            raise UserError(
                f"stream.buffer_dtype: {name} holds numbers up to {torch.finfo(self.dtype).max:.5g}, but there is an "
                f"activation of {largest:.4g} at {self.site}. Take stream.buffer_dtype=float32, or another site."
            )
        return stored

    def _allocate(self) -> None:
        width, device = self.width, self.device
        n_bytes = self.buffer_tokens * width * self.dtype.itemsize
        print(
            f"shuffle buffer on {device}: {self.buffer_tokens:,} tokens x {width} x {self.dtype.itemsize} bytes "
            f"= {n_bytes / 1e6:,.1f} MB",
            file=sys.stderr,
        )
        self._buffer = torch.empty(self.buffer_tokens, width, dtype=self.dtype, device=device)
        self._tokens = torch.empty(self.buffer_tokens, dtype=torch.long, device=device)
        self._positions = torch.arange(self.rows.n_ctx, device=device).repeat(self.buffer_tokens // self.rows.n_ctx)

    def _fill_rows(self, start: int, n_rows: int) -> None:
        tokens = self.rows.next_rows(n_rows).to(self.lm.device)  # [R, T]
        x = self.lm.capture(tokens, self.site).flatten(0, 1)  # [R T, d]
        if not torch.isfinite(x).all():
            first = int((~torch.isfinite(x)).any(-1).nonzero()[0])
            row, position = divmod(first, self.rows.n_ctx)
            raise FloatingPointError(
                f"Activations at stream.site={self.site} are not finite: fill {self.fill} of the buffer, "
                f"row {start + row}, position {position}. Try model.dtype=float32, or another site."
            )
        begin = start * self.rows.n_ctx
        assert self._buffer is not None
        self._buffer[begin : begin + len(x)] = self._stored(x)
        self._tokens[begin : begin + len(x)] = tokens.flatten()
