"""The Triton kernels equal plain PyTorch: compiled on a GPU, or else in Triton's interpreter, if it is installed.

The interpreter must be chosen before Triton is imported. So without a GPU one test runs this file again in a separate
process, which shows that the kernels compute the right thing. Another test compiles them, which needs no GPU.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (it comes with the CUDA builds of PyTorch)")

from core.kernels import cuda, cuda_select, device, reference, sparse
from core.kernels.codes import Support

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

here = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in the interpreter's own process")
gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
examples = settings(max_examples=20, deadline=None)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests run here already")
def test_the_kernels_compute_the_right_thing_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", __file__]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


TYPES = {
    **dict.fromkeys(("rows", "n", "d", "m", "n_groups", "groups_of_row"), "i32"),
    **dict.fromkeys(("index", "offsets", "cols", "starts", "positions"), "*i64"),
    **dict.fromkeys(("maxima", "limits", "above", "equal", "ties", "keys", "counts"), "*i32"),
    **dict.fromkeys(("weights", "out", "parts", "values", "right"), "*fp32"),
    **dict.fromkeys(("table", "left", "z"), "*bf16"),
}
SIZES = {"STEPS": 15, "PIECE": 64, "ENTRIES": 8, "WIDTH": 256, "GROUP": 256, "TILE": 8, "SHIFT": 28}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (cuda._sum_pieces, {}),
    (cuda._sum_parts, {}),
    (cuda._sample, {"rows": "*i64"}),
    (cuda_select._maxima, {}),
    (cuda_select._counts, {}),
    (cuda_select._entries, {}),
    (cuda_select._count_reaching, {"TILE": 128}),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's functions cannot be compiled")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_even_on_a_machine_without_a_gpu(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, special in KERNELS:
        known = TYPES | SIZES | special
        sizes = {name: known[name] for name in kernel.arg_names if name in SIZES}
        signature = {name: "constexpr" if name in sizes else known[name] for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, sizes), target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]


def support_of(lengths: list[int], n_rows: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """weights, index into `n_rows`, offsets of segments of the given lengths."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n = int(offsets[-1])
    return torch.randn(n, generator=g), torch.randint(0, n_rows, (n,), generator=g), offsets


def bag(weights: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """The sums in fp64, one segment at a time."""
    rows = weights.double()[:, None] * table.double()[index]
    parts = [rows[a:b].sum(0) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return torch.stack(parts).float() if parts else torch.zeros(0, table.shape[1])


@here
@examples
@given(
    lengths=st.lists(st.one_of(st.integers(0, 4), st.integers(0, 40)), max_size=7),
    d=st.sampled_from([1, 5, 16]),
    piece=st.sampled_from([4, 8, 64]),
    widest=st.sampled_from([8, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_sums_of_rows_equal_a_loop(lengths: list[int], d: int, piece: int, widest: int, dtype: torch.dtype, seed: int):
    g = torch.Generator().manual_seed(seed)
    weights, index, offsets = support_of(lengths, 6, g)
    table = torch.randn(6, d, generator=g).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "PIECE", piece)
        patch.setattr(cuda, "WIDEST", widest)
        actual = [cuda.sums_of_rows(*(t.to(DEVICE) for t in (weights, index, offsets, table))) for _ in range(2)]
    assert actual[0].dtype == torch.float32 and torch.equal(actual[0], actual[1])
    torch.testing.assert_close(actual[0].cpu(), bag(weights, index, offsets, table), atol=1e-4, rtol=1e-4)


@here
def test_sums_of_rows_by_hand():
    """Rows 1, 10, 100: 2 x 1 + 3 x 100; nothing; 5 x 10."""
    table = torch.tensor([[1.0, -1.0], [10.0, -10.0], [100.0, -100.0]])
    arguments = (torch.tensor([2.0, 3.0, 5.0]), torch.tensor([0, 2, 1]), torch.tensor([0, 2, 2, 3]), table)
    actual = cuda.sums_of_rows(*(t.to(DEVICE) for t in arguments))
    assert actual.tolist() == [[302, -302], [0, 0], [50, -50]]


@here
def test_a_long_segment_is_the_sum_of_its_pieces_wherever_it_starts():
    """Exact with small integers: segments of 150 and 200 entries across pieces of 64, with empty ones between."""
    lengths = [3, 150, 0, 0, 64, 1, 200, 0]
    g = torch.Generator().manual_seed(0)
    weights, index, offsets = support_of(lengths, 4, g)
    weights, table = weights.round(), torch.randint(-3, 4, (4, 3), generator=g).float()
    actual = cuda.sums_of_rows(*(t.to(DEVICE) for t in (weights, index, offsets, table)))
    assert torch.equal(actual.cpu(), bag(weights, index, offsets, table))


@here
@examples
@given(
    n=st.integers(0, 20),
    d=st.sampled_from([1, 5, 16]),
    widest=st.sampled_from([8, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_a_sampled_product_equals_the_dense_one(n: int, d: int, widest: int, dtype: torch.dtype, seed: int):
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(4, d, generator=g), torch.randn(7, d, generator=g).to(dtype)
    rows, cols = torch.randint(0, 4, (n,), generator=g), torch.randint(0, 7, (n,), generator=g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "WIDEST", widest)
        actual = cuda.sampled_product(*(t.to(DEVICE) for t in (left, right, rows, cols)))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.cpu(), (left @ right.float().T)[rows, cols], atol=1e-4, rtol=1e-4)


@here
@pytest.mark.parametrize("bias", [True, False])
def test_pre_activations_are_the_product_in_bf16_and_the_bias_in_fp32(bias: bool):
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(8, 16, generator=g), torch.randn(24, 16, generator=g), torch.randn(24, generator=g) / 3
    actual = cuda.pre_activations(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE) if bias else None).cpu()
    expected = x.bfloat16().double() @ W.bfloat16().double().T + (b.double() if bias else 0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-6)


@here
def test_the_bias_keeps_all_bits_of_fp32():
    b = torch.randn(50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 50)
    actual = cuda.pre_activations(torch.zeros(2, 8, device=DEVICE), torch.ones(50, 8, device=DEVICE), b.to(DEVICE))
    assert torch.equal(actual.cpu(), b.expand(2, 50))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Pre-activations and k, with ties, NaN, infinities, few or no positive entries, rows of unequal size."""
    B, m = draw(st.integers(1, 5)), draw(st.integers(1, 50))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    z = torch.randint(-2, 4, (B, m), generator=g).float() if draw(st.booleans()) else torch.randn(B, m, generator=g)
    for value in (torch.nan, torch.inf, -torch.inf, 1e-45, -0.0):
        if draw(st.integers(0, 3)) == 0:
            z[torch.rand(B, m, generator=g) < draw(st.sampled_from([0.05, 0.6]))] = value
    sign = draw(st.sampled_from(["any", "any", "positive", "none"]))
    z = {"any": z, "positive": z.abs(), "none": -z.abs().nan_to_num()}[sign]
    z[0] *= draw(st.sampled_from([1, 100]))
    return z.to(draw(st.sampled_from([torch.float32, torch.bfloat16]))), draw(st.integers(1, m))


def expected_selection(rule: str, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    flat = z.float().flatten()
    keep = (
        reference.keep_largest(z.float(), k).flatten() if rule == "topk" else reference.keep_largest(flat, k * len(z))
    )
    positions = keep.nonzero().squeeze(1)
    return positions, flat[positions]


def assert_selected(actual: tuple[Support, Tensor], z: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    support, values = actual
    positions, expected_values = expected
    assert torch.equal(support.rows * z.shape[1] + support.cols, positions)
    assert support.shape == z.shape and values.dtype == torch.float32
    assert torch.equal(support.offsets, Support(support.rows, support.cols, support.shape).offsets)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)


@here
@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
@examples
@given(problem=matrices(), entries_per_candidate=st.sampled_from([1, 10_000]), smallest=st.sampled_from([1, 4]))
def test_selection_keeps_the_same_entries_as_a_full_sort(
    rule: str, problem: tuple[Tensor, int], entries_per_candidate: int, smallest: int
):
    z, k = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_select, "ENTRIES_PER_CANDIDATE", entries_per_candidate)
        patch.setattr(cuda_select, "SMALLEST_GROUP", smallest)
        patch.setattr(cuda_select, "TILE_ENTRIES", 256)
        support, values = getattr(cuda_select, rule)(z.to(DEVICE), k)
    actual = (Support(support.rows.cpu(), support.cols.cpu(), support.shape, support.offsets.cpu()), values.cpu())
    assert_selected(actual, z, expected_selection(rule, z, k))


@here
@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
@pytest.mark.parametrize("n_equal", [0, 3000])
def test_large_groups_and_many_candidates_select_the_same(rule: str, n_equal: int):
    """Groups of 128 columns. With 3000 of 7200 entries equal there are too many candidates to sort."""
    z = torch.randn(6, 1200, generator=torch.Generator().manual_seed(0))
    z.flatten()[:n_equal] = 2.5
    support, values = getattr(cuda_select, rule)(z.to(DEVICE), 4)
    actual = (Support(support.rows.cpu(), support.cols.cpu(), support.shape, support.offsets.cpu()), values.cpu())
    assert_selected(actual, z, expected_selection(rule, z, 4))


@here
def test_selection_by_hand():
    """The two largest of [[3, 1], [2, 5]]; ties go to the lower row-major position."""
    z = torch.tensor([[3.0, 1.0], [2.0, 5.0]], device=DEVICE)
    support, values = cuda_select.batchtopk(z, 1)
    assert support.rows.tolist() == [0, 1] and support.cols.tolist() == [0, 1] and values.tolist() == [3, 5]
    support, _ = cuda_select.batchtopk(torch.ones(2, 3, device=DEVICE), 2)
    assert support.rows.tolist() == [0, 0, 0, 1] and support.cols.tolist() == [0, 1, 2, 0]
    support, _ = cuda_select.topk(torch.ones(2, 3, device=DEVICE), 2)
    assert support.rows.tolist() == [0, 0, 1, 1] and support.cols.tolist() == [0, 1, 0, 1]


@here
def test_a_row_with_few_positive_entries_keeps_them_next_to_a_row_of_ties():
    z = torch.stack([-torch.ones(40), torch.ones(40), torch.zeros(40)])
    z[0, 30] = 2
    support, values = cuda_select.topk(z.to(DEVICE), 3)
    assert support.rows.tolist() == [0, 1, 1, 1] and support.cols.tolist() == [30, 0, 1, 2]
    assert values.tolist() == [2, 1, 1, 1]


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes through the Triton kernels, also in the interpreter."""
    monkeypatch.setattr(device, "_is_supported", lambda x: x.dtype != torch.float64)


@here
@pytest.mark.usefixtures("through_triton")
@pytest.mark.parametrize(("to_bf16", "tolerance"), [(False, 1e-4), (True, 3e-2)])
@pytest.mark.parametrize("encoder", ["encode_topk", "encode_batchtopk"])
def test_encoding_decoding_and_all_gradients_equal_dense_autograd(encoder: str, to_bf16: bool, tolerance: float):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g) for s in ((9, 24), (70, 24), (70,), (70, 24))]
    upstream = torch.randn(9, 24, generator=g).to(DEVICE)

    def run(module: Any) -> list[Tensor]:
        rounded = [t.bfloat16().float() if to_bf16 else t for t in tensors]  # so that both keep the same entries
        x, W_enc, b_enc, W_dec = (t.to(DEVICE).requires_grad_() for t in rounded)
        codes = getattr(module, encoder)(x, W_enc, b_enc, 5)
        x_hat = module.decode(codes, W_dec)
        (x_hat * upstream).sum().backward()
        return [t.detach() for t in (codes.dense(), x_hat, x.grad, W_enc.grad, b_enc.grad, W_dec.grad)]

    with device.products_in_bf16(to_bf16):
        actual = run(sparse)
    for a, b in zip(actual, run(reference), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max()), rtol=0)


@here
@pytest.mark.usefixtures("through_triton")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_the_kernels_is_close_to_training_on_the_cpu(precision: str, monkeypatch):
    from core.batch import Batch
    from core.methods.batchtopk import BatchTopK

    g = torch.Generator().manual_seed(0)
    atoms = torch.randn(20, 16, generator=g)
    x = [torch.relu(torch.randn(32, 20, generator=g) - 1) @ atoms for _ in range(4)]

    def losses(on: str, bf16: bool) -> list[float]:
        method = BatchTopK(
            d_model=16, dict_size=40, k=3, use_enc_bias=False,
            enc_init_norm=None, threshold_rule="ema", threshold_ema_rate=0.1, aux="r1",
            aux_coefficient=0.1, k_aux=8, lr=1e-2, betas=(0.9, 0.99), input_norm="token_std", seed=0,
            decoder_norm="before_step", dead_after_tokens=64, grad_clip=1.0,
            b_dec_init="zeros", warmup_steps=0, decay_fraction=0.0,
            path="sparse",
        ).to(on)  # fmt: skip
        optimizer = method.configure_optimizers()
        with torch.autocast(on, torch.bfloat16, enabled=bf16):
            return [float(method.update(Batch(b.to(on)), optimizer)["loss"]) for b in x]

    actual = losses(DEVICE, precision == "bf16-mixed")
    monkeypatch.setattr(device, "_is_supported", lambda x: False)
    expected = losses("cpu", False)
    assert actual == pytest.approx(expected, rel=2e-2 if precision == "bf16-mixed" else 1e-4)


# ---- sizes of a real training step; only on a GPU

B, D, M, K = 4096, 768, 24576, 32


@pytest.fixture
def z() -> Tensor:
    """Pre-activations of a bf16 product in which a few latents fire often."""
    torch.manual_seed(0)
    x, W, b = torch.randn(B, D, device="cuda"), torch.randn(M, D, device="cuda"), torch.randn(M, device="cuda")
    b[:5] += 100
    return cuda.pre_activations(x, W, b)


@gpu
@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "rows of unequal size"])
def test_full_size_selection_equals_a_sort_waits_once_and_needs_little_memory(rule: str, kind: str, z: Tensor):
    if kind == "rows of unequal size":
        z[:100] *= 10
    z = z.bfloat16() if kind == "bf16" else z
    expected = expected_selection(rule, z, K)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = getattr(cuda_select, rule)(z, K)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    assert_selected(actual, z, expected)
    assert sum("synchroniz" in str(w.message) for w in caught) <= 1
    assert peak <= 2 * z.numel()  # bytes: half of the pre-activations in fp32


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_size_products_equal_plain_ones_and_repeat_bit_for_bit(dtype: torch.dtype, z: Tensor):
    support, values = cuda_select.batchtopk(z, K)
    order, offsets, rows = support.by_column
    W, x = torch.randn(M, D, device="cuda"), torch.randn(B, D, device="cuda")
    W_low, x_low = W.to(dtype), x.to(dtype)
    dense = torch.zeros(B, M, device="cuda").index_put((support.rows, support.cols), values)

    decoded = [cuda.sums_of_rows(values, support.cols, support.offsets, W_low) for _ in range(2)]
    gradient = [cuda.sums_of_rows(values[order], rows, offsets, x_low) for _ in range(2)]
    sampled = [cuda.sampled_product(x_low, W_low, support.rows, support.cols) for _ in range(2)]
    assert int(offsets.diff().max()) > 10 * cuda.PIECE
    expected = (dense @ W_low.float(), dense.T @ x_low.float(), (x_low.float() @ W_low.float().T)[dense > 0])
    for (first, second), e in zip((decoded, gradient, sampled), expected, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


@gpu
def test_full_size_pre_activations_equal_the_fp32_product_of_the_rounded_factors():
    x, W, b = torch.randn(B, D, device="cuda"), torch.randn(M, D, device="cuda"), torch.randn(M, device="cuda")
    expected = x.bfloat16().float() @ W.bfloat16().float().T + b
    torch.testing.assert_close(cuda.pre_activations(x, W, b), expected, rtol=1e-4, atol=1e-3)
