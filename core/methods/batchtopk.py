"""BatchTopK sparse autoencoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core import distributed
from core.batch import Batch
from core.checked import rule
from core.errors import UserError
from core.kernels import sparse
from core.kernels.codes import Codes, SparseCodes
from core.methods.auxiliary import KSparseSettings, k_sparse_losses, k_sparse_weights, used_bias
from core.methods.base import DictionaryMethod
from core.methods.dictionary import Inference

ThresholdRule = Literal["posthoc_mean", "ema"]


@dataclass(frozen=True, kw_only=True)
class BatchTopKSettings(KSparseSettings):
    """
    threshold_rule      `posthoc_mean`: the mean, over batches given to `finish`, of the smallest entry kept (the
                        paper's); `ema`: its exponential moving average over training steps
    threshold_ema_rate  weight of the newest step in that average, which is always kept (`threshold_ema`) for comparison
    """

    threshold_rule: ThresholdRule
    threshold_ema_rate: float = rule(lambda rate: 0 < rate <= 1, "lie in (0, 1]")

    @property
    def needs_calibration(self) -> bool:
        return self.threshold_rule == "posthoc_mean"


class BatchTopK(DictionaryMethod[BatchTopKSettings]):
    """BatchTopK sparse autoencoder (Bussmann et al. 2024; used by Leask et al. 2025).

    z = ReLU(W_enc (x - b_dec) [+ b_enc]); f keeps the B k largest entries of z `[B, m]`; x_hat = W_dec f + b_dec
    loss = mean over entries of (x - x_hat)^2 + aux_coefficient L_aux
    In inference f = z 1[z > threshold], one threshold for all latents, so a row's code does not depend on its batch.
    """

    threshold: Tensor  # NaN: not measured yet
    threshold_ema: Tensor

    def declare_weights(self) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = k_sparse_weights(self.settings)
        for name in ("threshold", "threshold_ema"):
            self.register_buffer(name, torch.tensor(torch.nan))

    def encode(self, x: Tensor) -> Codes:
        return self.encode_batch(x) if self.training else self.encode_rows(x)

    def encode_batch(self, x: Tensor) -> Codes:
        """The training rule: codes of a row depend on its batch."""
        s = self.settings
        return sparse.encode_batchtopk(x, self.W_enc, used_bias(self), s.k, centre=self.b_dec, path=s.path)

    def encode_rows(self, x: Tensor) -> SparseCodes:
        """The rule of inference."""
        if self.threshold.isnan():
            raise RuntimeError("BatchTopK: the inference threshold is not measured yet; call finish(batches) first.")
        return sparse.encode_threshold(x, self.W_enc, used_bias(self), self.threshold, centre=self.b_dec)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        return k_sparse_losses(self, x, codes)

    def inference_rule(self) -> Inference:
        if self.threshold.isnan():
            raise UserError("The threshold of this BatchTopK dictionary is not measured: finish(batches) does that.")
        return Inference(self.W_enc, used_bias(self), "jumprelu", threshold=self.threshold)

    @torch.no_grad()
    def observe(self, codes: Codes) -> None:
        super().observe(codes)
        newest = smallest_active(codes)
        moved = self.threshold_ema.lerp(newest, self.settings.threshold_ema_rate)
        self.threshold_ema.copy_(newest.where(self.threshold_ema.isnan(), moved))
        if self.settings.threshold_rule == "ema":
            self.threshold.copy_(self.threshold_ema)

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> None:
        if self.settings.threshold_rule == "posthoc_mean":
            minima = [smallest_active(self.encode_batch(batch.normalised(self.norm))) for batch in batches]
            if not minima:
                raise ValueError("BatchTopK: finish() needs at least one batch to measure the threshold on.")
            self.threshold.copy_(torch.stack(minima).mean())


def smallest_active(codes: Codes) -> Tensor:
    """The smallest entry > 0 of the global batch, a scalar; 0 where no entry is."""
    values = codes.values.detach()
    if isinstance(codes, SparseCodes) and values.numel():
        smallest = values.amin()  # selection keeps nothing else
    else:
        smallest = torch.cat([values.where(values > 0, torch.inf).flatten(), values.new_full((1,), torch.inf)]).amin()
    smallest = distributed.minimum(smallest)
    return smallest.where(smallest.isfinite(), 0)
