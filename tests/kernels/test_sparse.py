"""The sparse kernels equal dense autograd for any shapes, ties and signs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.errors import UserError
from core.kernels import reference, select, sparse
from core.kernels.codes import DenseCodes, SparseCodes
from core.kernels.device import products_in_bf16

ENCODERS = ("encode_topk", "encode_batchtopk")


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """x, W_enc, b_enc, centre, W_dec and an upstream gradient; small integers make ties and duplicates."""
    B, d, m = draw(st.integers(1, 20)), draw(st.integers(1, 9)), draw(st.integers(1, 70))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    ties, offset = draw(st.booleans()), draw(st.sampled_from([0.0, 0.0, -3.0, -60.0]))

    def make(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).float() if ties else torch.randn(shape, generator=g)

    return {
        "tensors": [make(B, d), make(m, d), make(m) + offset, make(d), make(m, d)],
        "upstream": make(B, d),
        "k": draw(st.integers(1, m)),
        "bias": draw(st.booleans()),
        "block": draw(st.sampled_from([1, 3 * m, 1 << 24])),
        "cached": draw(st.sampled_from([1, 3 * B, 1 << 22])),
        "gather": draw(st.sampled_from([0, 8])),
        "sampled": draw(st.sampled_from([1, 2, 64])),
        "margin": draw(st.sampled_from([0.1, 1.25, 4.0])),
    }


def run(module, encoder: str, problem: dict, **options) -> list[Tensor]:
    x, W_enc, b_enc, centre, W_dec = (t.clone().requires_grad_() for t in problem["tensors"])
    bias = b_enc if problem["bias"] else None
    codes = getattr(module, encoder)(x, W_enc, bias, problem["k"], centre, **options)
    x_hat = module.decode(codes, W_dec)
    (x_hat * problem["upstream"]).sum().backward()
    gradients = [x.grad, W_enc.grad, centre.grad, W_dec.grad] + ([b_enc.grad] if problem["bias"] else [])
    return [t.detach().float() for t in (codes.dense(), x_hat, codes.l0_per_row(), codes.fired(), *gradients)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * (1 + float(b.abs().max())), rtol=1e-4)


@pytest.mark.parametrize("path", ["sparse", "dense", "auto"])
@pytest.mark.parametrize("encoder", ENCODERS)
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_values_and_all_gradients_equal_dense_autograd(encoder: str, path: str, problem: dict):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "BLOCK_ENTRIES", problem["block"])
        patch.setattr(select, "CACHED_ENTRIES", problem["cached"])
        patch.setattr(select, "SAMPLED_ROWS", problem["sampled"])
        patch.setattr(select, "GATHER_COST", problem["gather"])
        patch.setattr(select, "SAMPLE_MARGIN", problem["margin"])
        actual = run(sparse, encoder, problem, path=path)
    assert_equal(actual, run(reference, encoder, problem))


@pytest.mark.parametrize("encoder", ENCODERS)
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_the_code_path_for_other_devices_selects_the_same_entries(encoder: str, problem: dict):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_on_cpu", lambda x: False)
        actual = run(sparse, encoder, problem)
    assert_equal(actual, run(reference, encoder, problem))


@pytest.mark.parametrize(("path", "on_cpu"), [("sparse", True), ("sparse", False), ("dense", True)])
@pytest.mark.parametrize("encoder", ENCODERS)
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_sizes_decide_what_is_kept_and_leave_the_codes_as_they_are(
    encoder: str, path: str, on_cpu: bool, problem: dict
):
    """The reference multiplies the weights with the sizes, powers of two that round nothing, and divides the codes."""
    x, W_enc, b_enc, centre, W_dec = problem["tensors"]
    sizes = 2.0 ** torch.randint(-3, 4, b_enc.shape, generator=torch.Generator().manual_seed(len(x)))
    scaled = problem | {"tensors": [x, W_enc * sizes[:, None], b_enc * sizes, centre, W_dec / sizes[:, None]]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BLOCK_ENTRIES", "block"), ("CACHED_ENTRIES", "cached"), ("SAMPLED_ROWS", "sampled")):
            patch.setattr(select, name, problem[value])
        if not on_cpu:
            patch.setattr(select, "_on_cpu", lambda x: False)
        codes, x_hat, _, _, d_x, d_W, d_centre, d_dec, *d_b = run(sparse, encoder, problem, path=path, sizes=sizes)
    c, y, _, _, dx, dW, dcentre, ddec, *db = run(reference, encoder, scaled)
    expected = [c / sizes, y, dx, dW * sizes[:, None], dcentre, ddec / sizes[:, None], *(each * sizes for each in db)]
    assert_equal([codes, x_hat, d_x, d_W, d_centre, d_dec, *d_b], expected)


@settings(max_examples=40, deadline=None)
@given(problem=problems(), per_latent=st.booleans())
def test_codes_above_a_threshold_equal_the_dense_ones(problem: dict, per_latent: bool):
    x, W_enc, b_enc, centre, _ = problem["tensors"]
    threshold = b_enc.abs() if per_latent else torch.tensor(0.5)
    actual = sparse.encode_threshold(x, W_enc, b_enc, threshold, centre)
    expected = reference.encode_threshold(x, W_enc, b_enc, threshold, centre)
    torch.testing.assert_close(actual.dense(), expected.dense())


@pytest.mark.parametrize("path", ["sparse", "dense", "auto"])
@settings(max_examples=30, deadline=None)
@given(problem=problems(), floor=st.sampled_from([-1.0, 0.0, 1.0, 4.0]), per_latent=st.booleans())
def test_pre_activations_above_a_floor_and_their_gradients_equal_dense_autograd(
    path: str, problem: dict, floor: float, per_latent: bool
):
    floors = problem["tensors"][2].abs() + floor if per_latent else torch.tensor(floor)

    def run(sparsely: bool) -> list[Tensor]:
        x, W_enc, b_enc, centre, W_dec = (t.clone().requires_grad_() for t in problem["tensors"])
        if sparsely:
            codes = sparse.pre_activations_above(x, W_enc, b_enc, floors, centre, path)
        else:
            codes = DenseCodes(reference.pre_activations(x, W_enc, b_enc, centre))
        if isinstance(codes, DenseCodes):
            codes = DenseCodes(codes.values.where(codes.values > floors, 0))
        x_hat = sparse.decode(codes, W_dec)
        (x_hat * problem["upstream"]).sum().backward()
        return [t.detach() for t in (codes.dense(), x_hat, x.grad, W_enc.grad, b_enc.grad, centre.grad, W_dec.grad)]

    assert_equal(run(True), run(False))


@pytest.mark.parametrize(("share", "kind"), [(0.24, SparseCodes), (0.26, DenseCodes)])
def test_auto_is_sparse_if_less_than_a_quarter_of_the_batch_is_above_the_floor(share: float, kind: type):
    z = torch.linspace(0, 1, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(0))].view(10, 10)
    codes = sparse.pre_activations_above(z, torch.eye(10), None, torch.tensor(1 - share))
    assert isinstance(codes, kind)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_pair_of_models_is_encoded_as_the_sum_over_both_and_decoded_to_both(encoder: str, path: str):
    g = torch.Generator().manual_seed(0)
    x, W_enc, W_dec = (torch.randn(shape, generator=g) for shape in ((6, 2, 5), (40, 2, 5), (40, 2, 5)))
    b_enc, centre = torch.randn(40, generator=g), torch.randn(2, 5, generator=g)
    leaves = [[t.clone().requires_grad_() for t in (x, W_enc, b_enc, centre, W_dec)] for _ in range(2)]
    x1, W1, b1, c1, D1 = leaves[0]
    codes = getattr(sparse, encoder)(x1, W1, b1, 4, c1, path=path)
    x_hat = sparse.decode(codes, D1)
    x2, W2, b2, c2, D2 = leaves[1]
    z = torch.einsum("bsd,msd->bm", x2 - c2, W2) + b2
    expected = torch.einsum("bm,msd->bsd", z.where(codes.dense() > 0, 0), D2)
    torch.testing.assert_close(x_hat, expected)
    for out in (x_hat, expected):
        out.square().sum().backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-4)


def test_ties_go_to_the_lower_row_major_position():
    x, W = torch.ones(2, 1), torch.ones(3, 1)
    assert sparse.encode_topk(x, W, None, 2).dense().tolist() == [[1, 1, 0], [1, 1, 0]]
    assert sparse.encode_batchtopk(x, W, None, 2).dense().tolist() == [[1, 1, 1], [1, 0, 0]]


def test_batchtopk_by_hand():
    """k = 1 keeps the two largest of four pre-activations: 3 and 5, then 2 and 5."""
    codes = sparse.encode_batchtopk(torch.tensor([[3.0, 1.0], [2.0, 5.0]]), torch.eye(2), None, 1)
    assert codes.dense().tolist() == [[3, 0], [0, 5]]
    codes = sparse.encode_batchtopk(torch.tensor([[1.0, 1.5], [2.0, 5.0]]), torch.eye(2), None, 1)
    assert codes.dense().tolist() == [[0, 0], [2, 5]]


def test_batchtopk_with_a_fraction_for_k_by_hand():
    """k = 1.5 of two rows keeps three entries, k = 0.5 one."""
    x = torch.tensor([[3.0, 1.0], [2.0, 5.0]])
    assert sparse.encode_batchtopk(x, torch.eye(2), None, 1.5).dense().tolist() == [[3, 0], [2, 5]]
    assert sparse.encode_batchtopk(x, torch.eye(2), None, 0.5).dense().tolist() == [[0, 0], [0, 5]]


def test_no_entry_at_or_below_zero_is_kept():
    x = torch.tensor([[-1.0, 0.0, 2.0]])
    for encoder in (sparse.encode_topk, sparse.encode_batchtopk):
        codes = encoder(x, torch.eye(3), None, 3)
        assert codes.values.tolist() == [2.0] and codes.cols.tolist() == [2]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_batch_without_positive_entries_decodes_to_zero_and_has_zero_gradients(encoder: str):
    W_enc = torch.ones(5, 3, requires_grad=True)
    W_dec = torch.ones(5, 3, requires_grad=True)
    x_hat = sparse.decode(getattr(sparse, encoder)(-torch.ones(4, 3), W_enc, None, 2), W_dec)
    x_hat.sum().backward()
    assert not x_hat.any() and not W_enc.grad.any() and not W_dec.grad.any()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_nan_in_an_input_or_a_weight_is_not_hidden(encoder: str, fast: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select, "_on_cpu", lambda x: fast)
    for poisoned_row, poisoned_latent in ((3, None), (None, 5)):
        x, W = torch.randn(8, 4).abs(), torch.randn(16, 4).abs()
        if poisoned_row is not None:
            x[poisoned_row, 1] = torch.nan
        if poisoned_latent is not None:
            W[poisoned_latent, 1] = torch.nan
        assert getattr(sparse, encoder)(x, W, None, 2).values.isnan().any()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_equal_finite_differences(encoder: str):
    g = torch.Generator().manual_seed(0)
    x, W, b, c, W_dec = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, 4), (9, 4), (9,), (4,), (9, 4)))
    inputs = [t.requires_grad_() for t in (x, W, b, c, W_dec)]

    def f(x: Tensor, W: Tensor, b: Tensor, c: Tensor, W_dec: Tensor) -> Tensor:
        return sparse.decode(getattr(sparse, encoder)(x, W, b, 3, c), W_dec)

    assert torch.autograd.gradcheck(f, inputs, eps=1e-7, atol=1e-5)


def test_selection_holds_only_one_block_of_pre_activations(monkeypatch: pytest.MonkeyPatch):
    buffers = []
    original = select._pre_activations

    def spy(x: Tensor, W: Tensor, b: Tensor | None, sizes: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        buffers.append(out)
        return original(x, W, b, sizes, out)

    monkeypatch.setattr(select, "_pre_activations", spy)
    monkeypatch.setattr(select, "BLOCK_ENTRIES", 4 * 32)
    sparse.encode_batchtopk(torch.randn(10, 8), torch.randn(32, 8), None, 3)
    assert [out.shape for out in buffers] == [(4, 32), (4, 32), (2, 32)]
    assert len({out.data_ptr() for out in buffers}) == 1


def test_codes_agree_with_their_dense_form():
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 4.0]])
    rows, cols = dense.nonzero(as_tuple=True)
    codes = SparseCodes(rows, cols, dense[rows, cols], (3, 4))
    for one in (codes, DenseCodes(dense)):
        assert one.shape == (3, 4)
        assert torch.equal(one.dense(), dense)
        assert one.l0_per_row().tolist() == [2, 0, 2]
        assert one.fired().tolist() == [True, True, False, True]
    by_column = codes.support.by_column
    assert by_column.rows.tolist() == [2, 0, 0, 2] and by_column.offsets.tolist() == [0, 1, 2, 2, 4]
    assert codes.values[by_column.order].tolist() == [3, 2, 1, 4]


def test_products_in_bf16_are_an_error_without_the_kernels():
    with pytest.raises(UserError, match=r"trainer\.precision=bf16-mixed needs a CUDA device"), products_in_bf16(True):
        sparse.encode_topk(torch.ones(2, 3), torch.ones(8, 3), None, 1)


def test_codes_are_differentiable_in_their_values():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    codes = SparseCodes(torch.tensor([0, 1]), torch.tensor([2, 0]), values, (2, 3))
    (codes.dense() * torch.arange(6.0).view(2, 3)).sum().backward()
    assert values.grad.tolist() == [2, 3]


def test_auto_is_sparse_from_four_latents_per_entry():
    x, W = torch.randn(4, 3), torch.randn(16, 3)
    assert isinstance(sparse.encode_topk(x, W, None, 4, path="auto"), SparseCodes)
    assert isinstance(sparse.encode_topk(x, W, None, 5, path="auto"), DenseCodes)
