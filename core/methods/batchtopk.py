"""BatchTopK sparse autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from core import distributed
from core.batch import Batch, Normalisation
from core.kernels import sparse
from core.kernels.codes import Codes, SparseCodes
from core.kernels.sparse import Path
from core.methods.auxiliary import Aux, aux_loss
from core.methods.base import DecoderNorm, DictionaryMethod
from core.methods.checks import require, require_k, require_one_of
from core.methods.sparsity import mse

ThresholdRule = Literal["posthoc_mean", "ema"]


class BatchTopK(DictionaryMethod):
    """BatchTopK sparse autoencoder (Bussmann et al. 2024; used by Leask et al. 2025).

    z = ReLU(W_enc (x - b_dec) [+ b_enc]); f keeps the B k largest entries of z `[B, m]`; x_hat = W_dec f + b_dec
    loss = mean over entries of (x - x_hat)^2 + aux_coefficient L_aux
    In inference f = z 1[z > threshold], one threshold for all latents, so a row's code does not depend on its batch.

    k                   active latents per row, on average over the batch
    threshold_rule      `posthoc_mean`: the mean, over batches given to `finish`, of the smallest entry kept (the
                        paper's); `ema`: its exponential moving average over training steps
    threshold_ema_rate  weight of the newest step in that average, which is always kept (`threshold_ema`) for comparison
    The other arguments are those of `core.methods.topk.TopK`.
    """

    threshold: Tensor
    threshold_ema: Tensor

    def __init__(
        self,
        d_model: int,
        dict_size: int,
        k: int,
        use_enc_bias: bool,
        threshold_rule: ThresholdRule,
        threshold_ema_rate: float,
        aux: Aux,
        aux_coefficient: float,
        k_aux: int,
        lr: float,
        betas: Sequence[float],
        input_norm: Normalisation,
        seed: int,
        decoder_norm: DecoderNorm,
        dead_after_tokens: int,
        grad_clip: float,
        warmup_steps: int,
        decay_fraction: float,
        path: Path,
    ) -> None:
        require_k(k, dict_size)
        require(k_aux >= 1, "k_aux", k_aux, "be at least 1")
        require(aux_coefficient >= 0, "aux_coefficient", aux_coefficient, "be 0 or more")
        require(0 < threshold_ema_rate <= 1, "threshold_ema_rate", threshold_ema_rate, "lie in (0, 1]")
        require_one_of(threshold_rule, "threshold_rule", ThresholdRule)
        require_one_of(aux, "aux", Aux)
        require_one_of(path, "path", Path)
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
        self.k, self.k_aux, self.aux_coefficient = int(k), int(k_aux), float(aux_coefficient)
        self.threshold_rule: ThresholdRule = threshold_rule
        self.threshold_ema_rate = float(threshold_ema_rate)
        self.aux: Aux = aux
        self.path: Path = path
        self.b_enc.requires_grad_(use_enc_bias)
        self.register_buffer("threshold", torch.tensor(torch.nan))  # NaN: not measured yet
        self.register_buffer("threshold_ema", torch.tensor(torch.nan))
        self._options |= {
            "k": self.k,
            "use_enc_bias": bool(use_enc_bias),
            "threshold_rule": threshold_rule,
            "threshold_ema_rate": self.threshold_ema_rate,
            "aux": aux,
            "aux_coefficient": self.aux_coefficient,
            "k_aux": self.k_aux,
            "path": path,
        }

    @property
    def bias(self) -> Tensor | None:
        """b_enc, where it takes part."""
        return self.b_enc if self._options["use_enc_bias"] else None

    def encode(self, x: Tensor) -> Codes:
        return self.encode_batch(x) if self.training else self.encode_rows(x)

    def encode_batch(self, x: Tensor) -> Codes:
        """The training rule: codes of a row depend on its batch."""
        return sparse.encode_batchtopk(x, self.W_enc, self.bias, self.k, centre=self.b_dec, path=self.path)

    def encode_rows(self, x: Tensor) -> SparseCodes:
        """The rule of inference."""
        if self.threshold.isnan():
            raise RuntimeError("BatchTopK: the inference threshold is not measured yet; call finish(batches) first.")
        return sparse.encode_threshold(x, self.W_enc, self.bias, self.threshold, centre=self.b_dec)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        x_hat = self.decode(codes)
        aux = aux_loss(self.aux, x, x_hat, self.dead, self.k_aux, self.W_enc, self.bias, self.b_dec, self.W_dec)
        return {"reconstruction": mse(x, x_hat), "aux": self.aux_coefficient * aux}

    @torch.no_grad()
    def observe(self, codes: Codes) -> None:
        super().observe(codes)
        newest = smallest_active(codes)
        moved = self.threshold_ema.lerp(newest, self.threshold_ema_rate)
        self.threshold_ema.copy_(newest.where(self.threshold_ema.isnan(), moved))
        if self.threshold_rule == "ema":
            self.threshold.copy_(self.threshold_ema)

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> None:
        if self.threshold_rule == "posthoc_mean":
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
