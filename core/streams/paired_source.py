"""Activations of two models on the same tokens as a source: one half of every batch is ordinary text, one is dialogues.

A buffer of N tokens is filled with N / 2 of each, both halves are permuted, and served in turn: text at even places of
a batch, dialogues at odd ones. Padding and positions that `pair` leaves out are never in it.

Source: Minder et al. 2025, sec. 3 and the authors' code (local shuffling within shards of 10^6 tokens).
Shapes: N tokens in the buffer, R rows of T tokens in a pass, d = width of the site.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from core import distributed
from core.building import build
from core.checked import at_least, positive, require
from core.errors import UserError
from core.models.pair import ModelPair, PairSettings, check_same_ids, load_pair, pair_settings
from core.runtime import Runtime
from core.seeding import derived_seed, generator
from core.streams.activation_source import BufferDtype, pinned_text
from core.streams.activations import BufferedStream
from core.streams.cache import TOKEN_BYTES, CachedStream, Shards, fill_spec
from core.streams.source import Source, Stream
from core.text.documents import Split
from core.text.paired_rows import ChatRows, PairedRows, Row, TextRows, counts_of_pair, say_pair_counts

BESIDE_THE_STREAM = ("seed", "pair", "data", "dialogues", "devices")  # settings with a place of their own in the spec
TRUTH_BYTES = 5  # per token in the cache: its role, and whether it is of a dialogue
N_COMPARED = 64  # texts of which both tokenizers' ids are compared


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedActivationSource(Source):
    """Activations `[B, 2, d]` of a `pair` on `data` and `dialogues`; `batch_size` counts tokens.

    n_tokens             to train on, both kinds together, rounded up to whole batches
    n_ctx                longest row; longer dialogues are cut
    max_document_tokens  of an ordinary text, which is cut into rows of n_ctx; the rest is dropped
    buffer_tokens, buffer_dtype  the shuffle buffer
    rows_per_forward     rows in one forward pass of each model
    seed                 which text is drawn, and how it is shuffled
    pair, data, dialogues  plain configurations of the groups of these names

    A batch has `truth` "roles" (places in `core.text.chat.ROLES`) and "is_chat".
    """

    unit = "tokens"
    groups = ("pair", "data", "dialogues")
    can_share = True

    n_tokens: int = positive()
    n_ctx: int = at_least(2)
    max_document_tokens: int | None = at_least(2)
    buffer_tokens: int = positive()
    buffer_dtype: BufferDtype
    rows_per_forward: int = positive()
    seed: int
    pair: dict[str, Any]
    data: dict[str, Any]
    dialogues: dict[str, Any]

    def check(self) -> None:
        require(self.batch_size % 2 == 0, "stream.batch_size", self.batch_size, "be even: one half is dialogues")
        if self.buffer_tokens % self.batch_size:
            raise UserError(
                f"stream.buffer_tokens ({self.buffer_tokens:,}) must be a multiple of stream.batch_size "
                f"({self.batch_size})."
            )
        words = f"be more than the {self.settings.skipped} positions that pair.drop_first and pair.drop_bos leave out"
        require(self.n_ctx > self.settings.skipped, "stream.n_ctx", self.n_ctx, words)

    @cached_property
    def settings(self) -> PairSettings:
        return pair_settings(self.pair)

    @property
    def n_batches(self) -> int:
        return -(-self.n_tokens // self.batch_size)

    @cached_property
    def row_width(self) -> int:
        return self.settings.width()

    @cached_property
    def pinned(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """`pair`, `data` and `dialogues` with commits in the place of branches."""
        return self.settings.pinned(), pinned_text(self.data), pinned_text(self.dialogues)

    @cached_property
    def commits(self) -> dict[str, str]:
        of_texts = (getattr(build(node), "commits", {}) for node in (self.data, self.dialogues))
        return {**self.settings.commits, **{name: commit for commits in of_texts for name, commit in commits.items()}}

    def note(self) -> None:
        self.settings.note()
        for node in (self.data, self.dialogues):
            assert build(node).spec  # it notes what it reads

    @cached_property
    def batches_spec(self) -> dict[str, Any]:
        pair, data, dialogues = self.pinned
        return {
            "stream": {name: value for name, value in self.plain().items() if name not in BESIDE_THE_STREAM},
            "pair": pair_settings(pair).identity,
            "data": build(data).spec,
            "dialogues": build(dialogues).spec,
            "seed": self.seed,
            **({"devices": self.devices} if self.devices > 1 else {}),
        }

    def rows(self, tokenizer: Any, split: Split, seed: int) -> PairedRows:
        """The rows of a split, from the beginning."""
        _, data, dialogues = self.pinned
        common = (tokenizer, split, seed, self.n_ctx, self.settings.skipped)
        text = TextRows(build(data), *common, max_document_tokens=self.max_document_tokens)
        return PairedRows(text, ChatRows(build(dialogues), *common))

    def check_rows(self, split: Split, seed: int) -> None:
        """Raises UserError if a split has no text or no dialogue, or if the models do not read the same tokens. Reads
        tokenizers and the first texts only."""
        base, chat = self.settings.tokenizers()
        rows = self.rows(chat, split, seed)
        for reader in (rows.text, rows.chat):
            if next(reader.one_pass(), None) is None:
                raise reader.empty()
        documents = rows.text.source.documents(split, seed)
        for document in itertools.islice(documents, N_COMPARED):
            check_same_ids(base, chat, document.text, document.where or f"a text of {rows.text.source.name}")

    def open(self, run: Runtime) -> Stream:
        """The stream from the two models. With a cache, shards on disk are read, and missing ones are written."""
        if run.cache is None or run.cache.dir is None:
            return self.live()
        fill = fill_spec({"version": self.version, **self.batches_spec})
        shards = Shards(run.cache.dir, fill, run.cache.max_gb, run.cache.keep_free_gb)
        sizes = {name: getattr(self, name) for name in ("batch_size", "buffer_tokens", "buffer_dtype")}
        n_batches = self.n_batches + self.calibration_batches
        device = self.settings.torch_device
        return CachedStream(shards, self.live, sizes, n_batches, device, TOKEN_BYTES + TRUTH_BYTES)

    def live(self, rank: int | None = None) -> PairedStream:
        """The stream from the two models; with several devices, the part of `rank` (None: this process's rank)."""
        rank, n = distributed.rank() if rank is None else rank, self.devices
        pair = load_pair(self.pinned[0])
        return PairedStream(
            pair,
            self.rows(pair.tokenizer, "train", self.seed),
            distributed.share("stream.batch_size", self.batch_size, n),
            self.buffer_tokens,
            self.rows_per_forward,
            self.seed if n == 1 else derived_seed(self.seed, "rank", rank),
            getattr(torch, self.buffer_dtype),
            rank,
            n,
        )

    def report(self, stream: Stream) -> dict[str, float]:
        """How often text and dialogues were read, and what was left out or cut (`counts_of_pair`)."""
        assert isinstance(stream, PairedStream | CachedStream)
        state = stream.rows_read()
        if distributed.rank() == 0:
            say_pair_counts(state, self.n_ctx, "training")
        return counts_of_pair(state)

    def check_devices(self) -> None:
        super().check_devices()
        for name in ("batch_size", "buffer_tokens"):
            distributed.share(f"stream.{name} / 2", getattr(self, name) // 2, self.devices)


class PairedStream(BufferedStream):
    """The stream of a pair. With several ranks all read the same fill, and each computes its part of the tokens."""

    rows: PairedRows

    def __init__(
        self,
        pair: ModelPair,
        rows: PairedRows,
        batch_size: int,
        fill_tokens: int,
        rows_per_forward: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        super().__init__(rows, pair.site, batch_size, fill_tokens // n_ranks, seed, dtype)
        self.pair, self.fill_tokens, self.rows_per_forward = pair, fill_tokens, rows_per_forward
        self.rank = rank

    @property
    def device(self) -> torch.device:
        return self.pair.device

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (2, self.pair.d_model)

    def permutation(self) -> Tensor:
        """Text at even places, dialogues at odd ones; each in an order of its own."""
        half = self.buffer_tokens // 2
        text, chat = (
            torch.randperm(half, generator=generator(self.seed, "shuffle", name, self.fill))
            for name in ("text", "chat")
        )
        return torch.stack([text, half + chat], dim=1).flatten()

    def read(self) -> None:
        half = self.buffer_tokens // 2
        if not self._truth:
            zeros = torch.zeros(self.buffer_tokens, dtype=torch.long, device=self.device)
            self._truth = {"roles": zeros, "is_chat": zeros.bool()}
        self._truth["is_chat"][half:] = True
        for kind, rows in enumerate(self.rows.next_tokens(self.fill_tokens // 2)):
            parts = self._own(rows, half)
            by_length = sorted(parts, key=lambda part: len(part[0].ids))  # little padding; the order is drawn later
            for start in range(0, len(by_length), self.rows_per_forward):
                self._fill_rows(by_length[start : start + self.rows_per_forward], kind * half)

    def _own(self, rows: list[Row], half: int) -> list[tuple[Row, int, int, int]]:
        """This rank's part of the wanted tokens: (row, first and last position in it, place in the half)."""
        first, last = self.rank * half, (self.rank + 1) * half
        skipped, begin = self.rows.skipped, 0
        parts = []
        for row in rows:
            end = begin + len(row.ids) - skipped
            low, high = max(begin, first), min(end, last)
            if low < high:
                parts.append((row, low - begin + skipped, high - begin + skipped, low - first))
            begin = end
        return parts

    def _fill_rows(self, parts: list[tuple[Row, int, int, int]], offset: int) -> None:
        longest = max(len(row.ids) for row, *_ in parts)
        ids = torch.stack([_padded(row.ids, longest) for row, *_ in parts])  # [R, T]; no position sees later ones
        x = self.pair.capture(ids)  # [R, T, 2, d]
        assert self._buffer is not None
        for number, (row, first, last, place) in enumerate(parts):
            here = slice(offset + place, offset + place + last - first)
            own = x[number, first:last]
            if not torch.isfinite(own).all():
                position = first + int((~own.isfinite()).flatten(1).any(-1).nonzero()[0])
                raise FloatingPointError(
                    f"Activations at pair.site={self.site} are not finite: fill {self.fill} of the buffer, position "
                    f"{position} of a row that begins {self.pair.tokenizer.decode(row.ids[:20])!r}. "
                    "Try pair.dtype=float32, or another site."
                )
            self._buffer[here] = self.stored(own)
            self._tokens[here] = row.ids[first:last].to(self.device)
            self._positions[here] = torch.arange(first, last, device=self.device)
            self._truth["roles"][here] = row.roles[first:last].to(self.device)


def _padded(ids: Tensor, length: int) -> Tensor:
    return torch.cat([ids, ids[:1].expand(length - len(ids))])
