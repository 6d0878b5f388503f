from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.batch import Batch
from core.errors import UserError
from core.models.language_model import LanguageModel, load_language_model
from core.streams.activations import ActivationStream
from core.streams.module import Chunks, StreamData
from core.text.rows import RowStream

N_CTX, BATCH, BUFFER = 16, 32, 128


@pytest.fixture(scope="module")
def lm(tiny_model: dict[str, Any]) -> LanguageModel:
    return load_language_model(tiny_model)


@pytest.fixture(scope="module")
def open_stream(lm: LanguageModel, words: Any) -> Callable[..., ActivationStream]:
    def make(seed: int = 0, buffer_tokens: int = BUFFER, batch_size: int = BATCH) -> ActivationStream:
        rows = RowStream(words, lm.tokenizer, "train", seed, N_CTX, "concat", 64)
        return ActivationStream(lm, "resid_pre.1", rows, batch_size, buffer_tokens, 3, seed)

    return make


def take(stream: ActivationStream, n: int) -> list[Batch]:
    return [next(stream) for _ in range(n)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    fields = ("x", "tokens", "positions")
    return len(a) == len(b) and all(
        torch.equal(getattr(p, f), getattr(q, f)) for p, q in zip(a, b, strict=True) for f in fields
    )


def test_the_same_seed_gives_the_same_batches_and_another_seed_gives_others(open_stream):
    assert same(take(open_stream(seed=3), 9), take(open_stream(seed=3), 9))
    assert not same(take(open_stream(seed=3), 1), take(open_stream(seed=4), 1))


@settings(max_examples=12, deadline=None)
@given(before=st.integers(0, 10), more=st.integers(1, 6))
def test_a_resumed_stream_gives_the_batches_of_an_uninterrupted_one(open_stream, before: int, more: int):
    whole = take(open_stream(), before + more)
    first = open_stream()
    take(first, before)
    resumed = open_stream()
    resumed.load_state_dict(first.state_dict())
    assert same(take(resumed, more), whole[before:])
    assert same(take(first, more), whole[before:])


def test_a_fill_serves_every_token_once_in_another_order(open_stream, lm, words):
    served = take(open_stream(), BUFFER // BATCH)
    rows = RowStream(words, lm.tokenizer, "train", 0, N_CTX, "concat", 64).next_rows(BUFFER // N_CTX)
    x = lm.capture(rows, "resid_pre.1").flatten(0, 1)
    tokens, positions = (torch.cat([getattr(b, f) for b in served]) for f in ("tokens", "positions"))
    assert not torch.equal(tokens, rows.flatten())
    order = (positions * 1000 + tokens).argsort(stable=True)
    expected = (torch.arange(N_CTX).repeat(len(rows)) * 1000 + rows.flatten()).argsort(stable=True)
    assert torch.equal(tokens[order], rows.flatten()[expected])
    served_x = torch.cat([b.x for b in served])
    torch.testing.assert_close(served_x.sum(0), x.sum(0), rtol=1e-4, atol=1e-3)


def test_batches_carry_the_token_and_position_of_their_activations(open_stream, lm):
    stream = open_stream()
    stream.site = "resid_pre.0"  # the embeddings, which depend on token and position alone
    [batch] = take(stream, 1)
    wte, wpe = lm.model.transformer.wte.weight, lm.model.transformer.wpe.weight
    torch.testing.assert_close(batch.x, wte[batch.tokens] + wpe[batch.positions])


def test_sizes_that_do_not_fit_are_refused_by_name(open_stream):
    with pytest.raises(UserError, match=r"stream\.buffer_tokens \(100\).*stream\.batch_size"):
        open_stream(buffer_tokens=100)


def test_the_buffer_is_allocated_once_and_announced_with_its_bytes(open_stream, capsys):
    stream = open_stream()
    take(stream, 1)
    buffer = stream._buffer.data_ptr()
    take(stream, 8)
    assert stream._buffer.data_ptr() == buffer
    assert capsys.readouterr().err.count("128 tokens x 32 x 4 bytes = 0.0 MB") == 1


def test_activations_that_are_not_finite_stop_the_stream(open_stream, lm, monkeypatch):
    capture = lm.capture

    def broken(tokens, site):
        x = capture(tokens, site).clone()
        x[0, 5] = float("nan")
        return x

    monkeypatch.setattr(lm, "capture", broken)
    with pytest.raises(FloatingPointError, match=r"stream\.site=resid_pre\.1.*position 5"):
        next(open_stream())


def stream_of(lm: LanguageModel, words: Any, dtype: torch.dtype, value: float, patch: Any) -> ActivationStream:
    """A stream with a buffer of `dtype`, in which the first coordinate of every activation is `value`."""
    capture, first = lm.capture, torch.tensor(0)
    patch.setattr(lm, "capture", lambda tokens, site: capture(tokens, site).index_fill(2, first, value))
    rows = RowStream(words, lm.tokenizer, "train", 0, N_CTX, "concat", 64)
    return ActivationStream(lm, "resid_pre.1", rows, BATCH, BUFFER, 3, 0, dtype)


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float16, -70_000.0, "float16 holds numbers up to 65504, but there is an activation of 7e+04"),
        (torch.bfloat16, 3.4e38, "bfloat16 holds numbers up to 3.3895e+38, but there is an activation of 3.4e+38"),
    ],
)
def test_a_buffer_that_cannot_hold_an_activation_says_how_large_it_is(lm, words, monkeypatch, dtype, value, message):
    with pytest.raises(UserError) as error:
        next(stream_of(lm, words, dtype, value, monkeypatch))
    assert str(error.value).startswith(f"stream.buffer_dtype: {message} at resid_pre.1. Take ")


def test_the_largest_number_of_a_dtype_is_held(lm, words, monkeypatch):
    assert (next(stream_of(lm, words, torch.float16, 65_504.0, monkeypatch)).x[:, 0] == 65_504).all()


def test_a_checkpoint_holds_the_position_after_the_chunk_trained_on_not_after_the_one_read_ahead(open_stream):
    data = StreamData(open_stream(), n_batches=10, batches_per_chunk=4)
    chunks = iter(Chunks(data))
    first, ahead = next(chunks), next(chunks)
    data.transfer_batch_to_device(first, torch.device("cpu"), 0)
    resumed = StreamData(open_stream(), n_batches=10, batches_per_chunk=4)
    resumed.load_state_dict(data.state_dict())
    rest = list(Chunks(resumed))
    assert [len(chunk) for chunk in rest] == [4, 2]
    assert same(rest[0], ahead)
