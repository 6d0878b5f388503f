"""Latent Scaling in one pass, against least squares and the direct form."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.analysis import latent_scaling
from core.analysis.latent_scaling import LatentScaling, Scaling
from core.kernels.codes import DenseCodes

M, D, N = 7, 4, 60


class Weights:
    """The decoder of a crosscoder, in float64."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.W_dec = torch.randn(M, 2, D, generator=g, dtype=torch.float64)
        self.b_dec = torch.randn(2, D, generator=g, dtype=torch.float64)

    def swapped(self) -> "Weights":
        other = Weights()
        other.W_dec, other.b_dec = self.W_dec.flip(1), self.b_dec.flip(0)
        return other


def problem(seed: int = 1) -> tuple[Any, Tensor, Tensor]:
    """A decoder, activations `[N, 2, D]` and codes `[N, M]`, a third of which is active."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 2, D, generator=g, dtype=torch.float64)
    f = torch.rand(N, M, generator=g, dtype=torch.float64) * (torch.rand(N, M, generator=g) < 1 / 3)
    return Weights(seed), x, f


def scaling(weights: Any, x: Tensor, f: Tensor, probe: Any = "chat", parts: int = 1) -> Scaling:
    sums = LatentScaling(weights)
    for rows, codes in zip(x.chunk(parts), f.chunk(parts), strict=True):
        sums.add(rows, DenseCodes(codes))
    return sums.result(probe)


@pytest.mark.parametrize("probe", ["base", "chat"])
def test_every_beta_is_the_least_squares_solution(probe: str):
    weights, x, f = problem()
    x_hat = torch.einsum("nm,mkd->nkd", f, weights.W_dec) + weights.b_dec
    result = scaling(weights, x, f, probe)
    for j in range(M):
        p = weights.W_dec[j, ["base", "chat"].index(probe)]
        design = (f[:, j, None] * p).reshape(-1, 1).numpy()
        for model in range(2):
            own = f[:, j, None] * weights.W_dec[j, model]
            targets = {
                "error": x[:, model] - (x_hat[:, model] - own),  # the error without latent j
                "reconstruction": x_hat[:, model],
                "activation": x[:, model],
                "activation_no_bias": x[:, model] - weights.b_dec[model],
            }
            for target, Y in targets.items():
                solution = np.linalg.lstsq(design, Y.reshape(-1).numpy(), rcond=None)[0][0]
                beta = float(result.beta[target][j, model])
                assert beta == pytest.approx(solution, rel=1e-10, abs=1e-12)
                scaled = beta * design[:, 0]
                flat = Y.reshape(-1).numpy()
                gain = (flat**2).sum() - ((flat - scaled) ** 2).sum()
                assert float(result.gain[target][j, model]) == pytest.approx(gain, rel=1e-9, abs=1e-10)


def test_planted_betas_come_back():
    """Activations that are beta times each latent's chat direction, one latent per row."""
    weights, _, _ = problem()
    weights.b_dec.zero_()
    beta = torch.linspace(0.1, 0.9, M, dtype=torch.float64)
    f = torch.eye(M, dtype=torch.float64).repeat(5, 1) * 2
    chat = f @ weights.W_dec[:, 1]
    base = (f * beta) @ weights.W_dec[:, 1]
    result = scaling(weights, torch.stack([base, chat], 1), f)
    torch.testing.assert_close(result.nu("activation"), beta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.nu("error"), beta, rtol=1e-12, atol=1e-12)


def test_swapping_the_models_swaps_the_probes():
    weights, x, f = problem()
    for target in ("error", "reconstruction", "activation"):
        there = scaling(weights, x, f, "chat").nu(target)
        back = scaling(weights.swapped(), x.flip(1), f, "base").nu(target)
        torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 7])
def test_the_rows_may_come_in_any_parts(parts: int):
    weights, x, f = problem()
    whole, split = scaling(weights, x, f), scaling(weights, x, f, parts=parts)
    for target, beta in whole.beta.items():
        torch.testing.assert_close(split.beta[target], beta, rtol=1e-12, atol=1e-12)


def test_the_gain_on_other_rows_is_that_of_the_direct_form_and_can_be_negative():
    weights, x, f = problem()
    there, here = LatentScaling(weights), LatentScaling(weights)
    there.add(x[:30], DenseCodes(f[:30]))
    here.add(x[30:], DenseCodes(f[30:]))
    gain = here.gain(there.result("base"), "reconstruction")
    for j in range(M):
        for model in range(2):
            Y = (f[30:] @ weights.W_dec[:, model]) + weights.b_dec[model]
            beta = there.result("base").beta["reconstruction"][j, model]
            left = Y - beta * f[30:, j, None] * weights.W_dec[j, 0]
            assert float(gain[j, model]) == pytest.approx(float((Y.square() - left.square()).mean()), rel=1e-9)
    itself = here.gain(here.result("base"), "reconstruction")
    assert (itself > gain).all() and (itself > 0).all() and (gain < 0).any()


def test_a_latent_that_never_fires_has_no_beta_and_a_count_of_zero():
    weights, x, f = problem()
    f[:, 2] = 0
    result = scaling(weights, x, f)
    assert int(result.n_active[2]) == 0 and result.nu("error")[2].isnan()
    assert result.nu("error")[[0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("numbers_at_once", [1, 30 * 2 * D])
def test_memory_is_bounded_however_many_entries_are_active(numbers_at_once: int, monkeypatch: pytest.MonkeyPatch):
    """No tensor that `add` makes is larger than the rows, or the numbers that it may have at once; the betas stay."""
    weights, x, f = problem()
    f += 0.1  # all entries are active
    expected = scaling(weights, x, f)
    monkeypatch.setattr(latent_scaling, "NUMBERS_AT_ONCE", numbers_at_once)
    sums = LatentScaling(weights)
    with Largest() as made:
        sums.add(x, DenseCodes(f))
    assert made.numel <= max(x.numel(), f.numel() * 2, numbers_at_once)  # an entry has a row and a column
    for target, beta in expected.beta.items():
        torch.testing.assert_close(sums.result("chat").beta[target], beta, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that was made inside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_sums_do_not_grow_with_the_number_of_rows():
    weights, x, f = problem()
    sums = LatentScaling(weights)
    sizes = []
    for _ in range(3):
        sums.add(x, DenseCodes(f))
        sizes.append(sum(value.numel() for value in vars(sums).values() if isinstance(value, Tensor)))
    assert len(set(sizes)) == 1
