"""Crosscoders: one dictionary for the activations of several models on the same tokens.

f = ReLU(sum over models of <e_j^m, h^m> + b_enc), h_hat^m = sum_j f_j d_j^m + b_dec^m, and v_j = f_j s_j, where s_j is
the size of latent j's decoder (`code_norm`). Decoder norms are free: that they differ between models is the result.

Sources: Lindsey et al. 2024; Minder et al. 2025, sec. 2 and the authors' code, whose variants have other names there:
sum `crosscoder`, joint `sae`, mixed `mixed`, none `none`.

Shapes: B rows in the batch, M models, d = d_model, m = dict_size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from core import distributed
from core.batch import Batch
from core.checked import at_least, between, positive, rule
from core.errors import UserError
from core.kernels import sparse
from core.kernels.codes import Codes, DenseCodes, SparseCodes, entries_kept
from core.kernels.sparse import ProductPath
from core.methods.base import DictionaryMethod, ramp
from core.methods.batchtopk import smallest_active
from core.methods.decoder import uniform
from core.methods.settings import Settings

CodeNorm = Literal["sum", "joint", "mixed", "none"]
Error = Literal["norm", "squared"]
ThresholdRule = Literal["ema", "posthoc_mean", "matched_l0"]
MIXED_SHARE = 0.1  # of the sum of norms in `mixed` (authors' code)
TINY = 1e-12  # of a decoder's size; a latent without decoder is never active


@dataclass(frozen=True, kw_only=True)
class CrosscoderSettings(Settings):
    """
    n_models      M
    initial_norm  of each model's row of W_enc and W_dec at the start; all models start with the same rows
    error         `norm`: mean over models of |h - h_hat| (Minder et al., eq. 4 and 8); `squared`: of |h - h_hat|^2
    code_norm     the size s_j of a latent's decoder. `sum`: of its norms over the models (the paper's); `joint`: the
                  norm of all models' rows together; `mixed`: joint + 0.1 sum; `none`: 1
    path          how products with codes are made, see `core.kernels.sparse.ProductPath`
    """

    n_models: int = at_least(2)
    initial_norm: float = positive()
    error: Error
    code_norm: CodeNorm
    path: ProductPath

    def check(self) -> None:
        if self.decoder_norm != "none":
            raise UserError(
                f"method.decoder_norm: {self.decoder_norm!r} will not do for a crosscoder, whose decoder norms are its "
                "result. Set it to none."
            )

    @property
    def cost_per_row(self) -> int:
        return self.n_models * self.d_model * self.dict_size


@dataclass(frozen=True, kw_only=True)
class L1CrosscoderSettings(CrosscoderSettings):
    """
    l1_coefficient   mu, of the mean over rows of sum_j v_j
    l1_warmup_steps  mu rises linearly over this many steps
    """

    l1_coefficient: float = at_least(0)
    l1_warmup_steps: int = at_least(0)


@dataclass(frozen=True, kw_only=True)
class BatchTopKCrosscoderSettings(CrosscoderSettings):
    """
    k                     active latents per row, mean over the batch; a fraction will do
    aux_coefficient       of L_aux
    k_aux                 dead latents per row that explain the error
    threshold_rule        `ema`: moving average of the smallest v kept (the authors'); `posthoc_mean`: its mean over the
                          batches given to `finish`; `matched_l0`: the threshold at which these batches have k active
                          latents per row
    threshold_ema_rate    weight of the newest step in the average
    threshold_start       share of the training after which the average begins
    """

    k: float = positive()
    aux_coefficient: float = at_least(0)
    k_aux: int = at_least(1)
    threshold_rule: ThresholdRule
    threshold_ema_rate: float = rule(lambda rate: 0 < rate <= 1, "lie in (0, 1]")
    threshold_start: float = between(0, 1)

    def check(self) -> None:
        super().check()
        if self.k > self.dict_size:
            raise UserError(
                f"method.k is {self.k:g}, but the crosscoder has only method.dict_size = {self.dict_size} latents."
            )


def initial_weights(s: CrosscoderSettings) -> tuple[nn.Parameter, ...]:
    """W_enc and W_dec `[m, M, d]`, the same random rows of norm `initial_norm` for every model; both biases zero."""
    rows = uniform(1.0, s.seed, shape=(s.dict_size, s.d_model))
    rows = s.initial_norm * nn.functional.normalize(rows, dim=1)
    W = rows[:, None].repeat(1, s.n_models, 1)
    biases = torch.zeros(s.dict_size), torch.zeros(s.n_models, s.d_model)
    return tuple(nn.Parameter(tensor) for tensor in (W, W.clone(), *biases))


def latent_sizes(W_dec: Tensor, code_norm: CodeNorm) -> Tensor:
    """s `[m]`, what an activation is multiplied with before it is compared or penalised; W_dec `[m, M, d]`."""
    if code_norm == "none":
        return W_dec.new_ones(len(W_dec))
    total = torch.linalg.vector_norm(W_dec, dim=2).sum(1)
    if code_norm == "sum":
        return total
    joint = torch.linalg.vector_norm(W_dec, dim=(1, 2))
    return joint if code_norm == "joint" else joint + MIXED_SHARE * total


def scaled(codes: Codes, factors: Tensor) -> Codes:
    """The codes with the activations of latent j multiplied by factors_j, `[m]`."""
    if isinstance(codes, DenseCodes):
        return DenseCodes(codes.values * factors)
    return SparseCodes.on(codes.support, codes.values * factors[codes.cols])


def error_of(x: Tensor, x_hat: Tensor, error: Error) -> Tensor:
    """The mean over rows and models of |x - x_hat| or of its square; x and x_hat `[B, M, d]`."""
    if error == "norm":
        return torch.linalg.vector_norm(x - x_hat, dim=2).mean()
    return (x - x_hat).square().sum(2).mean()


class L1Crosscoder(DictionaryMethod[L1CrosscoderSettings]):
    """The crosscoder of Lindsey et al. 2024: loss = error + l1_coefficient E[sum_j v_j]."""

    def declare_weights(self) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = initial_weights(self.settings)

    def encode(self, x: Tensor) -> Codes:
        return sparse.encode_relu(x, self.W_enc, self.b_enc, path=self.settings.path)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        s = self.settings
        mu = s.l1_coefficient * ramp(self.n_updates + 1, s.l1_warmup_steps)
        v = scaled(codes, latent_sizes(self.W_dec, s.code_norm))
        error = error_of(x, self.decode(codes), s.error)
        return {"reconstruction": error, "l1": mu * v.values.sum() / len(x)}


class BatchTopKCrosscoder(DictionaryMethod[BatchTopKCrosscoderSettings]):
    """The crosscoder of Minder et al. 2025: of every batch the B k largest v are kept; loss = error + L_aux.

    L_aux: the k_aux largest v among the dead latents, without biases, explain the detached error of all models; its
    mean square over that of predicting the batch's mean error. In inference f_j is kept where v_j > threshold.
    """

    threshold: Tensor  # of v; NaN: not measured yet
    threshold_ema: Tensor

    def declare_weights(self) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = initial_weights(self.settings)
        for name in ("threshold", "threshold_ema"):
            self.register_buffer(name, torch.tensor(torch.nan))

    def encode(self, x: Tensor) -> Codes:
        return self.encode_batch(x, self.settings.k) if self.training else self.encode_rows(x)

    def encode_batch(self, x: Tensor, k: float) -> Codes:
        """The training rule: the B k largest v of the batch."""
        return sparse.encode_batchtopk(x, self.W_enc, self.b_enc, k, path=self.settings.path, sizes=self.sizes())

    def encode_rows(self, x: Tensor) -> Codes:
        """The rule of inference."""
        if self.threshold.isnan():
            raise UserError(
                "method.threshold_rule: the crosscoder's threshold was never measured, so it cannot encode. "
                "Train past method.threshold_start, or use threshold_rule=matched_l0 with stream.calibration_batches."
            )
        return sparse.encode_threshold(x, self.W_enc, self.b_enc, self.threshold / self.sizes())

    def sizes(self) -> Tensor:
        """s `[m]`; to the gradient, the selection and so s is constant."""
        return latent_sizes(self.W_dec.detach(), self.settings.code_norm).clamp(min=TINY)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        x_hat = self.decode(codes)
        aux = self.settings.aux_coefficient * self.aux_loss(x, x_hat)
        return {"reconstruction": error_of(x, x_hat, self.settings.error), "aux": aux}

    def aux_loss(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """L_aux, a scalar; 0 where no latent is dead or the error is the same in every row."""
        dead = self.dead.nonzero().squeeze(1)
        if self.settings.aux_coefficient == 0 or dead.numel() == 0:
            return x.new_zeros(())
        k, sizes = min(self.settings.k_aux, dead.numel()), self.sizes()[dead]
        codes = sparse.encode_topk(x, self.W_enc[dead], self.b_enc[dead], k, path="auto", sizes=sizes)
        e_hat = sparse.decode(codes, self.W_dec[dead])
        e = (x - x_hat).detach()
        centre = distributed.mean(e.mean(0))
        spread = distributed.mean(self.square(e - centre).mean())
        return self.square(e - e_hat).mean() / spread if spread > 0 else x.new_zeros(())

    def square(self, e: Tensor) -> Tensor:
        """The squared size `[B]` of errors `[B, M, d]`."""
        return e.square().sum((1, 2))

    @torch.no_grad()
    def observe(self, codes: Codes) -> None:
        super().observe(codes)
        if self.n_updates < self.settings.threshold_start * (self.n_steps or 0):
            return
        newest = smallest_active(scaled(codes, self.sizes()))
        moved = self.threshold_ema.lerp(newest, self.settings.threshold_ema_rate)
        self.threshold_ema.copy_(newest.where(self.threshold_ema.isnan(), moved))
        if self.settings.threshold_rule == "ema":
            self.threshold.copy_(self.threshold_ema)

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> None:
        s = self.settings
        if s.threshold_rule == "ema":
            return
        normalised = [batch.normalised(self.norm) for batch in batches]
        if not normalised:
            raise UserError(f"stream.calibration_batches: threshold_rule={s.threshold_rule} needs at least one batch.")
        if s.threshold_rule == "posthoc_mean":
            minima = [smallest_active(scaled(self.encode_batch(x, s.k), self.sizes())) for x in normalised]
            self.threshold.copy_(torch.stack(minima).mean())
        else:
            self.threshold.copy_(self.threshold_of_l0(normalised))

    def threshold_of_l0(self, batches: Iterable[Tensor]) -> Tensor:
        """The threshold of v at which these rows have k active latents on average, if no batch has more than 2 k."""
        candidates, n_rows = [], 0
        for x in batches:
            candidates.append(scaled(self.encode_batch(x, 2 * self.settings.k), self.sizes()).values.flatten())
            n_rows += len(x)
        v = torch.cat(candidates).sort(descending=True).values
        n = entries_kept(self.settings.k, n_rows)
        return (v[n - 1] + v[n]) / 2 if n < len(v) else v.new_zeros(())
