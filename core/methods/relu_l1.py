"""The ReLU dictionary with an L1 penalty: the family that Leask et al. 2025 stitch; the SAE of O'Neill et al. 2025."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from core.checked import at_least
from core.kernels import sparse
from core.kernels.codes import Codes
from core.kernels.mean_square import normalised_mse
from core.kernels.sparse import ProductPath
from core.methods.base import DictionaryMethod, ramp
from core.methods.decoder import initial_weights
from core.methods.dictionary import Inference
from core.methods.resampling import resample_if_due
from core.methods.settings import Settings
from core.methods.sparsity import l1_penalty
from core.metrics.flops import sae_train_step
from core.optimizer import ClippingAdam

Reconstruction = Literal["squared_error", "normalised_mse"]


@dataclass(frozen=True, kw_only=True)
class ReluL1Settings(Settings):
    """
    l1_coefficient   of the loss
    l1_warmup_steps  the coefficient rises linearly over this many steps
    reconstruction   what the error is. `squared_error`: E|x - x_hat|^2, summed over coordinates (Leask et al. 2025, the
                     ReLU family), unlike in the k-sparse methods; `normalised_mse`: the mean square over that of
                     predicting the batch's mean (O'Neill et al. 2025, authors' code)
    subtract_b_dec   whether the encoder sees x - b_dec (not in O'Neill et al.)
    resample_every   steps between resets of dead latents, see `core.methods.resampling`; 0: never
    path             how products with codes are made, see `core.kernels.sparse.ProductPath`
    """

    l1_coefficient: float = at_least(0)
    l1_warmup_steps: int = at_least(0)
    reconstruction: Reconstruction
    subtract_b_dec: bool
    resample_every: int = at_least(0)
    path: ProductPath


class ReluL1(DictionaryMethod[ReluL1Settings]):
    """f = ReLU(W_enc (x [- b_dec]) + b_enc), x_hat = W_dec f + b_dec; loss = error + l1_coefficient E[sum_i f_i]."""

    def declare_weights(self) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = initial_weights(self.settings)

    def encode(self, x: Tensor) -> Codes:
        centre = self.b_dec if self.settings.subtract_b_dec else None
        return sparse.encode_relu(x, self.W_enc, self.b_enc, centre, self.settings.path)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        s, x_hat = self.settings, self.decode(codes)
        l1 = s.l1_coefficient * ramp(self.n_updates + 1, s.l1_warmup_steps)
        normalised = s.reconstruction == "normalised_mse"
        error = normalised_mse(x, x_hat) if normalised else (x - x_hat).square().sum(1).mean()
        return {"reconstruction": error, "l1": l1 * l1_penalty(codes)}

    def after_step(self, optimizer: ClippingAdam) -> None:
        resample_if_due(self, self.W_enc, self.b_enc, optimizer, self.settings.resample_every, like_decoder=True)

    def inference_rule(self) -> Inference:
        return Inference(self.W_enc, self.b_enc, "relu", self.settings.subtract_b_dec)

    def train_step_flops(self, batch_size: int) -> float:
        return sae_train_step(self.dict_size, self.d_model, batch_size, True, "corrected", bias=True)
