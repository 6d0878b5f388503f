"""A batch is normalised once for all dictionaries whose normalisation depends on the batch alone."""

import torch

from core.batch import Batch
from core.input_norm import InputNorm


def test_equal_normalisations_share_one_result_and_measured_ones_do_not():
    batch = Batch(torch.tensor([[1.0, 3.0], [2.0, 8.0]]))
    first = batch.normalised(InputNorm("token_center"))
    assert first.tolist() == [[-1, 1], [-3, 3]]
    assert batch.normalised(InputNorm("token_center")) is first
    assert batch.normalised(InputNorm("none")).tolist() == [[1, 3], [2, 8]]
    one, two = InputNorm("scalar"), InputNorm("scalar")
    two.scale.fill_(2.0)
    assert torch.equal(batch.normalised(one), 2 * batch.normalised(two))
