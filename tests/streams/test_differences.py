"""The stream of differences: chat minus base, row by row, resumed where it was."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import UserError
from core.streams.differences import DifferenceSource
from core.streams.planted_pairs import PlantedPairSource
from tests.streams.noise_source import NoiseSource

PAIRS: dict[str, Any] = {
    "d_model": 6, "n_steps": 4, "batch_size": 5, "batches_per_chunk": 2, "calibration_batches": 1, "p": 0.3,
    "counts": {"shared": 3, "chat_only": 2}, "weak_strength": 0.3, "p_both": 0.5, "noise": 0.1, "seed": 0,
}  # fmt: skip


def test_rows_are_chat_minus_base_and_the_rest_is_as_in_the_pairs(runtime: Any, tmp_path: Path):
    pairs = PlantedPairSource(**PAIRS)
    source = DifferenceSource.between(pairs)
    assert (source.n_batches, source.batch_size, source.calibration_batches) == (4, 5, 1)
    run = runtime(tmp_path, "differences")
    for own, theirs in islice(zip(source.open(run), pairs.open(run), strict=True), 3):
        torch.testing.assert_close(own.x, theirs.x[:, 1] - theirs.x[:, 0])


def test_a_resumed_stream_goes_on_with_the_next_batch(runtime: Any, tmp_path: Path):
    source, run = DifferenceSource.between(PlantedPairSource(**PAIRS)), runtime(tmp_path, "resumed")
    whole = [batch.x for batch in islice(source.open(run), 4)]
    stream = source.open(run)
    next(stream), next(stream)
    again = source.open(run)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(next(again).x, whole[2]) and torch.equal(next(again).x, whole[3])


def test_the_key_is_that_of_the_pairs_and_another_one():
    a, b = (DifferenceSource.between(PlantedPairSource(**(PAIRS | {"seed": seed}))) for seed in (0, 1))
    assert a.spec != b.spec and a.spec != a.pairs.spec


def test_rows_of_one_model_have_no_difference(runtime: Any, tmp_path: Path):
    source = NoiseSource(
        batch_size=4, batches_per_chunk=1, calibration_batches=0, width=3, n_directions=5, n_steps=1, seed=0
    )
    with pytest.raises(UserError, match="are not of two models"):
        next(DifferenceSource.between(source).open(runtime(tmp_path, "noise")))
