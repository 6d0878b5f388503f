"""Tune a small language model on dialogues: the loss is on answers only, and some rows are ordinary text.

Without ordinary text every concept of the base model would drift. Rows are packed: one dialogue after another, each
with its own beginning-of-sequence token.

Shapes: B rows in a step, T = n_ctx tokens in a row, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.models.finetune import FineTuning
from core.seeding import generator
from core.text.chat import chat_tokens
from core.text.dialogues import dialogues
from core.text.documents import TextSource
from core.text.rows import RowStream

IGNORED = -100  # a label that costs nothing


class Rows(NamedTuple):
    """`[n, T]` each: token ids, and the id wanted after every position (`IGNORED` where nothing is asked)."""

    ids: Tensor
    labels: Tensor


class ChatTuning(FineTuning):
    """`FineTuning` on `Rows`."""

    def training_step(self, rows: Rows, batch_idx: int) -> None:  # type: ignore[override]
        logits = self._forward[0](input_ids=rows.ids).logits  # [B, T, V]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows.labels.flatten(), ignore_index=IGNORED)
        self.take_step(loss, batch_idx)


def chat_rows(tokenizer: PreTrainedTokenizerBase, source: TextSource, n: int, n_ctx: int, seed: int) -> Rows:
    """n rows of training dialogues; labels are the tokens of answers and those that end them."""
    ids, labels, total = [], [], 0
    stream = dialogues(source, "train", seed)
    while total < n * n_ctx:
        chat = chat_tokens(tokenizer, next(stream).messages)
        following = torch.cat([chat.ids[1:], chat.ids.new_tensor([IGNORED])])
        ids.append(chat.ids)
        labels.append(following.where(chat.answer_positions, IGNORED))
        total += len(chat.ids)
    return Rows(*(torch.cat(parts)[: n * n_ctx].view(n, n_ctx) for parts in (ids, labels)))


def text_rows(tokenizer: PreTrainedTokenizerBase, source: TextSource, n: int, n_ctx: int, seed: int) -> Rows:
    """n rows of ordinary training text; every next token is a label."""
    ids = RowStream(source, tokenizer, "train", seed, n_ctx).next_rows(n)
    return Rows(ids, torch.cat([ids[:, 1:], ids.new_full((n, 1), IGNORED)], dim=1))


class MixedRows(pl.LightningDataModule):
    """Batches of both kinds of rows in a fixed random order, from the current step of the training on."""

    def __init__(self, rows: Rows, rows_per_step: int, seed: int) -> None:
        super().__init__()
        order = torch.randperm(len(rows.ids), generator=generator(seed, "mixed rows"))
        self.rows, self.rows_per_step = Rows(rows.ids[order], rows.labels[order]), rows_per_step

    def train_dataloader(self) -> Iterator[Rows]:
        assert self.trainer is not None
        first = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        starts = range(first * self.rows_per_step, len(self.rows.ids) - self.rows_per_step + 1, self.rows_per_step)
        return (Rows(*(part[i : i + self.rows_per_step] for part in self.rows)) for i in starts)


def mixed_rows(
    tokenizer: PreTrainedTokenizerBase, source: TextSource, n_steps: int, settings: dict[str, Any], seed: int
) -> MixedRows:
    """The rows of a whole training; `settings` has rows_per_step, n_ctx and text_share."""
    n = n_steps * settings["rows_per_step"]
    n_text = round(settings["text_share"] * n)
    parts = [
        text_rows(tokenizer, source, n_text, settings["n_ctx"], seed),
        chat_rows(tokenizer, source, n - n_text, settings["n_ctx"], seed),
    ]
    return MixedRows(Rows(*map(torch.cat, zip(*parts, strict=True))), settings["rows_per_step"], seed)
