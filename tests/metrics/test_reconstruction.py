import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score

from core.input_norm import InputNorm
from core.metrics.reconstruction import ReconstructionSums, VarianceExplained, fve_per_token, token_std_errors


def rows(n: int, d: int, seed: int, mean: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) * torch.linspace(0.5, 2, d) + mean
    return x, x + 0.3 * torch.randn(n, d, generator=g)


def in_batches(x: torch.Tensor, x_hat: torch.Tensor, sizes: list[int]) -> ReconstructionSums:
    parts = zip(x.split(sizes), x_hat.split(sizes), strict=True)
    first, *rest = (ReconstructionSums.of(a, b) for a, b in parts)
    return sum(rest, first)


def test_fvu_by_hand():  # errors 1 + 1, spread 4 + 4
    sums = ReconstructionSums.of(torch.tensor([[0.0, 7.0], [4.0, 7.0]]), torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
    assert sums.fvu == 0.25
    assert sums.fve == 0.75


def test_energy_form_cosine_and_length_by_hand():
    x, x_hat = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    sums = ReconstructionSums.of(x, x_hat)
    assert sums.nmse_raw_energy == pytest.approx((16 + 1) / (25 + 4))
    assert sums.mean_cosine == pytest.approx((3 / 5 + 1) / 2)
    assert sums.mean_l2_ratio == pytest.approx((3 / 5 + 1 / 2) / 2)


def test_nmse_token_std_by_hand():
    # Unbiased standard deviations 1 and 10; squared errors (0 + 0 + 0.3) / 3 and (30 + 0 + 0) / 3 per coordinate.
    x = torch.tensor([[1.0, 2.0, 3.0], [-10.0, 0.0, 10.0]], dtype=torch.float64)
    x_hat = x + torch.tensor([[0.0, 0.0, 0.3**0.5], [30.0**0.5, 0.0, 0.0]], dtype=torch.float64)
    assert ReconstructionSums.of(x, x_hat).nmse_token_std == pytest.approx((0.1 + 0.1) / 2, rel=1e-4)


def test_nmse_token_std_is_the_mean_squared_error_in_the_space_of_token_std_normalisation():
    x, x_hat = rows(50, 16, seed=0, mean=3.0)
    norm = InputNorm("token_std")
    x_n, shift = norm(x)
    x_hat_n = (x_hat - shift.offset) / shift.scale
    expected = (x_n - x_hat_n).square().mean().item()
    assert ReconstructionSums.of(x, x_hat).nmse_token_std == pytest.approx(expected, rel=1e-5)
    # ... which is |x - x_hat|^2 / |x - mean over d|^2 of each token, up to d / (d - 1).
    ratio = (x - x_hat).square().sum(-1) / (x - x.mean(-1, keepdim=True)).square().sum(-1)
    assert token_std_errors(x, x_hat).mean().item() == pytest.approx(ratio.mean().item() * 15 / 16, rel=1e-4)


def test_fve_is_the_variance_weighted_r2_of_scikit_learn():
    x, x_hat = rows(200, 7, seed=1, mean=5.0)
    expected = r2_score(x.double().numpy(), x_hat.double().numpy(), multioutput="variance_weighted")
    assert in_batches(x, x_hat, [64, 64, 72]).fve == pytest.approx(expected, rel=1e-12)


def test_a_large_common_mean_does_not_inflate_fve_but_the_energy_form():
    x, x_hat = rows(500, 8, seed=2)
    x, x_hat = x.double(), x_hat.double()
    near, far = ReconstructionSums.of(x, x_hat), in_batches(x + 1e6, x_hat + 1e6, [100] * 5)
    assert far.fve == pytest.approx(near.fve, rel=1e-8)
    assert near.nmse_raw_energy > 0.01
    assert far.nmse_raw_energy < 1e-10
    # Predicting the mean of all rows explains nothing, wherever the mean is.
    mean = (x + 1e6).mean(0).expand_as(x)
    assert ReconstructionSums.of(x + 1e6, mean).fve == pytest.approx(0, abs=1e-9)


def test_one_pass_over_fp32_batches_equals_two_passes_in_fp64():
    x, x_hat = rows(1000, 12, seed=3, mean=1000.0)
    a, b = x.numpy().astype(np.float64), x_hat.numpy().astype(np.float64)
    two_passes = ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    assert in_batches(x, x_hat, [10] * 100).fvu == pytest.approx(two_passes, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=12), seed=st.integers(0, 1000), mean=st.floats(-1e4, 1e4)
)
def test_figures_do_not_depend_on_how_rows_are_cut_into_batches(sizes: list[int], seed: int, mean: float):
    x, x_hat = rows(sum(sizes) + 2, 5, seed, mean)
    whole, parts = ReconstructionSums.of(x, x_hat), in_batches(x, x_hat, [*sizes, 2])
    for name in ("nmse_token_std", "fvu", "fve", "nmse_raw_energy", "mean_cosine", "mean_l2_ratio"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9), name


def test_fve_per_token_by_hand_is_dominated_by_rows_near_the_mean():
    x, x_hat = (
        torch.tensor([[2.0, 0], [-2.0, 0], [0.1, 0], [-0.1, 0]]),
        torch.tensor([[1.0, 0], [-2.0, 0], [0, 0], [0, 0]]),
    )
    per_token = fve_per_token(x, x_hat, x.mean(0))
    assert per_token.tolist() == pytest.approx([0.75, 1.0, 0.0, 0.0])
    assert per_token.mean().item() < ReconstructionSums.of(x, x_hat).fve == pytest.approx(1 - 1.02 / 8.02)


def test_zero_rows_leave_the_figures_finite():
    sums = ReconstructionSums.of(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.zeros(2, 2))
    assert sums.mean_cosine == 0
    assert sums.mean_l2_ratio == 0


def test_equal_rows_have_no_fraction_of_variance():
    with pytest.raises(ValueError, match="all rows are equal"):
        _ = ReconstructionSums.of(torch.ones(3, 2), torch.zeros(3, 2)).fvu


def test_variance_explained_by_hand():
    # rows 0 and 4 on a line, rebuilt as 1 and 3: errors 1 + 1, spread 4 + 4, energy 0 + 16
    w, w_hat = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [3.0]])
    explained = VarianceExplained.of(w, w_hat)
    assert explained.centred == pytest.approx(1 - 2 / 8) and explained.uncentred == pytest.approx(1 - 2 / 16)
    # weights 3 : 1: mean 1, spread 3 * 1 + 9 = 12, error 3 + 1
    explained = VarianceExplained.of(w, w_hat, torch.tensor([3.0, 1.0]))
    assert explained.centred == pytest.approx(1 - 4 / 12) and explained.uncentred == pytest.approx(1 - 4 / 16)
