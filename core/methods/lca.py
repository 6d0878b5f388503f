"""A dictionary without an encoder: codes by descent on the LASSO, with the adaptive steps of O'Neill et al. 2025.

Shapes: B rows in the batch, d = d_model, m = dict_size, D = W_dec `[m, d]`, an atom in each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from core.batch import Batch
from core.checked import at_least, require
from core.kernels.codes import Codes, DenseCodes
from core.kernels.mean_square import normalised_mse
from core.methods.base import DictionaryMethod
from core.methods.decoder import initial_rows, unit_rows_
from core.methods.settings import Settings
from core.optimizer import ClippingAdam

Rule = Literal["objective", "authors_compat"]
DictionaryGradient = Literal["converged", "unrolled"]
STEP_FACTORS = (0.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class LCASettings(Settings):
    """
    l1                      lambda of F. It has the unit of x, so it must be chosen for `input_norm` and the site
    rule, tolerance         see `lca_codes`
    dictionary_gradient     `converged`: codes are constants to the gradient of D (by the envelope theorem that is the
                            gradient of the minimum of F; here the loss has no penalty, as in the authors' code).
                            `unrolled`: through all iterations, as the authors do; 4 n_iterations matrices `[B, m]`
    n_iterations            at most, in training
    n_iterations_inference  at most, in evaluation mode
    rows_per_step           training uses only this many rows of every batch (of every rank's part), the first ones; 128
                            of 8192 in the authors' code
    rows_at_once            codes are computed for this many rows at a time, so that memory is bounded
    """

    l1: float = at_least(0)
    rule: Rule
    dictionary_gradient: DictionaryGradient
    n_iterations: int = at_least(1)
    n_iterations_inference: int = at_least(1)
    tolerance: float = at_least(0)
    rows_per_step: int = at_least(1)
    rows_at_once: int = at_least(1)

    def check(self) -> None:
        require(self.b_dec_init == "zeros", "method.b_dec_init", self.b_dec_init, "be zeros: there is no bias here")


class LCA(DictionaryMethod[LCASettings]):
    """f = the codes a >= 0 that make F(a) = 1/2 |x - a D|^2 + l1 sum_i a_i small, x_hat = f D; D by Adam.

    loss = mean square of x - x_hat over that of predicting the batch's mean. There is neither encoder nor bias: b_dec
    stays zero.
    """

    def declare_weights(self) -> None:
        self.W_dec = nn.Parameter(unit_rows_(initial_rows(self.settings)))
        self.b_dec = nn.Parameter(torch.zeros(self.settings.d_model), requires_grad=False)

    def encode(self, x: Tensor) -> Codes:
        s = self.settings
        n = s.n_iterations if self.training else s.n_iterations_inference
        unrolled = self.training and s.dictionary_gradient == "unrolled"
        with torch.set_grad_enabled(unrolled and torch.is_grad_enabled()):
            parts = x.split(s.rows_at_once)
            return DenseCodes(torch.cat([lca_codes(rows, self.W_dec, s.l1, n, s.tolerance, s.rule) for rows in parts]))

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        return {"reconstruction": normalised_mse(x, self.decode(codes))}

    def update(
        self, batch: Batch, optimizer: ClippingAdam, step: Callable[[], object] | None = None
    ) -> dict[str, Tensor]:
        return super().update(Batch(batch.x[: self.settings.rows_per_step]), optimizer, step)

    def train_step_flops(self, batch_size: int) -> float:
        """Products alone, of all iterations: an upper bound, since rows may rest before the last."""
        s = self.settings
        n_products = 3 * s.n_iterations * (3 if s.dictionary_gradient == "unrolled" else 1) + 2
        return 2.0 * min(s.rows_per_step, batch_size) * s.d_model * s.dict_size * n_products


def lca_codes(x: Tensor, D: Tensor, l1: float, n_iterations: int, tolerance: float, rule: Rule) -> Tensor:
    """Codes a = ReLU(u) `[B, m]` >= 0 of x `[B, d]` over atoms D `[m, d]`, from u = 0.

    Every iteration goes along du = (a D - x) D^T + l1 with a step of the row's own, first 1 / m: it tries half and
    twice the last step and keeps the one of lower cost. Three products of 2 B d m operations.

    objective       cost F(a) = 1/2 |x - a D|^2 + l1 sum_i a_i, of which du is the gradient. u is kept at a; a trial
                    that does not lower F is refused, and the step is quartered. This is projected gradient descent;
                    its fixed points are the nonnegative LASSO's solutions (scikit-learn's alpha is l1 / d). A row stops
                    once |a - ReLU(a - du)| is nowhere above tolerance max_i |x . d_i|, independent of other rows.
    authors_compat  as in the authors' code, which differs in four ways:
                    - the cost is |x - a D|^2 / d + l1 mean_i a_i: du weighs the penalty by l1, but steps are chosen as
                      if the weight were l1 d / (2 m), about a hundredth of that in a large dictionary
                    - u may fall below zero; then the latent must climb back before it shows in the cost
                    - the better trial is taken even if it is worse than where the row stands
                    - all rows stop when none gains more than `tolerance`, absolutely: a row's code depends on the rows
                      around it and on the scale of x, and rows can stop far from the minimum
    """
    m, d = D.shape
    half, penalty = (0.5, l1) if rule == "objective" else (1 / d, l1 / m)
    factors = x.new_tensor(STEP_FACTORS).view(-1, 1, 1)
    step = x.new_full((len(x), 1), 1 / m)
    u, residual = x.new_zeros(len(x), m), x  # where every row stands
    cost = half * x.square().sum(1, keepdim=True)  # [B, 1]
    resting = torch.zeros_like(step, dtype=torch.bool)
    smallest = tolerance * (x @ D.T).abs().amax(1, keepdim=True)
    for _ in range(n_iterations):
        du = l1 - residual @ D.T
        trials = u - factors * step * du  # [2, B, m]
        a = trials.relu()
        errors = x - a @ D
        costs = half * errors.square().sum(2, keepdim=True) + penalty * a.sum(2, keepdim=True)
        further = costs[1] < costs[0]  # [B, 1]
        states = a if rule == "objective" else trials
        best = [torch.where(further, longer, shorter) for shorter, longer in (states, errors, costs)]
        gain = cost - best[2]
        stepped = torch.where(further, STEP_FACTORS[1], STEP_FACTORS[0]) * step
        if rule == "objective":
            better = (gain > 0) & ~resting
            resting = resting | ((u - (u - du).relu()).abs().amax(1, keepdim=True) <= smallest)
            step = torch.where(better, stepped, step / 4)
            u, residual, cost = (
                torch.where(better, new, old) for new, old in zip(best, (u, residual, cost), strict=True)
            )
            if resting.all():
                break
        else:
            step, (u, residual, cost) = stepped, best
            if gain.max() < tolerance:
                break
    return u.relu()
