"""Decoder rows as training data: which rows, in which order, and which settings are refused."""

from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.streams.decoder_rows import DecoderRows, directions, random_directions

ROWS = torch.arange(10.0).unsqueeze(1)


def served(stream: DecoderRows, n: int) -> list[list[float]]:
    return [batch.x.flatten().tolist() for batch in islice(stream, n)]


def test_every_epoch_is_a_new_permutation_without_its_incomplete_last_batch():
    stream = DecoderRows(ROWS, 3, "shuffled", seed=0)
    epochs = [list(chain.from_iterable(served(stream, 3))) for _ in range(20)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert len({next(iter({*range(10)} - {int(i) for i in epoch})) for epoch in epochs}) > 3  # not always the same row


@settings(max_examples=30, deadline=None)
@given(
    sampling=st.sampled_from(["shuffled", "replacement", "frequency"]),
    before=st.integers(0, 12),
    seed=st.integers(0, 3),
)
def test_a_resumed_stream_gives_the_batches_of_an_uninterrupted_one(sampling, before: int, seed: int):
    weights = torch.arange(10.0)
    whole, stopped, resumed = (DecoderRows(ROWS, 4, sampling, seed, weights) for _ in range(3))
    expected = served(whole, before + 5)[before:]
    served(stopped, before)
    resumed.load_state_dict(stopped.state_dict())
    assert served(resumed, 5) == expected


def test_rows_are_drawn_in_proportion_to_their_weights():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    drawn = next(DecoderRows(ROWS[:4], 40_000, "frequency", 0, weights)).x
    shares = torch.stack([(drawn == i).float().mean() for i in range(4)])
    torch.testing.assert_close(shares, torch.tensor([0, 0.25, 0.75, 0]), atol=0.01, rtol=0)
    even = next(DecoderRows(ROWS[:4], 40_000, "replacement", 0)).x
    assert all(abs((even == i).float().mean() - 0.25) < 0.01 for i in range(4))


@pytest.mark.parametrize(
    "weights", [None, torch.ones(3), torch.zeros(10), -torch.ones(10), torch.full((10,), torch.nan)]
)
def test_weights_that_cannot_be_probabilities_are_refused(weights):
    with pytest.raises(UserError, match=r"meta\.sampling=frequency"):
        DecoderRows(ROWS, 3, "frequency", 0, weights)


def test_a_batch_larger_than_an_epoch_and_an_unknown_sampling_are_refused():
    with pytest.raises(UserError, match=r"meta\.batch_size=11"):
        DecoderRows(ROWS, 11, "shuffled", 0)
    with pytest.raises(UserError, match=r"meta\.sampling: 'sorted'"):
        DecoderRows(ROWS, 3, "sorted", 0)  # type: ignore[arg-type]


def test_directions_have_unit_norm_and_rows_without_a_direction_are_named():
    W = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(directions(W, "x"), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    for bad in (0.0, torch.nan, torch.inf):
        with pytest.raises(UserError, match=r"base: 1 of 2 decoder rows .*latents 1\)"):
            directions(torch.tensor([[1.0, 0.0], [bad, bad]]), "base")
    with pytest.raises(UserError, match=r"latents 0, 1, 2, 3, 4, \.\.\."):
        directions(torch.zeros(9, 2), "base")


def test_a_decoder_of_several_models_has_no_rows_of_one_width():
    with pytest.raises(UserError, match=r"pair: the decoder has the shape \[3, 2, 4\]"):
        directions(torch.ones(3, 2, 4), "pair")


def test_random_directions_are_unit_rows_without_a_preferred_direction():
    W = random_directions(4000, 16, seed=1)
    torch.testing.assert_close(W.norm(dim=1), torch.ones(4000))
    assert W.mean(0).norm() < 0.05 and torch.equal(W, random_directions(4000, 16, seed=1))
    assert not torch.equal(W, random_directions(4000, 16, seed=2))
