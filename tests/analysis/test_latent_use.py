"""Counts of activations by kind of token and strength, and twins, by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from core.analysis.latent_use import LatentUse, StrengthUse, TogetherOrApart, columns, kinds_of, twin_pairs
from core.kernels.codes import Codes, DenseCodes, SparseCodes

TEMPLATE = torch.tensor([False, True, True, False, True])
CHAT = torch.tensor([False, True, True, True, True])
V = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1e-3, 0.0], [0.5, 0.0], [0.1, 0.0]])


def as_sparse(dense: Tensor) -> SparseCodes:
    rows, cols = dense.nonzero(as_tuple=True)
    return SparseCodes(rows, cols, dense[rows, cols], (dense.shape[0], dense.shape[1]))


@pytest.mark.parametrize("make", [DenseCodes, as_sparse])
def test_the_template_share_by_hand(make):
    """Latent 0 counts on two of three template tokens and on one word; the third, at 1e-3, is not above the bound."""
    use, kinds = LatentUse(2), kinds_of(TEMPLATE, CHAT)
    for part in (slice(0, 2), slice(2, 5)):
        use.add(make(V[part]), kinds[part])
    assert kinds.tolist() == [0, 1, 1, 2, 1]
    assert use.counts.tolist() == [[1, 2, 1], [0, 0, 0]] and use.n_tokens.tolist() == [1, 3, 1]
    assert use.template_share[0] == pytest.approx(2 / 3) and np.isnan(use.template_share[1])
    assert use.template_base_rate == 0.75 and use.largest.tolist() == [2.0, 0.0]


def test_strengths_are_relative_to_the_largest_activation():
    """0.5, 1, 0.0005, 0.25 and 0.05 of the largest: medium, strongest, not counted, weak, weakest."""
    by_strength = StrengthUse(np.array([2.0, 0.0]))
    by_strength.add(as_sparse(V), kinds_of(TEMPLATE, CHAT))
    assert by_strength.counts[0].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert not by_strength.counts[1].any()


def test_the_divergence_of_two_latents_by_hand():
    """Relative to the larger maximum 10, high is above 4 and low at most 1. Rows: both high; A alone; B with a weak A;
    A with a medium B; neither."""
    v = torch.tensor([[10.0, 5.0], [8.0, 0.0], [1.0, 5.0], [6.0, 3.0], [0.5, 4.0]])
    together = TogetherOrApart(torch.tensor([[0, 1]]), np.array([10.0, 5.0]))
    for part in v.split(2):
        together.add(DenseCodes(part))
    assert together.divergence.tolist() == [2 / 4]
    assert together.joint.sum() == 5


def test_equal_latents_have_no_divergence_and_exclusive_ones_have_all():
    a = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5
    off = torch.zeros(50)
    v = torch.stack([torch.cat([a, off]), torch.cat([a, off]), torch.cat([off, a])], dim=1)
    together = TogetherOrApart(torch.tensor([[0, 1], [0, 2]]), v.amax(0).double().numpy())
    together.add(as_sparse(v))
    assert together.divergence.tolist() == [0, 1]


def test_a_pair_that_never_fires_has_no_divergence():
    together = TogetherOrApart(torch.tensor([[0, 1]]), np.array([1.0, 1.0]))
    together.add(DenseCodes(torch.zeros(3, 2)))
    assert np.isnan(together.divergence[0])


def test_false_twins_keep_the_base_latent_and_change_the_chat_latent():
    """Latents 0 to 9 are chat-only, 10 to 19 base-only with the same directions."""
    directions = torch.eye(10).repeat(2, 1)[:, None].repeat(1, 2, 1)
    chat = torch.arange(20) < 10
    pairs = twin_pairs(directions, chat, ~chat, seed=0)
    assert sorted(pairs.true.tolist()) == [[i, i + 10] for i in range(10)]
    assert torch.equal(pairs.false[:, 1], pairs.true[:, 1]) and not (pairs.false[:, 0] == pairs.true[:, 0]).any()
    assert chat[pairs.false[:, 0]].all()


def test_one_chat_only_latent_has_no_false_twin():
    directions = torch.eye(3)[[0, 0]][:, None].repeat(1, 2, 1)
    pairs = twin_pairs(directions, torch.tensor([True, False]), torch.tensor([False, True]), seed=0)
    assert pairs.true.tolist() == [[0, 1]] and pairs.false.shape == (0, 2)


def test_columns_of_sparse_and_dense_codes_are_the_same():
    dense = torch.rand(6, 9) * (torch.rand(6, 9) < 0.5)
    chosen = torch.tensor([7, 2, 5])
    codes: list[Codes] = [DenseCodes(dense), as_sparse(dense)]
    for made in codes:
        torch.testing.assert_close(columns(made, chosen), dense[:, chosen].double())
