"""A stream of a language model's activations at one site, shuffled over tokens, deterministic and resumable.

Shapes: R rows of T tokens go through the model at a time, N tokens fit into the buffer, d = width of the site.

A fixed buffer on the device is filled with N tokens, permuted once, served as batches of B rows, and filled again (the
scheme of the BatchTopK authors' code: no half-mixing). Fill number i depends only on the seed and on the text before
it, so the state of a stream is small: the text's position at the start of the current fill, and the number of batches
served since. A resumed stream computes the current fill again and serves the same batches.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

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


class Fill(NamedTuple):
    """x `[N, ...]` in the buffer's dtype, tokens and positions `[N]`, and what a `Batch` has as truth, `[N]` each."""

    x: Tensor
    tokens: Tensor
    positions: Tensor
    truth: dict[str, Tensor]


class Rows(Protocol):
    """A position in the text."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BufferedStream(ABC):
    """An endless iterator of `Batch`es in fp32, not normalised: each dictionary does that itself.

    The buffer stores `dtype`; with the model's own dtype nothing is lost. It is announced, then allocated once.
    site  where the activations are taken, for messages
    """

    def __init__(
        self, rows: Rows, site: str, batch_size: int, buffer_tokens: int, seed: int, dtype: torch.dtype
    ) -> None:
        self.rows, self.site, self.seed, self.dtype = rows, site, seed, dtype
        self.batch_size, self.buffer_tokens = batch_size, buffer_tokens
        self.batches_per_fill = buffer_tokens // batch_size
        self.fill, self.served = 0, 0  # number of the current fill; batches served from it
        self._rows_at_fill = rows.state_dict()
        self._buffer: Tensor | None = None  # [N, *row_shape], allocated by the first fill

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """The shape of the activations at one token."""

    @abstractmethod
    def read(self) -> None:
        """Fill the buffer, `_tokens`, `_positions` and `_truth` from the rows that come next."""

    @abstractmethod
    def permutation(self) -> Tensor:
        """The order in which the current fill is served, `[N]`."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.prepare()
        chosen = self._order[self.served * self.batch_size : (self.served + 1) * self.batch_size]
        self.served += 1
        assert self._buffer is not None
        truth = {name: values[chosen] for name, values in self._truth.items()}
        return Batch(self._buffer[chosen].float(), self._tokens[chosen], self._positions[chosen], truth)

    def prepare(self) -> None:
        """Fill the buffer, unless it holds the next batch."""
        if self._buffer is None or self.served == self.batches_per_fill:
            self._refill(advance=self.served == self.batches_per_fill)

    def in_order(self) -> Fill:
        """The current fill in the order served, on the CPU."""
        self.prepare()
        assert self._buffer is not None
        x = torch.empty(self._buffer.shape, dtype=self.dtype)
        for part, chosen in zip(x.split(self.batch_size), self._order.split(self.batch_size), strict=True):
            part.copy_(self._buffer[chosen])
        truth = {name: values[self._order].cpu() for name, values in self._truth.items()}
        return Fill(x, self._tokens[self._order].cpu(), self._positions[self._order].cpu(), truth)

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

    def rows_read(self) -> dict[str, Any]:
        """The text's position after all that was read."""
        return self.rows.state_dict()

    def _refill(self, advance: bool) -> None:
        if advance:
            self.fill, self.served = self.fill + 1, 0
            self._rows_at_fill = self.rows.state_dict()
        if self._buffer is None:
            self._allocate()
        self.read()
        self._order = self.permutation().to(self.device)

    def stored(self, x: Tensor) -> Tensor:
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
        shape, device, n = self.row_shape, self.device, self.buffer_tokens
        n_bytes = n * math.prod(shape) * self.dtype.itemsize
        print(
            f"shuffle buffer on {device}: {n:,} tokens x {' x '.join(map(str, shape))} x {self.dtype.itemsize} bytes "
            f"= {n_bytes / 1e6:,.1f} MB",
            file=sys.stderr,
        )
        self._buffer = torch.empty(n, *shape, dtype=self.dtype, device=device)
        self._tokens = torch.empty(n, dtype=torch.long, device=device)
        self._positions = torch.empty(n, dtype=torch.long, device=device)
        self._truth: dict[str, Tensor] = {}


class ActivationStream(BufferedStream):
    """The stream of one model, with `x` `[batch_size, d]`. `buffer_tokens` must be a multiple of `batch_size` and of
    `n_ctx`.

    Raises UserError for sizes that do not fit together and FloatingPointError for activations that are not finite.
    """

    rows: RowStream

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
        super().__init__(rows, site, batch_size, buffer_tokens, seed, dtype)
        self.lm, self.rows_per_forward = lm, rows_per_forward

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.lm.width(self.site),)

    def report(self) -> dict[str, float]:
        """How often the text was read, and what was replaced in it (`core.text.rows.counts_of`)."""
        return reported(self.rows_read())

    def permutation(self) -> Tensor:
        return torch.randperm(self.buffer_tokens, generator=generator(self.seed, "shuffle", self.fill))

    def read(self) -> None:
        n_rows = self.buffer_tokens // self.rows.n_ctx
        self._positions.copy_(torch.arange(self.rows.n_ctx).repeat(n_rows))
        for start in range(0, n_rows, self.rows_per_forward):
            self._fill_rows(start, min(self.rows_per_forward, n_rows - start))

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
        self._buffer[begin : begin + len(x)] = self.stored(x)
        self._tokens[begin : begin + len(x)] = tokens.flatten()
