"""Floating-point operations of training and inference, as O'Neill et al. 2025 count them and corrected.

`paper` is the arithmetic of the authors' code, which gives the x-axes of their figures. `corrected` repairs four
defects: 1. Sparse coding's step multiplies sums over the batch by the number of samples a second time: 59.2 times too
much at
   N = 16, M = 8, n = 1024.
2. Their later counts for known codes include a decoder, which does not exist there. `sae_train_step` with
   `learn_D=False` gives those counts, `sae_known_codes_step` the earlier ones without a decoder.
3. Updating a weight is charged for every sample instead of once per step, at 2 instead of about 10 operations (Adam).
   The backward pass has one product per layer, but a layer that is not the first, or a learned D, needs two.
4. Codes optimised at test time are charged the training of an SAE even if they use nothing of it: see `sae_ito`.

In `corrected`, a product [a, b] x [b, c] is 2abc, any other operation 1 per element, a step of Adam 10 per parameter.
Atoms are normalised without a gradient. A count is of one run.

Shapes: n samples, N codes, M observed dimensions, h hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.errors import UserError

Mode = Literal["paper", "corrected"]
ADAM = 10  # per parameter and step: two running averages (7), a root, a quotient, the update
NORMALISE = 3  # per weight of a dictionary: square, sum, quotient


@dataclass(frozen=True)
class Terms:
    """A `corrected` count, by kind of operation.

    matmul       products of matrices, forward and backward: what torch's FlopCounterMode counts
    elementwise  activations and their derivatives, residual, loss and penalty, scaling of gradients
    normalise    atoms to unit norm
    adam         the optimiser's step, once per parameter
    """

    matmul: float = 0.0
    elementwise: float = 0.0
    normalise: float = 0.0
    adam: float = 0.0

    @property
    def total(self) -> float:
        return float(self.matmul + self.elementwise + self.normalise + self.adam)

    def __add__(self, other: Terms) -> Terms:
        return Terms(
            self.matmul + other.matmul,
            self.elementwise + other.elementwise,
            self.normalise + other.normalise,
            self.adam + other.adam,
        )


def sae_train_step(N: int, M: int, n: int, learn_D: bool, mode: Mode, bias: bool = False) -> float:
    """One full-batch step of an SAE on reconstruction + L1. `paper` ignores `bias`: it counts its gradient always."""
    if _is_paper(mode):
        return _paper_net(N, M, _layer_paper(M, N), n, learn_D)
    return (_layer(M, N, n, bias, first=True) + _reconstruction(N, M, n, learn_D)).total


def mlp_train_step(N: int, M: int, h: int, n: int, learn_D: bool, mode: Mode, bias: bool = False) -> float:
    """As `sae_train_step` with an encoder of one hidden layer, M -> h -> N."""
    if _is_paper(mode):
        return _paper_net(N, M, _layer_paper(M, h) + _layer_paper(h, N), n, learn_D)
    return (_mlp(N, M, h, n, bias) + _reconstruction(N, M, n, learn_D)).total


def sae_known_codes_step(N: int, M: int, n: int, mode: Mode, bias: bool = True) -> float:
    """One step of an SAE's encoder towards known codes (cosine per code over the batch); there is no decoder."""
    if _is_paper(mode):
        return float(n * _layer_paper(M, N))
    return (_layer(M, N, n, bias, first=True) + _cosine(N, n)).total


def mlp_known_codes_step(N: int, M: int, h: int, n: int, mode: Mode, bias: bool = True) -> float:
    """One step of an MLP encoder towards known codes; there is no decoder."""
    if _is_paper(mode):
        return float(n * (_layer_paper(M, h) + _layer_paper(h, N)))
    return (_mlp(N, M, h, n, bias) + _cosine(N, n)).total


def sc_train_step(N: int, M: int, n: int, mode: Mode, learn_D: bool = True) -> float:
    """One joint Adam step of sparse coding on the n samples' log-codes and the dictionary."""
    if _is_paper(mode):
        return float(n * _paper_sc(N, M, samples=1, batch=n, learn_D=learn_D))
    return (_log_codes(N, n) + _reconstruction(N, M, n, learn_D)).total


def sc_train_step_batch_once(N: int, M: int, n: int, learn_D: bool = True) -> float:
    """The authors' terms of `sc_train_step` with only defect 1 repaired: every sum over the batch counts once.

    No experiment uses it: docs/log/oneill-flops.md compares it with both countings.
    """
    return float(_paper_sc(N, M, samples=n, batch=n, learn_D=learn_D))


def sae_inference(N: int, M: int, n: int) -> float:
    """Encoder, ReLU and decoder on n samples; the same in both modes."""
    return float((4 * M * N + N) * n)


def mlp_inference(N: int, M: int, h: int, n: int) -> float:
    """Two layers with ReLU, and decoder, on n samples; the same in both modes."""
    return float((2 * M * h + h + 2 * h * N + N + 2 * M * N) * n)


def optimise_codes(N: int, M: int, n: int, iterations: int, mode: Mode) -> float:
    """Adam on the log-codes of n samples under a fixed dictionary: ITO, and the inference of sparse coding.

    `paper` charges MN + N per sample for the start. `corrected` charges the last exp. For a comparison with a net that
    was trained on samples, count the codes of all samples in the comparison (defect 4).
    """
    if _is_paper(mode):
        return float((M * N + N + (4 * M * N + 2 * M + 11 * N) * iterations) * n)
    step = _log_codes(N, n) + _reconstruction(N, M, n, learn_D=False)
    return step.total * iterations + N * n


def sae_ito(
    N: int, M: int, n_train: int, steps: int, n_test: int, iterations: int, mode: Mode, learn_D: bool, warm_start: bool
) -> float:
    """An SAE trained for `steps`, then the codes of n_test samples optimised under its (or the true) dictionary.

    `corrected` does not charge training that is not used (known dictionary, cold start), and charges a warm start for
    its pass through the encoder.
    """
    codes = optimise_codes(N, M, n_test, iterations, mode)
    training = steps * sae_train_step(N, M, n_train, learn_D, mode)
    if _is_paper(mode):
        return training + codes
    return codes + (training if learn_D or warm_start else 0.0) + ((2 * M * N + N) * n_test if warm_start else 0.0)


def _layer_paper(fan_in: int, fan_out: int) -> int:
    """Forward, backward (through the ReLU, weights, bias) and update of one layer, all per sample."""
    forward = 2 * fan_in * fan_out + fan_out
    backward = fan_out + (2 * fan_in * fan_out + fan_out)
    update = 2 * (fan_in * fan_out + fan_out)
    return forward + backward + update


def _paper_net(N: int, M: int, encoder: int, n: int, learn_D: bool) -> float:
    """An encoder's count plus decoder: forward and backward 2MN, normalisation MN and update 2MN of a learned one."""
    return float(n * (encoder + 4 * M * N + (3 * M * N if learn_D else 0)))


def _paper_sc(N: int, M: int, samples: int, batch: int, learn_D: bool) -> int:
    """Forward pass of `samples` (exp, decoder, normalisation), backward as two of them, loss and update of a batch."""
    forward = N * samples + 2 * M * N * samples + (3 * M * N if learn_D else 0)
    loss = 2 * M * batch + N * batch
    update = N * batch + (M * N if learn_D else 0)
    return forward + loss + 2 * forward + update


def _layer(fan_in: int, fan_out: int, n: int, bias: bool, first: bool) -> Terms:
    """ReLU(X W + b): products for output, weights' gradient and, but in the first layer, input's gradient."""
    products = 2 if first else 3
    return Terms(
        matmul=products * 2 * fan_in * fan_out * n,
        elementwise=(4 if bias else 2) * fan_out * n,  # ReLU and its derivative; bias and the sum of its gradient
        adam=ADAM * (fan_in + bias) * fan_out,
    )


def _mlp(N: int, M: int, h: int, n: int, bias: bool) -> Terms:
    return _layer(M, h, n, bias, first=True) + _layer(h, N, n, bias, first=False)


def _log_codes(N: int, n: int) -> Terms:
    """S = exp(L): exp and its derivative, and Adam on every code."""
    return Terms(elementwise=2 * N * n, adam=ADAM * N * n)


def _reconstruction(N: int, M: int, n: int, learn_D: bool) -> Terms:
    """||X - S D||^2 and L1: products for X_hat, the codes' gradient and that of a learned dictionary.

    Elementwise: residual and its square (2M), the penalty and its gradient (2N) per sample.
    """
    loss = Terms(matmul=(3 if learn_D else 2) * 2 * M * N * n, elementwise=(2 * M + 2 * N) * n)
    return loss + Terms(normalise=NORMALISE * M * N, adam=ADAM * M * N) if learn_D else loss


def _cosine(N: int, n: int) -> Terms:
    """Inner product and norm of every predicted code over the batch (4), and the gradient, a S + b S_hat (3)."""
    return Terms(elementwise=7 * N * n)


def _is_paper(mode: Mode) -> bool:
    if mode not in ("paper", "corrected"):
        raise UserError(f"flops mode: {mode!r} must be paper or corrected.")
    return mode == "paper"
