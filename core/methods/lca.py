"""A dictionary without an encoder: codes by descent on the LASSO, with the adaptive steps of O'Neill et al. 2025.

Rozell et al.'s dynamics, which bear the same name, are `core.stacked.inference.lca`.

Shapes: B rows in the batch, d = d_model, m = dict_size, D = W_dec `[m, d]`, an atom in each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core.batch import Batch, Normalisation
from core.kernels.codes import Codes, DenseCodes
from core.methods.base import DecoderNorm, DictionaryMethod
from core.methods.checks import require, require_one_of
from core.methods.optimizer import ClippingAdam
from core.methods.sparsity import normalised_mse

Rule = Literal["objective", "authors_compat"]
DictionaryGradient = Literal["converged", "unrolled"]
STEP_FACTORS = (0.5, 2.0)


class LCA(DictionaryMethod):
    """f = the codes a >= 0 that make F(a) = 1/2 |x - a D|^2 + l1 sum_i a_i small, x_hat = f D; D by Adam.

    loss = mean square of x - x_hat over that of predicting the batch's mean; there is neither encoder nor bias, so
    `W_enc` and `b_enc` do not exist and `b_dec` stays zero.

    l1                      lambda of F. It has the unit of x, so it must be chosen for `input_norm` and the site
    rule                    of `lca_codes`: `objective`, or `authors_compat` with its traps
    dictionary_gradient     `converged`: codes are constants to the gradient of D (at the minimum of F, by the envelope
                            theorem, that is the gradient of the minimum; here the loss leaves the penalty out, as in
                            the authors' code). `unrolled`: through all iterations, as the authors do. It costs memory
                            for n_iterations times 4 matrices `[B, m]`
    n_iterations            at most, in training; `n_iterations_inference` at most elsewhere
    tolerance               see `lca_codes`
    rows_per_step           only so many rows of every batch are looked at in training (of every rank's part), which
                            scales what is learned from the same text: 128 of 8192 in the authors' code
    rows_at_once            codes are found for so many rows at a time, so that memory is bounded
    """

    def __init__(
        self,
        d_model: int,
        dict_size: int,
        l1: float,
        rule: Rule,
        dictionary_gradient: DictionaryGradient,
        n_iterations: int,
        n_iterations_inference: int,
        tolerance: float,
        rows_per_step: int,
        rows_at_once: int,
        lr: float,
        betas: Sequence[float],
        input_norm: Normalisation,
        seed: int,
        decoder_norm: DecoderNorm,
        dead_after_tokens: int,
        grad_clip: float,
        warmup_steps: int,
        decay_fraction: float,
    ) -> None:
        super().__init__(
            d_model=d_model,
            dict_size=dict_size,
            lr=lr,
            betas=betas,
            input_norm=input_norm,
            seed=seed,
            decoder_norm=decoder_norm,
            dead_after_tokens=dead_after_tokens,
            grad_clip=grad_clip,
            warmup_steps=warmup_steps,
            decay_fraction=decay_fraction,
        )
        require(l1 >= 0, "l1", l1, "be 0 or more")
        require(tolerance >= 0, "tolerance", tolerance, "be 0 or more")
        for name, value in (
            ("n_iterations", n_iterations),
            ("n_iterations_inference", n_iterations_inference),
            ("rows_per_step", rows_per_step),
            ("rows_at_once", rows_at_once),
        ):
            require(value >= 1, name, value, "be at least 1")
        require_one_of(rule, "rule", Rule)
        require_one_of(dictionary_gradient, "dictionary_gradient", DictionaryGradient)
        self.l1, self.tolerance = float(l1), float(tolerance)
        self.rule: Rule = rule
        self.dictionary_gradient: DictionaryGradient = dictionary_gradient
        self.n_iterations, self.n_iterations_inference = int(n_iterations), int(n_iterations_inference)
        self.rows_per_step, self.rows_at_once = int(rows_per_step), int(rows_at_once)
        del self.W_enc, self.b_enc
        self.b_dec.requires_grad_(False)
        self._options |= {
            "l1": self.l1,
            "rule": rule,
            "dictionary_gradient": dictionary_gradient,
            "n_iterations": self.n_iterations,
            "n_iterations_inference": self.n_iterations_inference,
            "tolerance": self.tolerance,
            "rows_per_step": self.rows_per_step,
            "rows_at_once": self.rows_at_once,
        }

    def encode(self, x: Tensor) -> Codes:
        n = self.n_iterations if self.training else self.n_iterations_inference
        unrolled = self.training and self.dictionary_gradient == "unrolled"
        with torch.set_grad_enabled(unrolled and torch.is_grad_enabled()):
            parts = [
                lca_codes(rows, self.W_dec, self.l1, n, self.tolerance, self.rule)
                for rows in x.split(self.rows_at_once)
            ]
            return DenseCodes(torch.cat(parts))

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        return {"reconstruction": normalised_mse(x, self.decode(codes))}

    def update(
        self, batch: Batch, optimizer: ClippingAdam, step: Callable[[], object] | None = None
    ) -> dict[str, Tensor]:
        return super().update(Batch(batch.x[: self.rows_per_step]), optimizer, step)


class _Point(NamedTuple):
    """Where every row stands: the state u, the residual x - ReLU(u) D and what is to be made small."""

    u: Tensor  # [B, m]
    residual: Tensor  # [B, d]
    cost: Tensor  # [B, 1]


def lca_codes(x: Tensor, D: Tensor, l1: float, n_iterations: int, tolerance: float, rule: Rule) -> Tensor:
    """Codes a = ReLU(u) `[B, m]` >= 0 of x `[B, d]` over atoms D `[m, d]`, from u = 0.

    Every iteration goes along du = (a D - x) D^T + l1 with a step of the row's own, first 1 / m: it tries half and
    twice the last step and keeps the one of lower cost. Three products of 2 B d m operations.

    objective       cost F(a) = 1/2 |x - a D|^2 + l1 sum_i a_i, of which du is the gradient. u is kept at a; a trial
                    that does not lower F is refused, and the step is quartered. This is projected gradient descent, and
                    its fixed points are the nonnegative LASSO's solutions (scikit-learn's alpha is l1 / d). A row rests
                    once |a - ReLU(a - du)| is nowhere above tolerance max_i |x . d_i|, whatever becomes of other rows.
    authors_compat  as in the authors' code, with what follows from it:
                    - the cost is |x - a D|^2 / d + l1 mean_i a_i: du weighs the penalty by l1, but steps are chosen as
                      if it were weighed by l1 d / (2 m), some hundredth of it in a large dictionary
                    - u is not kept above zero: a latent that went below early has to climb back over all it has lost,
                      and until then nothing it could do shows in the cost
                    - the better of both trials is taken even if it is worse than where the row stands
                    - all stop when no row of those given gains more than `tolerance`, absolutely: a row's code depends
                      on the rows around it and on the scale of x, and rows can stop far from the minimum
    """
    m, d = D.shape
    half, penalty = (0.5, l1) if rule == "objective" else (1 / d, l1 / m)
    factors = x.new_tensor(STEP_FACTORS).view(-1, 1, 1)
    step = x.new_full((len(x), 1), 1 / m)
    now = _Point(x.new_zeros(len(x), m), x, half * x.square().sum(1, keepdim=True))
    resting = torch.zeros_like(step, dtype=torch.bool)
    smallest = tolerance * (x @ D.T).abs().amax(1, keepdim=True)
    for _ in range(n_iterations):
        du = l1 - now.residual @ D.T
        u = now.u - factors * step * du  # [2, B, m]
        a = u.relu()
        residual = x - a @ D
        cost = half * residual.square().sum(2, keepdim=True) + penalty * a.sum(2, keepdim=True)
        further = cost[1] < cost[0]  # [B, 1]
        state = a if rule == "objective" else u
        shorter, longer = (_Point(*trial) for trial in zip(state, residual, cost, strict=True))
        best = _where(further, longer, shorter)
        gain = now.cost - best.cost
        stepped = torch.where(further, STEP_FACTORS[1], STEP_FACTORS[0]) * step
        if rule == "objective":
            better = (gain > 0) & ~resting
            resting = resting | ((now.u - (now.u - du).relu()).abs().amax(1, keepdim=True) <= smallest)
            step = torch.where(better, stepped, step / 4)
            now = _where(better, best, now)
            if resting.all():
                break
        else:
            step, now = stepped, best
            if gain.max() < tolerance:
                break
    return now.u.relu()


def _where(condition: Tensor, yes: _Point, no: _Point) -> _Point:
    return _Point(*(torch.where(condition, one, other) for one, other in zip(yes, no, strict=True)))
