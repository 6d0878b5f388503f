import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.kernels.codes import DenseCodes, SparseCodes
from core.metrics.sparsity import SparsitySums, firing_counts, mean_and_std


def sparse(values: torch.Tensor, keep: torch.Tensor) -> SparseCodes:
    """Sparse codes with an entry wherever `keep` is true, also where the value there is zero."""
    at, cols = keep.nonzero(as_tuple=True)
    return SparseCodes(at, cols, values[at, cols], tuple(values.shape))


CODES = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 2.0, 0.0]])


def test_l0_dead_and_frequencies_by_hand():
    sums = SparsitySums.of(DenseCodes(CODES))
    assert sums.histogram().tolist() == [1, 1, 1, 1]
    assert sums.counts.tolist() == [2, 1, 3, 0]
    assert sums.frequencies().tolist() == [0.5, 0.25, 0.75, 0.0]
    found = sums.metrics()
    assert found["l0_mean"] == 1.5
    assert found["l0_std"] == pytest.approx(1.25**0.5)
    assert found["dead_fraction"] == 0.25
    assert found["dense_fraction"] == 0.75
    assert "l0_bos_mean" not in found
    assert found["l0_mean_without_bos"] == found["l0_mean"]


def test_beginnings_of_text_are_counted_apart():
    sums = SparsitySums.of(DenseCodes(CODES), is_bos=torch.tensor([False, False, True, False]))
    assert sums.histogram().tolist() == [1, 1, 1, 1]
    assert sums.histogram(bos=False).tolist() == [0, 1, 1, 1]
    found = sums.metrics()
    assert (found["l0_mean"], found["l0_mean_without_bos"], found["l0_bos_mean"]) == (1.5, 2.0, 0.0)


def test_dense_means_more_than_a_tenth_of_the_tokens():
    values = torch.zeros(20, 3)
    values[:2, 0] = 1.0  # exactly a tenth
    values[:3, 1] = 1.0
    assert SparsitySums.of(DenseCodes(values)).metrics()["dense_fraction"] == pytest.approx(1 / 3)


def test_entries_that_are_zero_do_not_fire():
    codes = sparse(CODES, keep=torch.ones_like(CODES, dtype=torch.bool))
    assert firing_counts(codes).tolist() == [2, 1, 3, 0]
    assert SparsitySums.of(codes).histogram().tolist() == [1, 1, 1, 1]


def test_the_histogram_holds_rows_in_which_every_latent_fires():
    assert SparsitySums.of(DenseCodes(torch.ones(3, 5))).histogram().tolist() == [0, 0, 0, 0, 0, 3]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 1000), m=st.integers(1, 40))
def test_sums_are_the_same_for_dense_and_sparse_codes_in_any_batches(sizes: list[int], seed: int, m: int):
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(sum(sizes), m, generator=g)
    values = values * (values > 0.7)
    is_bos = torch.rand(sum(sizes), generator=g) < 0.2
    whole = SparsitySums.of(DenseCodes(values), is_bos)
    batches = [(v, b) for v, b in zip(values.split(sizes), is_bos.split(sizes), strict=True)]
    first, *rest = (SparsitySums.of(sparse(v, v > 0), b) for v, b in batches)
    parts = sum(rest, first)
    assert torch.equal(parts.l0_histogram, whole.l0_histogram)
    assert torch.equal(parts.counts, whole.counts)
    l0 = (values > 0).sum(-1).double()
    found = parts.metrics()
    assert found["l0_mean"] == pytest.approx(l0.mean().item())
    assert found["l0_std"] == pytest.approx(l0.std(correction=0).item(), abs=1e-9)
    assert found["dead_fraction"] == pytest.approx((~(values > 0).any(0)).double().mean().item())


def test_mean_and_std_of_a_histogram_by_hand():
    assert mean_and_std(torch.tensor([0, 0, 5])) == (2.0, 0.0)
    assert mean_and_std(torch.tensor([1, 0, 1])) == (1.0, 1.0)
