"""Rows of tokens made from documents: endless, deterministic in the seed, resumable to the same row.

Shapes: n rows, n_ctx tokens in a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from core.artifacts import content_key
from core.errors import UserError
from core.text.documents import DocumentIterator, Split, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["concat", "per_document"]
DOCUMENTS_PER_CALL = 64  # documents tokenised at a time; does not change the rows
CHARS_PER_TOKEN = 6  # more than the average of documents
UNUSED_TOKENS = 64  # ignored at the cut end of a long document; more than a word has


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
        self._documents: DocumentIterator | None = None  # opened by the first call for rows
        self._documents_state: dict[str, Any] | None = None  # the position to open them at
        self._pending: list[Tensor] = []  # tokens not yet returned; each 1-d

    def next_rows(self, n: int) -> Tensor:
        """The next n rows, `[n, n_ctx]` int64. On one rank, the rows do not depend on how calls group them."""
        return self._next(n * self.n_ranks)[self.rank * n : (self.rank + 1) * n]

    def _next(self, n: int) -> Tensor:
        n_wanted = n * self.n_ctx
        n_pending = sum(map(len, self._pending))
        while n_pending < n_wanted:
            tokens = self._read()
            self._pending.append(tokens)
            n_pending += len(tokens)
        tokens = torch.cat([torch.empty(0, dtype=torch.long), *self._pending])
        self._pending = [tokens[n_wanted:].clone()]
        return tokens[:n_wanted].view(n, self.n_ctx)

    def state_dict(self) -> dict[str, Any]:
        """Plain data and one tensor. After loading it, the same rows follow as without an interruption."""
        return {
            "stream": self._identity(),
            "epochs": self.epochs,
            "epoch_tokens": self._epoch_tokens,
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
        texts = [document.text for document in itertools.islice(self._documents, DOCUMENTS_PER_CALL)]
        if not texts:
            self._start_next_epoch()
            return torch.empty(0, dtype=torch.long)
        packed = map(self._pack, self._encode(texts))
        tokens = torch.tensor(list(itertools.chain.from_iterable(packed)), dtype=torch.long)
        self._epoch_tokens += len(tokens)
        return tokens

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text. Of a long text perhaps only the beginning, but at least `max_document_tokens`.

        What follows a word does not change its tokens. So a text is cut where that is almost surely enough, and encoded
        whole if it was not. Tokens near the cut are never used.
        """
        longest = self.max_document_tokens
        cut = texts if longest is None else [text[: CHARS_PER_TOKEN * (longest + UNUSED_TOKENS)] for text in texts]
        ids = self._tokenize(cut)
        for index, (text, beginning) in enumerate(zip(texts, cut, strict=True)):
            if longest is not None and len(beginning) < len(text) and len(ids[index]) < longest + UNUSED_TOKENS:
                ids[index] = self._tokenize([text])[0]
        return ids

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: no warning for documents longer than the model's context
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def _start_next_epoch(self) -> None:
        if not self._epoch_tokens:
            wanted = "documents" if self.packing == "concat" else f"documents of at least {self.n_ctx - 1} tokens"
            raise UserError(
                f"The {self.split} split of {self.source.name} has no {wanted}. About one document in 20 is held out, "
                "chosen by its content. Use more text, or choose data=bundled."
            )
        self.epochs += 1
        self._epoch_tokens = 0
        self._documents = self._documents_state = None

    def _pack(self, ids: list[int]) -> list[int]:
        """One document's tokens -> the tokens that it contributes to the rows."""
        if self.max_document_tokens is not None:
            ids = ids[: self.max_document_tokens - 1]
        if self.packing == "concat":
            return [self.bos_token_id, *ids]
        size = self.n_ctx - 1
        starts = range(0, len(ids) - size + 1, size)
        return [token for start in starts for token in (self.bos_token_id, *ids[start : start + size])]


def bos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that opens every document: `bos_token_id`, or `eos_token_id` if there is none (Qwen)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        f"model: the tokenizer {tokenizer.name_or_path!r} has neither a bos_token nor an eos_token to open documents "
        "with. Set one of them in its tokenizer_config.json, or choose another model."
    )
