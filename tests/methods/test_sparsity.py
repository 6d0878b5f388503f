"""JumpReLU's straight-through estimators against values worked by hand, on a matrix and on its entries alone."""

import math

import pytest
import torch
from torch import Tensor

from core.kernels.codes import Codes, DenseCodes, SparseCodes
from core.kernels.mean_square import mse
from core.methods.sparsity import jumprelu, l0_penalty, l1_penalty

# theta 0.5 and bandwidth 0.4: the kernel's window is 0.3 < z < 0.7
Z = [[0.2, 0.6], [0.4, 0.9], [-1.0, 0.35]]
LOG_THETA = [math.log(0.5), math.log(0.5)]


def leaves() -> tuple[Tensor, Tensor]:
    return torch.tensor(Z, requires_grad=True), torch.tensor(LOG_THETA, requires_grad=True)


def pre(z: Tensor, form: str) -> Codes:
    """Pre-activations as a matrix, or as the entries above the window's floor of 0.3."""
    if form == "dense":
        return DenseCodes(z)
    rows, cols = (z > 0.3).nonzero(as_tuple=True)
    return SparseCodes(rows, cols, z[rows, cols], (z.shape[0], z.shape[1]))


FORMS = pytest.mark.parametrize("form", ["dense", "sparse"])


@FORMS
def test_jumprelu_passes_only_what_is_above_the_threshold(form: str):
    z, log_theta = leaves()
    for ste in ("correct", "r1_compat"):
        f = jumprelu(pre(z, form), log_theta, 0.4, ste).dense()
        torch.testing.assert_close(f, torch.tensor([[0.0, 0.6], [0.0, 0.9], [0.0, 0.0]]))


@FORMS
def test_jumprelu_gradients_by_hand(form: str):
    """d f / d theta = - 0.5 / 0.4 inside the window; upstream gradients 1 to 6. In the window: 0.4 (upstream 3) in the
    first column, 0.6 (2) and 0.35 (6) in the second. `correct` has theta = 0.5 more, by the chain rule."""
    for ste, chain in (("correct", 0.5), ("r1_compat", 1.0)):
        z, log_theta = leaves()
        (jumprelu(pre(z, form), log_theta, 0.4, ste).dense() * torch.arange(1.0, 7.0).view(3, 2)).sum().backward()
        torch.testing.assert_close(z.grad, torch.tensor([[0.0, 2.0], [0.0, 4.0], [0.0, 0.0]]))
        torch.testing.assert_close(log_theta.grad, torch.tensor([-1.25 * 3, -1.25 * (2 + 6)]) * chain)


@FORMS
def test_l0_penalty_and_its_gradient_by_hand(form: str):
    """Mean over 3 rows of the number above theta: (1 + 1 + 0) / 3. d H / d theta = - 1 / 0.4 inside the window;
    r1_compat takes the step of f, so of 0.4, 0.6 and 0.35 only 0.6 is in the window, and it lacks the factor theta."""
    for ste, entries, chain in (("correct", (1, 2), 0.5), ("r1_compat", (0, 1), 1.0)):
        z, log_theta = leaves()
        codes = jumprelu(pre(z, form), log_theta, 0.4, ste)
        penalty = l0_penalty(codes, log_theta, 0.4, ste)
        penalty.backward()
        torch.testing.assert_close(penalty.detach(), torch.tensor(2 / 3))
        torch.testing.assert_close(log_theta.grad, torch.tensor(entries) * (-2.5 / 3) * chain)
        assert z.grad is None or not z.grad.any()


def test_the_kernel_estimate_is_the_derivative_of_the_expected_loss():
    """For z uniform on [0, 1] the mean of H(z - theta) is 1 - theta, with derivative -1, and the mean of f is
    (1 - theta^2) / 2, with derivative - theta; both times theta for log theta."""
    n, theta = 400_001, 0.5
    z = torch.linspace(0, 1, n)[:, None]
    log_theta = torch.tensor([math.log(theta)], requires_grad=True)
    l0_penalty(DenseCodes(z, z), log_theta, 0.02, "correct").backward()
    torch.testing.assert_close(log_theta.grad, torch.tensor([-1.0 * theta]), rtol=1e-3, atol=0)
    log_theta.grad = None
    jumprelu(DenseCodes(z), log_theta, 0.02, "correct").values.mean().backward()
    torch.testing.assert_close(log_theta.grad, torch.tensor([-theta * theta]), rtol=1e-3, atol=0)


def test_penalties_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert l1_penalty(DenseCodes(x)) == 3.0
    assert l1_penalty(pre(x, "sparse")) == 3.0
    assert mse(x, torch.zeros(2, 2)) == (1 + 4 + 9) / 4


def test_a_nan_is_not_hidden_by_the_threshold():
    z = torch.tensor([[float("nan"), 2.0]])
    assert jumprelu(DenseCodes(z), torch.zeros(2), 0.1, "correct").values.isnan().tolist() == [[True, False]]
