"""Rows of tokens: the two packings by hand, and the same rows whatever the calls."""

import logging
import string
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.errors import UserError
from core.notices import say_once
from core.text.documents import CountedDocuments, Document, SpecialTokens
from core.text.rows import RowStream, read_held_out

LETTERS = string.ascii_lowercase  # each letter is a token; its id is its place in the alphabet; BOS is 26
BOS = 26


class Listed:
    """A source with a list of documents. If `mark_epochs`, every epoch starts with a letter for the epoch's seed."""

    name = "listed"
    special_tokens: SpecialTokens = "plain"

    def __init__(self, texts: list[str], mark_epochs: bool = False) -> None:
        self.texts, self.mark_epochs = texts, mark_epochs

    @property
    def spec(self) -> dict:
        return {"texts": self.texts}

    def documents(self, split: str, seed: int, state: dict | None = None) -> CountedDocuments:
        def all_of_them() -> Iterator[Document]:
            if self.mark_epochs:
                yield Document(LETTERS[seed % 26])
            for text in self.texts if split == "train" else []:
                yield Document(text)

        return CountedDocuments(all_of_them(), state)


def letter_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {letter: index for index, letter in enumerate(LETTERS)} | {"<s>": BOS}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special)


TOKENIZER = letter_tokenizer(bos_token="<s>")


def spelled(rows: torch.Tensor) -> list[str]:
    return ["".join((LETTERS + "^")[token] for token in row) for row in rows.tolist()]


def rows_of(texts: list[str], n: int, n_ctx: int, **settings: object) -> list[str]:
    return spelled(RowStream(Listed(texts), TOKENIZER, "train", 0, n_ctx, **settings).next_rows(n))


def test_concatenation_by_hand():
    # documents of 2, 9 and 1 tokens, at most 5 with BOS:  ^ab ^cdef ^l | the next epoch
    assert rows_of(["ab", "cdefghijk", "l"], 4, n_ctx=4, max_document_tokens=5) == ["^ab^", "cdef", "^l^a", "b^cd"]
    assert rows_of(["ab", "cdefghijk", "l"], 4, n_ctx=4) == ["^ab^", "cdef", "ghij", "k^l^"]


def test_per_document_rows_by_hand():
    # pieces of 3 tokens; `ab`, `gh` and `l` are too short for a row
    assert rows_of(["ab", "cdefgh", "l", "mnopq"], 4, n_ctx=4, packing="per_document") == [
        "^cde", "^fgh", "^mno", "^cde",
    ]  # fmt: skip
    assert rows_of(["cdefghij"], 2, n_ctx=4, packing="per_document", max_document_tokens=6) == ["^cde", "^cde"]


def test_the_eos_token_opens_documents_if_there_is_no_bos_token_and_having_neither_is_an_error():
    stream = RowStream(Listed(["ab"]), letter_tokenizer(eos_token="<s>"), "train", 0, 3)
    assert spelled(stream.next_rows(1)) == ["^ab"]
    with pytest.raises(UserError, match="neither a bos_token nor an eos_token"):
        RowStream(Listed(["ab"]), letter_tokenizer(), "train", 0, 3)


def test_a_source_that_ends_is_read_again_with_the_next_seed_and_no_token_is_lost():
    stream = RowStream(Listed(["xyz"], mark_epochs=True), TOKENIZER, "train", 1, 4)
    assert spelled(stream.next_rows(5)) == ["^b^x", "yz^c", "^xyz", "^d^x", "yz^e"]
    assert stream.state_dict()["epochs"] == 3


def test_a_split_without_documents_is_an_error():
    with pytest.raises(UserError, match="heldout split of listed has no documents"):
        RowStream(Listed(["ab"]), TOKENIZER, "heldout", 0, 4).next_rows(1)
    with pytest.raises(UserError, match="train split of listed has no documents of at least 3 tokens"):
        RowStream(Listed(["ab"]), TOKENIZER, "train", 0, 4, "per_document").next_rows(1)


def test_settings_that_allow_no_rows_are_named_in_the_error():
    for message, wrong in {
        "packing: 'dense'": {"packing": "dense"},
        "n_ctx: .* not 1": {"n_ctx": 1},
        "max_document_tokens .* not 1": {"max_document_tokens": 1},
    }.items():
        with pytest.raises(UserError, match=message):
            RowStream(Listed(["ab"]), TOKENIZER, "train", 0, **{"n_ctx": 4, **wrong})


def test_documents_longer_than_the_model_are_tokenised_without_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        rows_of(["a" * 100], 1, n_ctx=4)
    assert not caplog.records


@pytest.mark.parametrize("word_length", [1, 4, 30])  # characters; with long words the first cut is too short
def test_tokenising_only_the_beginning_of_a_long_document_gives_the_same_rows(word_length):
    words = [letter * word_length for letter in LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<s>"])}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    texts = [" ".join(words[(start + i) % 26] for i in range(700)) for start in range(5)]
    rows = RowStream(Listed(texts), fast, "train", 0, 50, max_document_tokens=100).next_rows(10)
    wanted = [[BOS, *((start + i) % 26 for i in range(99))] for start in range(5)]
    assert rows.view(5, 100).tolist() == wanted


def test_a_position_saved_from_other_rows_is_refused():
    state = RowStream(Listed(["ab"]), TOKENIZER, "train", 0, 4).state_dict()
    RowStream(Listed(["ab"]), TOKENIZER, "train", 0, 4).load_state_dict(state)
    for other in (
        RowStream(Listed(["abc"]), TOKENIZER, "train", 0, 4),
        RowStream(Listed(["ab"]), TOKENIZER, "train", 1, 4),
        RowStream(Listed(["ab"]), TOKENIZER, "train", 0, 5),
        RowStream(Listed(["ab"]), TOKENIZER, "train", 0, 4, "per_document"),
    ):
        with pytest.raises(ValueError, match="does not belong to these rows of listed"):
            other.load_state_dict(state)


def reference_rows(texts: list[str], n: int, n_ctx: int, packing: str, longest: int | None) -> list[list[int]]:
    """The rows, computed one token at a time from the definition."""
    rows: list[list[int]] = []
    row: list[int] = []
    while len(rows) < n:
        for text in texts:
            ids = [BOS, *(LETTERS.index(letter) for letter in text)][:longest]
            for place, token in enumerate(ids):
                if packing == "per_document" and place and not row:
                    row = [BOS]
                row.append(token)
                if len(row) == n_ctx:
                    rows.append(row)
                    row = []
            if packing == "per_document":
                row = []
    return rows[:n]


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(LETTERS, min_size=1, max_size=30), min_size=1, max_size=150),
    n_ctx=st.integers(2, 12),
    packing=st.sampled_from(["concat", "per_document"]),
    longest=st.none() | st.integers(12, 20),
    calls=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    saved_after=st.integers(0, 6),
)
def test_the_rows_follow_the_definition_whatever_the_calls_and_interruptions(
    texts, n_ctx, packing, longest, calls, saved_after
):
    texts = [*texts, "a" * n_ctx]  # at least one row in an epoch
    stream = RowStream(Listed(texts), TOKENIZER, "train", 0, n_ctx, packing, longest)
    rows: list[list[int]] = []
    for index, n in enumerate(calls):
        if index == saved_after:
            state = stream.state_dict()
            stream.next_rows(3)  # rows after the state was saved do not change it
            stream = RowStream(Listed(texts), TOKENIZER, "train", 0, n_ctx, packing, longest)
            stream.load_state_dict(state)
        block = stream.next_rows(n)
        assert block.shape == (n, n_ctx) and block.dtype == torch.long
        rows += block.tolist()
    assert rows == reference_rows(texts, sum(calls), n_ctx, packing, longest)


def test_a_state_survives_a_checkpoint_that_holds_only_plain_data_and_tensors(tmp_path):
    stream = RowStream(Listed(["abc", "defgh"], mark_epochs=True), TOKENIZER, "train", 0, 4)
    stream.next_rows(5)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    resumed = RowStream(Listed(["abc", "defgh"], mark_epochs=True), TOKENIZER, "train", 0, 4)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.next_rows(9), stream.next_rows(9))


# ---- what was read


def listed(*texts: str) -> RowStream:
    return RowStream(Listed([*texts]), TOKENIZER, "train", 0, 4)


@pytest.mark.parametrize(
    ("texts", "n", "rows"),
    [
        (["ab", "cdef"], 1, ["^ab^"]),
        (["ab", "cdef"], 2, ["^ab^", "cdef"]),
        (["ab", "cdef"], 64, ["^ab^", "cdef"]),  # what there is, once
        (["ab", "cdefg"], 64, ["^ab^", "cdef"]),  # the last token fills no row
        (["ab"], 64, []),
    ],
)
def test_rows_of_one_pass_end_with_the_text(texts: list[str], n: int, rows: list[str]):
    assert spelled(listed(*texts).rows_of_one_pass(n).tokens) == rows


@pytest.mark.parametrize(
    ("calls", "passes"),
    [([1], 1.0), ([2], 1.0), ([3], 12 / 8), ([1, 1, 1, 1], 2.0), ([40], 20.0)],
)
def test_passes_over_the_text_are_counted(calls: list[int], passes: float):
    stream = listed("ab", "cdef")  # 8 tokens with BOS, 2 rows
    for n in calls:
        stream.next_rows(n)
    assert stream.counts == {"text_passes": passes}
    resumed = listed("ab", "cdef")
    resumed.load_state_dict(stream.state_dict())
    assert resumed.counts == stream.counts
    resumed.next_rows(2)
    assert resumed.counts == {"text_passes": pytest.approx(max(1.0, (sum(calls) + 2) / 2))}


def test_a_position_saved_by_an_earlier_version_goes_on_and_tells_the_passes_begun():
    stream = listed("ab", "cdef")
    stream.next_rows(5)
    state = {name: value for name, value in stream.state_dict().items() if name not in ("pass_tokens", "replaced")}
    state["pending"] = state["pending"].abs()
    older = listed("ab", "cdef")
    older.load_state_dict(state)
    assert older.counts == {"text_passes": 3.0}
    older.next_rows(2)
    assert older.counts == {"text_passes": 3.5}  # it has met the end of the text


def test_what_is_held_out_is_read_once_without_copies_and_said(capsys):
    say_once.cache_clear()

    class HeldOut(Listed):
        def documents(self, split: str, seed: int, state: dict | None = None) -> CountedDocuments:
            return super().documents("train" if split == "heldout" else "heldout", seed, state)

    source = HeldOut(["abc", "defg", "abc", "defg", "abc"])
    rows, counts = read_held_out(source, TOKENIZER, 64, 0, 4, "concat", None)
    assert spelled(rows.tokens) == ["^abc", "^def"] and rows.starts.tolist() == [[True, False, False, False]] * 2
    assert counts == {"heldout_rows": 2, "heldout_tokens": 8}
    said = capsys.readouterr().err
    assert "evaluation.n_rows=64: listed holds out 2 different documents, which have 2 rows of 4 tokens" in said
    assert "3 copies of documents" in said
    assert len(read_held_out(source, TOKENIZER, 1, 0, 4, "concat", None)[0].tokens) == 1
    assert capsys.readouterr().err == ""
    with pytest.raises(
        UserError, match="the 2 different documents that listed holds out have no whole row of 50 tokens"
    ):
        read_held_out(source, TOKENIZER, 64, 0, 50, "concat", None)
    with pytest.raises(UserError, match="no documents of at least 49 tokens"):
        read_held_out(source, TOKENIZER, 64, 0, 50, "per_document", None)
