"""What opens a document, what special tokens written in a text become, and text that a tokenizer cannot take."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from core.errors import UserError
from core.models.loading import SHIPPED
from core.models.pretrain import train_tokenizer
from core.notices import say_once
from core.text.documents import CountedDocuments, Document, SpecialTokens
from core.text.rows import RowStream
from core.text.tokenizing import bos_token_id, token_ids

MARK = "<|endoftext|>"


class Texts:
    """A source of documents, all of them for training."""

    name = "texts"

    def __init__(self, *documents: Document | str, special_tokens: SpecialTokens = "plain") -> None:
        self.all = [one if isinstance(one, Document) else Document(one) for one in documents]
        self.special_tokens = special_tokens

    @property
    def spec(self) -> dict:
        return {"texts": [document.text for document in self.all]}

    def documents(self, split: str, seed: int, state: dict | None = None) -> CountedDocuments:
        return CountedDocuments(iter(self.all), state)


def byte_level(**special: str | None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the token 0 `<|endoftext|>` and the given special ones."""
    trained = train_tokenizer(["a b c hello world"], 280)
    return PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, **special)


class Slow(PythonBackend):
    """A tokenizer without the fast backend: one token for each byte, from 10 on."""

    vocab_files_names: dict = {}  # noqa: RUF012
    model_input_names = ["input_ids"]  # noqa: RUF012

    @property
    def vocab_size(self) -> int:
        return 266

    def get_vocab(self) -> dict:
        return {chr(i): 10 + i for i in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return 10 + ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index - 10)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def shipped() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SHIPPED["bundled"])


TOKENIZERS = {
    "shipped": shipped,
    "bos and eos": lambda: byte_level(bos_token=MARK, eos_token=MARK),
    "eos alone": lambda: byte_level(eos_token=MARK),
    "split by default": lambda: byte_level(bos_token=MARK, split_special_tokens=True),
    "slow": lambda: Slow(bos_token=MARK, eos_token=MARK),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_special_token_written_in_a_text_is_that_token_or_plain_text_as_the_setting_says(tokenizer):
    tokenizer = tokenizer()
    text, mark = f"a {MARK} b", bos_token_id(tokenizer)
    [parsed], [plain] = (token_ids(tokenizer, [text], setting) for setting in ("parse", "plain"))
    assert parsed.count(mark) == 1
    assert mark not in plain and tokenizer.decode(plain) == text
    assert token_ids(tokenizer, [text], "parse") == [parsed]  # the setting of one call does not stay


def test_the_issues_example_is_nine_ordinary_ids():
    assert token_ids(shipped(), [f"a {MARK} b"], "parse") == [[68, 224, 0, 308]]
    [plain] = token_ids(shipped(), [f"a {MARK} b"], "plain")
    assert len(plain) == 9 and 0 not in plain


@pytest.mark.parametrize("packing", ["concat", "per_document"])
@pytest.mark.parametrize("special_tokens", ["parse", "plain"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_only_tokens_put_there_are_beginnings(tokenizer, special_tokens, packing):
    tokenizer = tokenizer()
    text = f"{MARK}hello {MARK}{MARK} world{MARK} " * 3
    source = Texts(text, f"{MARK} {text}", special_tokens=special_tokens)
    rows = RowStream(source, tokenizer, "train", 0, 8, packing).rows_of_one_pass(1000)
    mark = bos_token_id(tokenizer)
    assert (rows.tokens[rows.starts] == mark).all() and (rows.tokens >= 0).all()
    lengths = [len(ids) for ids in token_ids(tokenizer, [d.text for d in source.all], special_tokens)]
    if packing == "concat":
        flat = torch.zeros(rows.tokens.numel(), dtype=torch.bool)
        flat[[0, 1 + lengths[0]]] = True
        assert rows.starts.flatten().equal(flat)
    else:
        assert rows.starts[:, 0].all() and not rows.starts[:, 1:].any()
    assert ((rows.tokens == mark) & ~rows.starts).any() == (special_tokens == "parse")


def test_a_tokenizer_without_bos_whose_eos_is_another_than_the_configurations_bos(tiny_model, tmp_path: Path):
    """Qwen's: rows are opened with the EOS, and the figures without beginnings must see it there."""
    from transformers import GPT2LMHeadModel

    from core.analysis.evaluate import evaluate_dictionary
    from core.analysis.held_out import HeldOut
    from core.models.language_model import load_language_model
    from tests.analysis.test_top_activations import dictionary

    model = GPT2LMHeadModel.from_pretrained(tiny_model["source"])
    model.config.bos_token_id = 7
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model["source"])
    eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    eos.save_pretrained(tmp_path)
    lm = load_language_model({**tiny_model, "source": str(tmp_path)})
    assert lm.tokenizer.bos_token_id is None and lm.tokenizer.eos_token_id == 3 != lm.model.config.bos_token_id
    rows = RowStream(Texts("abc def " * 9, "hgf " * 20), lm.tokenizer, "train", 0, 16).rows_of_one_pass(100)
    assert rows.starts.sum() == 2 and (rows.tokens[rows.starts] == 3).all()
    text = HeldOut(
        lm=lm, site="resid_pre.1", rows=rows.tokens, starts=rows.starts, n_downstream_rows=1, rows_per_batch=2
    )
    evaluation = evaluate_dictionary(dictionary(), text)
    assert evaluation.l0_histogram.sum() - evaluation.l0_histogram_without_bos.sum() == 2
    assert "l0_bos_mean" in evaluation.metrics()


def test_a_tokenizer_that_has_special_tokens_as_words_says_so_and_nothing_counts_as_a_beginning(capsys):
    say_once.cache_clear()
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2, "<u>": 3}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<u>")
    source = Texts(Document("a <s> b", where="t.jsonl, line 7"), "a what b")
    rows = RowStream(source, tokenizer, "train", 0, 4).rows_of_one_pass(5)
    assert rows.tokens.tolist() == [[2, 0, 2, 1], [2, 0, 3, 1]]
    assert rows.starts.tolist() == [[True, False, False, False]] * 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'<s>'" in said and "t.jsonl, line 7" in said and "special_tokens=plain" in said


def test_what_a_tokenizer_cannot_take_is_named_by_file_and_line():
    without_unknown = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="<missing>"))
    without_unknown.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=without_unknown, bos_token="<s>")
    source = Texts(*["a a a"] * 70, Document("a z", where="t.jsonl, line 71"), "a")
    with pytest.raises(UserError, match=r"t\.jsonl, line 71 is a text that the tokenizer .* cannot take"):
        RowStream(source, tokenizer, "train", 0, 4).rows_of_one_pass(1000)
    with pytest.raises(UserError, match=r"a document of texts \('z a'\) is a text"):
        RowStream(Texts("z a"), tokenizer, "train", 0, 4).next_rows(1)


def test_documents_of_which_a_tokenizer_makes_nothing_are_left_out_and_said(capsys):
    say_once.cache_clear()
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abc^")}, []))  # drops all other letters
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="^")
    rows = RowStream(Texts("abc", "日本", "ca", "xyz"), tokenizer, "train", 0, 7).next_rows(1)
    assert rows.tolist() == [[3, 0, 1, 2, 3, 2, 0]]
    RowStream(Texts("abc", "日本", "ca", "xyz"), tokenizer, "train", 0, 7).rows_of_one_pass(9)
    assert "makes no token of 2 documents of texts" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"makes no token of any of the 2 documents of texts \(train\)"):
        RowStream(Texts("日本", "xyz"), tokenizer, "train", 0, 7).next_rows(1)


SURROGATES = ["half \ud83d an emoji", "\udc00", "\ud800\ud800 twice", "a\udfffb", "fine", "\ud83d\ude00 split"]


def test_lone_surrogates_are_replaced_and_counted():
    documents = [Document.of(text) for text in SURROGATES]
    assert [document.n_replaced for document in documents] == [1, 1, 2, 1, 0, 2]
    assert documents[0].text == "half \ufffd an emoji"
    for document in documents:
        document.text.encode()
    stream = RowStream(Texts(*documents), shipped(), "train", 0, 8)
    stream.rows_of_one_pass(100)
    assert stream.counts == {"text_passes": pytest.approx(1.0, abs=0.5), "text_replaced_characters": 7}
