"""Held-out tokens of two models: padded rows, what is wanted of them, and that no text of the training is there."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from core.analysis.paired_tokens import PairedTokens, read_paired_tokens
from core.errors import UserError
from core.models.pair import ModelPair, load_pair
from core.streams.paired_source import PairedActivationSource
from core.text.chat import ROLES
from core.text.paired_rows import Row
from tests.streams.test_paired_source import STREAM


def row(*ids: int, is_chat: bool) -> Row:
    role = ROLES.index("user" if is_chat else "text")
    return Row(torch.tensor(ids), torch.tensor([0] + [role] * (len(ids) - 1)), is_chat)


def test_padding_and_left_out_positions_are_not_valid():
    tokens = PairedTokens.of([row(0, 5, 6, 7, is_chat=False), row(0, 8, is_chat=True)], skipped=1)
    assert tokens.valid.tolist() == [[False, True, True, True], [False, True, False, False]]
    assert tokens.roles.tolist() == [[0, 5, 5, 5], [0, 3, -1, -1]] and tokens.n_tokens == 4
    assert tokens.is_padding.sum() == 2
    chats = tokens.chats()
    assert chats.ids.tolist() == [[0, 8]] and chats.is_chat.tolist() == [True]


@pytest.fixture(scope="module")
def pair(tiny_pair: dict[str, Any]) -> ModelPair:
    return load_pair(tiny_pair)


@pytest.fixture
def source(tiny_pair: Any, words_data: Any, words_dialogues: Any) -> PairedActivationSource:
    return PairedActivationSource(**STREAM, pair=tiny_pair, data=words_data, dialogues=words_dialogues)


def test_batches_hold_the_activations_at_valid_positions_in_order(pair: ModelPair, source: PairedActivationSource):
    tokens, counts = read_paired_tokens(source.rows(pair.tokenizer, "heldout", 0), 10)
    assert len(tokens) == counts["heldout_rows"] and tokens.is_chat.sum() == 5
    assert counts["heldout_tokens"] == tokens.n_tokens == 2 * tokens.chats().n_tokens
    batches = list(tokens.batches(pair, 3))
    assert [len(b.x) for b in batches] == [int(part.sum()) for part in tokens.valid.split(3)]
    place = 0
    for batch in batches:
        for n, x in enumerate(batch.x):
            r, t = tokens.valid.nonzero()[place + n].tolist()
            assert int(batch.truth["row"][n]) == r and int(batch.positions[n]) == t
            assert int(batch.tokens[n]) == int(tokens.ids[r, t])
            if n % 17 == 0:
                alone = pair.capture(tokens.ids[r : r + 1, : t + 1])[0, -1]
                assert_close(x, alone, atol=1e-5, rtol=1e-4)
        place += len(batch.x)


def test_no_held_out_row_is_of_a_training_document(pair: ModelPair, source: PairedActivationSource):
    held = source.rows(pair.tokenizer, "heldout", 0)
    train = source.rows(pair.tokenizer, "train", 0)
    for a, b in ((held.text, train.text), (held.chat, train.chat)):
        rows, others = ({tuple(r.ids.tolist()) for r in reader.one_pass()} for reader in (a, b))
        assert rows and others and not rows & others


def test_fewer_rows_than_asked_for_are_all_there_are(pair: ModelPair, source: PairedActivationSource, capsys: Any):
    tokens, counts = read_paired_tokens(source.rows(pair.tokenizer, "heldout", 0), 100_000)
    n_chat = len(list(source.rows(pair.tokenizer, "heldout", 0).chat.one_pass()))
    assert int(tokens.is_chat.sum()) == n_chat and counts["heldout_rows"] == len(tokens)
    assert f"local dialogues holds out {n_chat} dialogues; all are read" in capsys.readouterr().err


def test_less_than_two_rows_are_refused(pair: ModelPair, source: PairedActivationSource):
    with pytest.raises(UserError, match=r"evaluation.n_rows: 1 must be 2 or more"):
        read_paired_tokens(source.rows(pair.tokenizer, "heldout", 0), 1)
