"""Rows of tokens made from documents: endless, deterministic in the seed, resumable to the same row.

Shapes: n rows, n_ctx tokens in a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from core.artifacts import content_key
from core.errors import UserError
from core.interrupts import raise_if_interrupted
from core.notices import say_once
from core.text.documents import Distinct, Document, DocumentIterator, Split, TextSource
from core.text.tokenizing import bos_token_id, token_ids, unwritten_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["concat", "per_document"]
DOCUMENTS_PER_CALL = 64  # documents tokenised at a time; does not change the rows
CHARS_PER_TOKEN = 6  # more than the average of documents
UNUSED_TOKENS = 64  # ignored at the cut end of a long document; more than a word has


@dataclass(frozen=True, eq=False)
class Rows:
    """Token ids `[n, n_ctx]`, int64, and which of them were put there to open a document, bool `[n, n_ctx]`.

    A text can hold the same id (`data.special_tokens: parse`, or an unknown word): that opens nothing."""

    tokens: Tensor
    starts: Tensor


class RowStream:
    """Rows of token ids from a text source.

    concat        Leask et al. 2025 and Bussmann et al. 2024: every document starts with the beginning-of-sequence token
                  (BOS) and is cut to `max_document_tokens` tokens, BOS included. The documents are joined, and rows are
                  cut from the whole. So BOS can be anywhere in a row, and rows cross documents. Deviation: tokens that
                  do not fill a row are kept for the next one; the authors' code drops those of every batch.
    per_document  every row is BOS and n_ctx - 1 consecutive tokens of one document, which is first cut to
                  `max_document_tokens` tokens (BOS included). A last piece that is too short is dropped.

    `max_document_tokens` is the language model's context in the authors' code; None leaves documents whole.
    A source that ends is read again with seed + 1, + 2, ...; `epochs` counts how often it has ended.
    Documents of which the tokenizer makes no token are left out.
    With several ranks, a call for n rows takes the next n_ranks * n rows, and each rank gets its n of them. Every rank
    reads all of the text, so all have the same position in it.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        seed: int,
        n_ctx: int,
        packing: Packing = "concat",
        max_document_tokens: int | None = None,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        if packing not in get_args(Packing):
            raise UserError(f"packing: {packing!r} is not one of {', '.join(get_args(Packing))}.")
        if n_ctx < 2:
            raise UserError(f"n_ctx: a row needs at least 2 tokens, not {n_ctx}.")
        if max_document_tokens is not None and max_document_tokens < 2:
            raise UserError(f"max_document_tokens must be at least 2 (BOS and one token), not {max_document_tokens}.")
        self.source, self.tokenizer, self.split, self.seed = source, tokenizer, split, seed
        self.n_ctx, self.packing, self.max_document_tokens = n_ctx, packing, max_document_tokens
        self.rank, self.n_ranks = rank, n_ranks
        self.bos_token_id = bos_token_id(tokenizer)
        self.epochs = 0
        self._epoch_tokens = 0  # tokens read in this epoch
        self._pass_tokens = 0  # tokens of the last whole epoch
        self._n_replaced = 0  # characters replaced in the documents read
        self._n_empty = 0  # documents of this epoch without a token
        self._unwritten = unwritten_ids(tokenizer) if source.special_tokens == "plain" else frozenset()
        self._documents: DocumentIterator | None = None  # opened by the first call for rows
        self._documents_state: dict[str, Any] | None = None  # the position to open them at
        self._pending: list[Tensor] = []  # tokens not yet returned; each 1-d; -1 - id for one that opens a document

    def next_rows(self, n: int) -> Tensor:
        """The next n rows, `[n, n_ctx]` int64. On one rank, the rows do not depend on how calls group them."""
        n_wanted = n * self.n_ranks * self.n_ctx
        while self._n_pending() < n_wanted:
            self._pending.append(self._read())
        return self._take(n * self.n_ranks).tokens[self.rank * n : (self.rank + 1) * n]

    def rows_of_one_pass(self, n: int) -> Rows:
        """The next n rows, or fewer: those until the text first ends."""
        n_wanted = n * self.n_ctx
        while self._n_pending() < n_wanted and not self.epochs:
            self._pending.append(self._read())
        return self._take(min(n, self._n_pending() // self.n_ctx))

    def _n_pending(self) -> int:
        return sum(map(len, self._pending))

    def _take(self, n: int) -> Rows:
        tokens = torch.cat([torch.empty(0, dtype=torch.long), *self._pending])
        self._pending = [tokens[n * self.n_ctx :].clone()]
        rows = tokens[: n * self.n_ctx].view(n, self.n_ctx)
        starts = rows < 0
        return Rows(torch.where(starts, -1 - rows, rows), starts)

    @property
    def counts(self) -> dict[str, float]:
        """What was read so far; see `counts_of`."""
        return counts_of(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Plain data and one tensor. After loading it, the same rows follow as without an interruption."""
        return {
            "stream": self._identity(),
            "epochs": self.epochs,
            "epoch_tokens": self._epoch_tokens,
            "pass_tokens": self._pass_tokens,
            "replaced": self._n_replaced,
            "documents": self._documents.state_dict() if self._documents else self._documents_state,
            "pending": torch.cat([torch.empty(0, dtype=torch.long), *self._pending]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state belongs to other text or other settings."""
        if state["stream"] != self._identity():
            raise ValueError(
                f"The saved position does not belong to these rows of {self.source.name} ({self.split}): the text, the "
                "split, the seed or the packing has changed since. Restore these settings, or start from the beginning."
            )
        self.epochs, self._epoch_tokens = state["epochs"], state["epoch_tokens"]
        self._pass_tokens, self._n_replaced = state.get("pass_tokens", 0), state.get("replaced", 0)  # not in older ones
        self._documents, self._documents_state = None, state["documents"]
        self._pending = [state["pending"].clone()]

    def _identity(self) -> str:
        names = ("split", "seed", "n_ctx", "packing", "max_document_tokens", "bos_token_id")
        settings = {name: getattr(self, name) for name in names}
        return content_key({"source": self.source.spec, "vocab": len(self.tokenizer), **settings})

    def _read(self) -> Tensor:
        """The packed tokens of the next documents, 1-d. At the end of the source: no tokens, and a new epoch starts."""
        if self._documents is None:
            self._documents = self.source.documents(self.split, self.seed + self.epochs, self._documents_state)
        documents = list(itertools.islice(self._documents, DOCUMENTS_PER_CALL))
        if not documents:
            self._start_next_epoch()
            return torch.empty(0, dtype=torch.long)
        self._n_replaced += sum(document.n_replaced for document in documents)
        ids = self._encode(documents)
        self._n_empty += sum(not one for one in ids)
        packed = map(self._pack, filter(None, ids))
        tokens = torch.tensor(list(itertools.chain.from_iterable(packed)), dtype=torch.long)
        self._epoch_tokens += len(tokens)
        return tokens

    def _encode(self, documents: Sequence[Document]) -> list[list[int]]:
        """Token ids of every document. Of a long one perhaps only the beginning, but at least `max_document_tokens`.

        What follows a word does not change its tokens. So a text is cut where that is almost surely enough, and encoded
        whole if it was not. Tokens near the cut are never used.
        """
        longest = self.max_document_tokens
        texts = [document.text for document in documents]
        cut = texts if longest is None else [text[: CHARS_PER_TOKEN * (longest + UNUSED_TOKENS)] for text in texts]
        ids = self._tokenize(cut, documents)
        for index, (text, beginning) in enumerate(zip(texts, cut, strict=True)):
            if longest is not None and len(beginning) < len(text) and len(ids[index]) < longest + UNUSED_TOKENS:
                ids[index] = self._tokenize([text], [documents[index]])[0]
        return ids

    def _tokenize(self, texts: Sequence[str], documents: Sequence[Document]) -> list[list[int]]:
        """Raises UserError that names the document, if the tokenizer cannot take one."""
        try:
            ids = token_ids(self.tokenizer, texts, self.source.special_tokens)
        except Exception as error:
            raise_if_interrupted(error)
            if len(texts) > 1:
                return [self._tokenize([text], [document])[0] for text, document in zip(texts, documents, strict=True)]
            where = documents[0].where or f"a document of {self.source.name} ({texts[0]!r:.60})"
            raise UserError(
                f"data: {where} is a text that the tokenizer {self.tokenizer.name_or_path!r} cannot take: "
                f"{error!s:.200}"
            ) from error
        for document, one in zip(documents, ids, strict=True):
            if not self._unwritten.isdisjoint(one):
                self._say_written(document, next(i for i in one if i in self._unwritten))
        return ids

    def _say_written(self, document: Document, token_id: int) -> None:
        say_once(
            f"data.special_tokens=plain: the tokenizer {self.tokenizer.name_or_path!r} makes its special token "
            f"{self.tokenizer.convert_ids_to_tokens(token_id)!r} of ordinary text all the same, first in "
            f"{document.where or self.source.name}. It does not count as the beginning of a document."
        )

    def _start_next_epoch(self) -> None:
        assert self._documents is not None
        if not self._epoch_tokens:
            raise self._too_little(self._documents.explain())
        if self._n_empty:
            say_once(f"data: the tokenizer makes no token of {self._n_empty:,} documents of {self.source.name}.")
        self.epochs += 1
        self._pass_tokens, self._epoch_tokens, self._n_empty = self._epoch_tokens, 0, 0
        self._documents = self._documents_state = None

    def _too_little(self, reason: str) -> UserError:
        if self._n_empty:
            return UserError(
                f"model: the tokenizer {self.tokenizer.name_or_path!r} makes no token of any of the {self._n_empty:,} "
                f"documents of {self.source.name} ({self.split}). Is it made for this language and script?"
            )
        wanted = "documents" if self.packing == "concat" else f"documents of at least {self.n_ctx - 1} tokens"
        return UserError(
            f"The {self.split} split of {self.source.name} has no {wanted}. {reason + ' ' if reason else ''}About one "
            "document in 20 is held out, chosen by its content. Use more text, or choose data=bundled."
        )

    def _pack(self, ids: list[int]) -> list[int]:
        """One document's tokens -> the tokens that it contributes to the rows, BOS as -1 - id."""
        opening = -1 - self.bos_token_id
        if self.max_document_tokens is not None:
            ids = ids[: self.max_document_tokens - 1]
        if self.packing == "concat":
            return [opening, *ids]
        size = self.n_ctx - 1
        starts = range(0, len(ids) - size + 1, size)
        return [token for start in starts for token in (opening, *ids[start : start + size])]


def counts_of(state: Mapping[str, Any]) -> dict[str, float]:
    """What rows were read up to a state (`RowStream.state_dict`).

    text_passes               how often the text was read; 1 as long as it has not ended
    text_replaced_characters  lone surrogates in all that was read; missing if there were none
    """
    passes, n_pass = 1.0, state.get("pass_tokens", 0)
    if state["epochs"]:  # states of earlier versions do not tell how long a pass was
        n_read = state["epochs"] * n_pass + state["epoch_tokens"] - len(state["pending"])
        passes = n_read / n_pass if n_pass else float(state["epochs"] + 1)
    n_replaced = float(state.get("replaced", 0))
    return {"text_passes": passes, **({"text_replaced_characters": n_replaced} if n_replaced else {})}


def say_counts(counts: Mapping[str, float], what: str) -> None:
    """Lines on standard error where a text was read again, or changed. `what` it was read for, such as `training`."""
    if (passes := counts["text_passes"]) > 1:
        say_once(f"data: the text is shorter than {what} needs, and was read {passes:,.2f} times.")
    if n := counts.get("text_replaced_characters"):
        say_once(f"data: {n:,.0f} lone surrogates, which are no characters, were replaced by U+FFFD for {what}.")


def check_held_out(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    n_ctx: int,
    packing: Packing,
    max_document_tokens: int | None,
) -> None:
    """Raises UserError if the documents held out have no whole row. Reads no more of them than it must."""
    distinct = Distinct(source)
    stream = RowStream(distinct, tokenizer, "heldout", seed, n_ctx, packing, max_document_tokens)
    if not len(stream.rows_of_one_pass(1).tokens):
        raise _no_row(distinct, n_ctx)


def _no_row(distinct: Distinct, n_ctx: int) -> UserError:
    return UserError(
        f"data: the {distinct.n_documents:,} different documents that {distinct.name} holds out have no whole row of "
        f"{n_ctx:,} tokens together, so there is nothing to measure on. About one document in 20 is held out, chosen "
        "by its content. Use more text, or fewer stream.n_ctx."
    )


def read_held_out(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int,
    n_ctx: int,
    packing: Packing,
    max_document_tokens: int | None,
) -> tuple[Rows, dict[str, float]]:
    """n rows of the documents held out, or as many as there are, each document once; and what was read.

    heldout_rows, heldout_tokens  distinct ones, as far as the documents are
    text_replaced_characters      as in `counts_of`

    Says on standard error that there are fewer. Raises UserError if there is no whole row.
    """
    distinct = Distinct(source)
    stream = RowStream(distinct, tokenizer, "heldout", seed, n_ctx, packing, max_document_tokens)
    rows = stream.rows_of_one_pass(n)
    n_rows, n_documents = len(rows.tokens), distinct.n_documents
    counts = {**stream.counts, "heldout_rows": float(n_rows), "heldout_tokens": float(rows.tokens.numel())}
    if not n_rows:
        raise _no_row(distinct, n_ctx)
    if n_rows < n:
        say_once(
            f"evaluation.n_rows={n:,}: {source.name} holds out {n_documents:,} different documents, which have "
            f"{n_rows:,} rows of {n_ctx:,} tokens ({rows.tokens.numel():,} tokens); the figures are on these."
        )
    if distinct.n_copies:
        say_once(f"data: {distinct.n_copies:,} copies of documents held out of {source.name} are left out.")
    say_counts(counts, "evaluation")
    return rows, {name: value for name, value in counts.items() if name != "text_passes"}
