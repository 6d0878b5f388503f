"""Rows of tokens for two models: ordinary text and dialogues, each in rows of different lengths.

Every row begins with the token that opens a document. A text is cut into pieces of at most n_ctx tokens, a dialogue to
its first n_ctx. Readers are deterministic in the seed and resume exactly.

Source: Minder et al. 2025, authors' code (one text or dialogue in a row, cut at the context, no packing).
Shapes: T tokens in a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from core.artifacts import content_key
from core.errors import UserError
from core.notices import say_once
from core.text.chat import ROLES, chat_tokens, check_template
from core.text.dialogue_sources import DialogueSource, messages_of
from core.text.documents import Document, DocumentIterator, Split, TextSource
from core.text.tokenizing import bos_token_id, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, TEXT = ROLES.index("bos"), ROLES.index("text")


class Row(NamedTuple):
    """Token ids `[T]` and their roles `[T]` (places in `core.text.chat.ROLES`), int64; whether it is a dialogue."""

    ids: Tensor
    roles: Tensor
    is_chat: bool

    def cut(self, n: int) -> Row:
        """Its first n tokens."""
        return Row(self.ids[:n], self.roles[:n], self.is_chat)


class RowReader(ABC):
    """Endless rows of more than `skipped` tokens. A source that ends is read again with seed + 1, + 2, ...

    skipped  positions at the start of a row that nobody wants; shorter rows are left out
    epochs   how often the source has ended
    """

    is_chat: bool

    def __init__(
        self,
        source: TextSource | DialogueSource,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        seed: int,
        n_ctx: int,
        skipped: int,
    ) -> None:
        self.source, self.tokenizer, self.split, self.seed = source, tokenizer, split, seed
        self.n_ctx, self.skipped = n_ctx, skipped
        self.epochs = 0
        self.counts = {"documents": 0, "left_out": 0, "cut": 0, "replaced": 0}
        self._epoch_rows = 0
        self._reason = ""  # why the last document was left out
        self._documents: DocumentIterator | None = None
        self._before: dict[str, Any] | None = None  # the position before the current document
        self._pieces: list[Row] = []  # of the current document
        self._taken = 0  # pieces of it that were returned

    @abstractmethod
    def pieces(self, document: Document) -> list[Row]:
        """The rows of a document; none if it is left out."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the rows, besides source, split and seed."""

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        while self._taken == len(self._pieces):
            if not self._read():
                self._start_next_epoch()
        self._taken += 1
        return self._pieces[self._taken - 1]

    def one_pass(self) -> Iterator[Row]:
        """The rows until the source first ends."""
        while not self.epochs:
            yield from self._pieces[self._taken :]
            self._taken = len(self._pieces)
            if not self._read():
                return

    def _read(self) -> bool:
        """The next document's pieces; False at the end of the source."""
        if self._documents is None:
            self._documents = self.source.documents(self.split, self.seed + self.epochs, self._before)
        self._before = self._documents.state_dict()
        document = next(self._documents, None)
        if document is None:
            return False
        self._pieces, self._taken = self._long_enough(document), 0
        self._epoch_rows += len(self._pieces)
        return True

    def _long_enough(self, document: Document) -> list[Row]:
        self.counts["documents"] += 1
        self.counts["replaced"] += document.n_replaced
        pieces = [row for row in self.pieces(document) if len(row.ids) > self.skipped]
        self.counts["left_out"] += not pieces
        return pieces

    def _start_next_epoch(self) -> None:
        if not self._epoch_rows:
            raise self.empty()
        self.epochs += 1
        self._epoch_rows = 0
        self._documents = self._before = None
        self._pieces, self._taken = [], 0

    def empty(self) -> UserError:
        """The error for a source without a row."""
        what = "dialogues" if self.is_chat else "text"
        reason = f" The last one was left out: {self._reason}" if self._reason else ""
        return UserError(
            f"{'dialogues' if self.is_chat else 'data'}: {self.source.name} ({self.split}) has no {what} of more than "
            f"{self.skipped} tokens; {self.counts['documents']:,} were read.{reason} About one document in 20 is held "
            "out, chosen by its content."
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data. After loading it, the same rows follow as without an interruption."""
        return {
            "stream": content_key(
                {
                    **self.identity(),
                    "source": self.source.spec,
                    "split": self.split,
                    "seed": self.seed,
                    "n_ctx": self.n_ctx,
                    "skipped": self.skipped,
                }
            ),
            "epochs": self.epochs,
            "epoch_rows": self._epoch_rows - len(self._pieces),  # without those of the current document
            "counts": dict(self.counts),
            "before": self._before,
            "taken": self._taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state belongs to other text or other settings."""
        if state["stream"] != self.state_dict()["stream"]:
            raise ValueError("This position belongs to other text, or to text cut differently. Start anew.")
        self.epochs, self._epoch_rows, self._before = state["epochs"], state["epoch_rows"], state["before"]
        self._documents, self._pieces, self._taken = None, [], 0
        if state["taken"] or self._before is not None:  # in the middle of a document
            self._read()
            self._taken = state["taken"]
        self.counts = dict(state["counts"])


class TextRows(RowReader):
    """Rows of ordinary text: a document's first `max_document_tokens` tokens in pieces of n_ctx, BOS before each."""

    is_chat = False

    def __init__(self, *args: Any, max_document_tokens: int | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_document_tokens = max_document_tokens
        self.bos_token_id = bos_token_id(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        return {"max_document_tokens": self.max_document_tokens}

    def pieces(self, document: Document) -> list[Row]:
        assert isinstance(self.source, TextSource)
        [ids] = token_ids(self.tokenizer, [document.text], self.source.special_tokens)
        if self.max_document_tokens is not None:
            ids = ids[: self.max_document_tokens - 1]
        size = self.n_ctx - 1
        return [self._row(ids[start : start + size]) for start in range(0, len(ids), size)]

    def _row(self, ids: list[int]) -> Row:
        return Row(torch.tensor([self.bos_token_id, *ids]), torch.tensor([BOS, *[TEXT] * len(ids)]), False)


class ChatRows(RowReader):
    """Rows of dialogues. One that the chat template refuses is left out and counted; one that is too long is cut."""

    is_chat = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_template(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        return {"chat_template": self.tokenizer.chat_template}

    def pieces(self, document: Document) -> list[Row]:
        try:
            chat = chat_tokens(self.tokenizer, messages_of(document), document.where or "a dialogue")
        except UserError as error:
            self._reason = str(error)
            return []
        self.counts["cut"] += len(chat.ids) > self.n_ctx
        return [Row(chat.ids, chat.roles, True).cut(self.n_ctx)]


class PairedRows:
    """Text and dialogues beside each other, in equal numbers of tokens."""

    def __init__(self, text: TextRows, chat: ChatRows) -> None:
        self.text, self.chat = text, chat
        self.skipped = text.skipped

    def next_tokens(self, n: int) -> tuple[list[Row], list[Row]]:
        """The next rows of each with exactly n wanted positions; the rest of the last row is dropped."""
        return self._next(self.text, n), self._next(self.chat, n)

    def _next(self, reader: RowReader, n: int) -> list[Row]:
        rows: list[Row] = []
        missing = n
        while missing > 0:
            rows.append(next(reader).cut(missing + self.skipped))
            missing -= len(rows[-1].ids) - self.skipped
        return rows

    def state_dict(self) -> dict[str, Any]:
        text, chat = self.text.state_dict(), self.chat.state_dict()
        return {"stream": content_key({"text": text["stream"], "chat": chat["stream"]}), "text": text, "chat": chat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.text.load_state_dict(state["text"])
        self.chat.load_state_dict(state["chat"])


def counts_of_pair(state: Mapping[str, Any]) -> dict[str, float]:
    """What was read up to a state of `PairedRows`.

    text_passes, dialogue_passes    how often each was begun again, and once more
    dialogues_left_out, dialogues_cut  by the chat template; at the end of the context
    """
    text, chat = state["text"], state["chat"]
    counts = {
        "text_passes": text["epochs"] + 1,
        "dialogue_passes": chat["epochs"] + 1,
        "dialogues_left_out": chat["counts"]["left_out"],
        "dialogues_cut": chat["counts"]["cut"],
        "text_replaced_characters": text["counts"]["replaced"] + chat["counts"]["replaced"],
    }
    return {name: float(value) for name, value in counts.items() if value or name == "text_passes"}


def say_pair_counts(state: Mapping[str, Any], n_ctx: int, what: str) -> None:
    """Lines on standard error for what a user should know of the rows read."""
    text, chat = state["text"], state["chat"]
    n = chat["counts"]["documents"]
    if text["epochs"]:
        say_once(f"data: the text is shorter than {what} needs, and was begun {text['epochs'] + 1} times.")
    if chat["epochs"]:
        say_once(f"dialogues: there are fewer than {what} needs; they were begun {chat['epochs'] + 1} times.")
    if left_out := chat["counts"]["left_out"]:
        say_once(f"dialogues: {left_out:,} of {n:,} were left out of {what}: the chat template refuses their roles.")
    if cut := chat["counts"]["cut"]:
        say_once(f"dialogues: {cut:,} of {n:,} are longer than stream.n_ctx={n_ctx} tokens and were cut for {what}.")
