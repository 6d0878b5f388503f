"""Many samples stored as indices and values: the same problem as the dense one, and batches that depend on the step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.synthetic.large_sparse_codes import DRAWN_AT_ONCE, LargeSparseCodes
from core.synthetic.sparse_codes import SparseCodeLaw

LAW = SparseCodeLaw(N=30, M=7, K=4)


def test_a_batch_by_hand():
    source = LargeSparseCodes(SparseCodeLaw(N=3, M=2, K=2), n=2, seed=0)
    source.D = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    source.indices = torch.tensor([[2, 0], [1, 2]], dtype=torch.uint16)
    source.values = torch.tensor([[5.0, 1.0], [2.0, 10.0]])
    active = source.active(slice(0, 2))
    X, S = source.observed(*active), source.dense(*active)
    assert S.tolist() == [[1, 0, 5], [0, 2, 10]]
    assert torch.allclose(X, torch.tensor([[4.0, 4.0], [6.0, 10.0]]))


def test_the_first_samples_equal_those_of_the_dense_source_with_the_same_generator():
    from core.seeding import generator

    source = LargeSparseCodes(LAW, n=50, seed=3)
    S = LAW.codes(50, generator(3, "large_sparse_codes", "train"))
    active = source.active(slice(None))
    X, dense = source.observed(*active), source.dense(*active)
    assert torch.equal(dense, S) and torch.allclose(X, S @ LAW.dictionary(3), atol=1e-6)
    assert torch.equal(source.D, LAW.dictionary(3))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.data())
def test_a_pass_shows_no_sample_twice(n: int, data: st.DataObject):
    source = LargeSparseCodes(LAW, n=n, seed=0)
    size = data.draw(st.integers(1, n))
    n_batches, epoch = n // size, data.draw(st.integers(0, 3))
    seen = torch.cat([source.dense(*source.batch(epoch * n_batches + i, size)) for i in range(n_batches)])
    every = source.dense(*source.active(slice(None)))
    assert len(seen) == n_batches * size
    assert torch.equal((seen[:, None] == every[None]).all(-1).sum(1), torch.ones(len(seen), dtype=torch.int64))


def test_a_batch_depends_only_on_its_step_and_every_pass_has_its_own_order():
    one, other = (LargeSparseCodes(LAW, n=100, seed=1) for _ in range(2))
    for step in range(7):
        one.batch(step, 30)
    for step in (8, 2, 5):
        (indices, values), (indices_other, values_other) = one.batch(step, 30), other.batch(step, 30)
        assert torch.equal(indices, indices_other) and torch.equal(values, values_other)
    assert not torch.equal(one.batch(0, 30)[1], one.batch(3, 30)[1])


def test_samples_depend_on_seed_and_purpose_and_the_dictionary_only_on_the_seed():
    train, test, other = (
        LargeSparseCodes(LAW, n=20, seed=seed, purpose=purpose)
        for seed, purpose in ((0, "train"), (0, "test"), (1, "train"))
    )
    assert torch.equal(train.D, test.D) and not torch.equal(train.D, other.D)
    assert not torch.equal(train.values, test.values) and not torch.equal(train.values, other.values)


def test_half_a_million_samples_of_twenty_codes_take_sixty_megabytes():
    n = 2 * DRAWN_AT_ONCE + 1
    source = LargeSparseCodes(SparseCodeLaw(N=100, M=7, K=20), n=n, seed=0)
    assert source.n_bytes * 500_000 / n == 500_000 * 20 * (2 + 4) == 60e6
    indices, values = source.active(slice(None))
    assert int(indices.min()) == 0 and int(indices.max()) == 99 and bool((values > 0).all())
    assert all(len(set(row)) == 20 for row in indices[-3:].tolist())


def test_the_largest_index_fits_into_sixteen_bits():
    source = LargeSparseCodes(SparseCodeLaw(N=2**16, M=2, K=1), n=1, seed=0)
    source.indices[0, 0] = 2**16 - 1
    assert source.dense(*source.active(slice(None))).nonzero().tolist() == [[0, 2**16 - 1]]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: LargeSparseCodes(SparseCodeLaw(N=2**16 + 1, M=2, K=1), n=1, seed=0), r"source\.N"),
        (lambda: LargeSparseCodes(LAW, n=0, seed=0, purpose="test"), r"source\.n_test"),
        (lambda: LargeSparseCodes(LAW, n=5, seed=0).batch(0, 6), "batch_size"),
        (lambda: LargeSparseCodes(LAW, n=5, seed=0).batch(0, 0), "batch_size"),
    ],
)
def test_a_wrong_size_is_named_in_the_error(call, named):
    with pytest.raises(UserError, match=named):
        call()
