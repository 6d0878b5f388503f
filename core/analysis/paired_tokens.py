"""Held-out tokens for two models: rows of text and of dialogues, padded, with what every position is.

Shapes: R rows of T tokens, n wanted positions, d = width of the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from core.batch import Batch
from core.errors import UserError
from core.models.pair import ModelPair
from core.notices import say_once
from core.text.documents import Distinct, TextSource
from core.text.paired_rows import PairedRows, Row, counts_of_pair, say_pair_counts


@dataclass(frozen=True, eq=False)
class PairedTokens:
    """
    ids      int64 `[R, T]`, padded at the end
    roles    int64 `[R, T]`, places in `core.text.chat.ROLES`; -1 where there is padding
    valid    bool `[R, T]`: neither padding nor a position that the pair leaves out
    is_chat  bool `[R]`
    """

    ids: Tensor
    roles: Tensor
    valid: Tensor
    is_chat: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], skipped: int) -> PairedTokens:
        """From rows of different lengths, of which the first `skipped` positions are left out."""
        lengths = torch.tensor([len(row.ids) for row in rows])
        T = int(lengths.max())
        ids = torch.stack([torch.cat([row.ids, row.ids[:1].expand(T - len(row.ids))]) for row in rows])
        roles = torch.stack([torch.nn.functional.pad(row.roles, (0, T - len(row.roles)), value=-1) for row in rows])
        places = torch.arange(T)
        valid = (places >= skipped) & (places < lengths[:, None])
        return cls(ids, roles, valid, torch.tensor([row.is_chat for row in rows]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> PairedTokens:
        """Some of the rows, without columns that are padding in all of them."""
        longest = int((self.roles[rows] >= 0).any(0).nonzero().max()) + 1
        ids, roles, valid = (values[rows, :longest] for values in (self.ids, self.roles, self.valid))
        return PairedTokens(ids, roles, valid, self.is_chat[rows])

    @property
    def is_padding(self) -> Tensor:
        """bool `[R, T]`."""
        return self.roles < 0

    @property
    def n_tokens(self) -> int:
        """Wanted positions."""
        return int(self.valid.sum())

    def chats(self) -> PairedTokens:
        """The dialogues alone."""
        return self[self.is_chat]

    def batches(self, pair: ModelPair, rows_per_batch: int) -> Iterator[Batch]:
        """The wanted positions in order, rows_per_batch rows at a time: x `[n, 2, d]` in fp32 on the pair's device.

        `truth` has roles, is_chat, and row: the place of the row in these.
        """
        for start in range(0, len(self), rows_per_batch):
            part = self[slice(start, start + rows_per_batch)]
            row, position = part.valid.nonzero(as_tuple=True)
            x = pair.capture(part.ids)[row.to(pair.device), position.to(pair.device)].float()
            truth = {"roles": part.roles[row, position], "is_chat": part.is_chat[row], "row": row + start}
            yield Batch(
                x,
                part.ids[row, position].to(pair.device),
                position.to(pair.device),
                {name: values.to(pair.device) for name, values in truth.items()},
            )


def read_paired_tokens(rows: PairedRows, n_rows: int) -> tuple[PairedTokens, dict[str, float]]:
    """n_rows / 2 dialogues and text with as many wanted tokens, or as many as there are; each text once. And what was
    read.

    Says on standard error that there are fewer. Raises UserError if one of the two is empty.
    """
    if n_rows < 2:
        raise UserError(f"evaluation.n_rows: {n_rows} must be 2 or more: one half of the rows are dialogues.")
    chat = list(islice(rows.chat.one_pass(), n_rows // 2))
    if not chat:
        raise rows.chat.empty()
    if len(chat) < n_rows // 2:
        say_once(
            f"evaluation.n_rows={n_rows:,}: {rows.chat.source.name} holds out {len(chat):,} dialogues; all are read."
        )
    missing = sum(len(row.ids) - rows.skipped for row in chat)
    assert isinstance(rows.text.source, TextSource)
    rows.text.source = Distinct(rows.text.source)
    text: list[Row] = []
    for row in rows.text.one_pass():
        text.append(row.cut(missing + rows.skipped))
        missing -= len(text[-1].ids) - rows.skipped
        if not missing:
            break
    if not text:
        raise rows.text.empty()
    if missing:
        say_once(f"evaluation.n_rows={n_rows:,}: {rows.text.source.name} holds out {missing:,} tokens too few of text.")
    tokens = PairedTokens.of([*text, *chat], rows.skipped)
    state = rows.state_dict()
    say_pair_counts(state, rows.text.n_ctx, "evaluation")
    counts = {name: n for name, n in counts_of_pair(state).items() if not name.endswith("passes")}
    return tokens, {**counts, "heldout_rows": float(len(tokens)), "heldout_tokens": float(tokens.n_tokens)}
