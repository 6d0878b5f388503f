import itertools
import lzma
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from core.metrics.language import (
    NO_TOKEN,
    TextScore,
    Trigram,
    by_tag,
    score_texts,
    total,
    windows_of,
    xz_bits_per_byte,
)

TEXTS = ["a", "The quick brown fox jumps over the lazy dog.", "", "Zwölf Boxkämpfer jagen Viktor.", "x = 1\n" * 6]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<|endoftext|>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 257, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.5, bos_token_id=0, eos_token_id=0))


def naive_nats(model: GPT2LMHeadModel, ids: list[int], n_ctx: int, stride: int) -> float:
    """Token by token: the context of token t begins at the window that first reaches t."""
    nats = 0.0
    for t in range(1, len(ids)):
        start = 0 if t < n_ctx else math.ceil((t + 1 - n_ctx) / stride) * stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:t]])).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[t]].item()
    return nats


@pytest.mark.parametrize(("n_ctx", "stride", "batch_rows"), [(64, 32, 8), (12, 5, 3), (8, 1, 100)])
def test_bits_per_byte_equals_a_loop_over_tokens(model, tokenizer, n_ctx, stride, batch_rows):
    model.eval()
    scores = score_texts(model, tokenizer, TEXTS, n_ctx, stride, batch_rows)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert score.nats == pytest.approx(naive_nats(model, ids, n_ctx, stride), rel=1e-4)
        assert (score.n_tokens, score.n_bytes) == (len(ids) - 1, len(text.encode()))
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    expected = sum(score.nats for score in scores) / math.log(2) / n_bytes
    assert total(score_texts(model, tokenizer, TEXTS, n_ctx, stride, batch_rows)).bits_per_byte == pytest.approx(
        expected
    )


def test_a_model_that_knows_nothing_pays_the_logarithm_of_its_vocabulary(tokenizer):
    config = GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    uniform = GPT2LMHeadModel(config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    scores = score_texts(uniform, tokenizer, TEXTS, n_ctx=16, stride=8, batch_rows=4)
    assert total(scores).bits_per_byte == pytest.approx(math.log2(257))


def test_scoring_leaves_a_model_in_its_mode(model, tokenizer):
    model.train()
    score_texts(model, tokenizer, TEXTS, n_ctx=16, stride=8, batch_rows=4)
    assert model.training
    model.eval()


@given(n_ids=st.integers(1, 200), n_ctx=st.integers(2, 40), data=st.data())
def test_windows_score_every_token_once_with_the_promised_context(n_ids: int, n_ctx: int, data: st.DataObject):
    stride = data.draw(st.integers(1, n_ctx - 1))
    windows = windows_of(0, n_ids, n_ctx, stride)
    assert [t for w in windows for t in range(w.scored_from, w.end)] == list(range(1, n_ids))
    for w in windows:
        assert w.end - w.start <= n_ctx
        assert w.scored_from - w.start >= min(w.scored_from, n_ctx - stride)


def test_a_stride_that_leaves_no_context_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="stride"):
        score_texts(model, tokenizer, TEXTS, n_ctx=16, stride=16, batch_rows=4)


def test_scores_add_up_by_tag():
    scores = [TextScore(2.0, 3, 4), TextScore(1.0, 1, 1), TextScore(4.0, 2, 6)]
    found = by_tag(scores, ["prose", "code", "prose"])
    assert list(found) == ["code", "prose"]
    assert found["prose"] == TextScore(6.0, 5, 10)
    assert found["prose"].bits_per_byte == pytest.approx(0.6 / math.log(2))
    assert found["prose"].nats_per_token == 1.2
    assert total(scores) == TextScore(7.0, 6, 11)


def test_xz_is_the_size_of_the_compressed_file():
    texts = ["first " * 50, "second\n" * 50]
    joined = ("first " * 50 + "\n" + "second\n" * 50).encode()
    compressed = lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)
    assert xz_bits_per_byte(texts) == 8 * len(compressed) / len(joined)
    assert lzma.decompress(compressed) == joined


def naive_witten_bell(ids: list[int], V: int, context: tuple[int, ...], w: int) -> float:
    """The formula, by counting through the stream for one probability."""
    shorter = naive_witten_bell(ids, V, context[1:], w) if context else 1 / V
    n = len(context)
    after = Counter(ids[i + n] for i in range(len(ids) - n) if tuple(ids[i : i + n]) == context)
    seen = sum(after.values())
    return (after[w] + len(after) * shorter) / (seen + len(after)) if seen else shorter


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=3, max_size=40))
def test_trigram_probabilities_sum_to_one_and_equal_the_formula_for_seen_and_unseen_contexts(ids: list[int]):
    V = 5  # token 4 never occurs
    model = Trigram(np.array(ids, dtype=np.uint16), V)
    for before, last in itertools.product([NO_TOKEN, *range(V)], range(V)):
        p = model.probabilities(np.full(V, before), np.full(V, last), np.arange(V))
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1)
        context = (last,) if before == NO_TOKEN else (before, last)
        assert p.tolist() == pytest.approx([naive_witten_bell(ids, V, context, w) for w in range(V)])


def test_trigram_by_hand():
    # Stream a b a b: after (a, b) always a (seen once, one type); after b always a; unigrams a 2, b 2 of V = 3.
    model = Trigram(np.array([0, 1, 0, 1]), vocab_size=3)
    unigram = (2 + 2 / 3) / (4 + 2)
    bigram = (1 + unigram) / (1 + 1)
    assert model.probabilities(np.array([0]), np.array([1]), np.array([0]))[0] == pytest.approx((1 + bigram) / 2)


def test_trigram_scores_each_document_on_its_own_from_bos():
    bos, V = 0, 4
    train = np.array([bos, 1, 2, 3, bos, 1, 2, 2, bos, 3, 1])
    documents = [[1, 2, 3], [3], []]
    expected = [
        -sum(
            math.log(naive_witten_bell(train.tolist(), V, tuple([bos, *ids][max(0, i - 1) : i + 1]), w))
            for i, w in enumerate(ids)
        )
        for ids in documents
    ]
    scores = Trigram(train, V).score(documents, [5, 2, 0], bos)
    assert [score.nats for score in scores] == pytest.approx(expected)
    scores = Trigram(train, V).score(documents, [5, 2, 0], bos)
    assert total(scores).bits_per_byte == pytest.approx(sum(expected) / math.log(2) / 7)


def test_trigram_learns_a_second_order_chain():
    """Token t is (t-1 + t-2) mod 7 with noise 10 %: the trigram comes near the entropy, which bigrams cannot."""
    g = np.random.default_rng(0)
    ids = [0, 1]
    for noisy, random_token in zip(g.random(20_000) < 0.1, g.integers(7, size=20_000), strict=True):
        ids.append(int(random_token) if noisy else (ids[-1] + ids[-2]) % 7)
    train, test = np.array(ids[:18_000]), ids[18_000:]
    right = np.array([w == (u + v) % 7 for u, v, w in zip(ids, ids[1:], ids[2:], strict=False)])[-len(test) :]
    true_bits = -np.where(right, math.log2(0.9 + 0.1 / 7), math.log2(0.1 / 7)).mean()
    bits = total(Trigram(train, 8).score([test], [len(test)], bos_token_id=7)).bits_per_byte
    assert true_bits < bits < 1.03 * true_bits


def test_a_vocabulary_beyond_64_bits_and_a_stream_too_short_are_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        Trigram(np.arange(5), 2**21)
    with pytest.raises(ValueError, match="at least 3"):
        Trigram(np.arange(2), 4)
