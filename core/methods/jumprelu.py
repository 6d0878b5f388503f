"""JumpReLU sparse autoencoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.checked import at_least, positive
from core.kernels import sparse
from core.kernels.codes import Codes
from core.kernels.mean_square import mse
from core.kernels.sparse import ProductPath
from core.methods.base import DictionaryMethod, ramp
from core.methods.decoder import initial_weights
from core.methods.dictionary import Inference
from core.methods.settings import Settings
from core.methods.sparsity import STE, jumprelu, l0_penalty, window_floor


@dataclass(frozen=True, kw_only=True)
class JumpReLUSettings(Settings):
    """
    l0_coefficient     where others sum the squared error over coordinates, the same trade-off needs this times d_model
    l0_warmup_steps    the coefficient rises linearly over this many steps
    bandwidth          epsilon of the straight-through estimators; it has to be seen against the scale of z
    ste                `correct` or `r1_compat`, see `core.methods.sparsity`
    initial_threshold  theta of all latents at first
    subtract_b_dec     whether the encoder sees x - b_dec
    lr_threshold       learning rate of log theta: Adam moves it by about this much per step, so a run of a few thousand
                       steps needs far more than the other parameters do
    path               how products with codes are made, see `core.kernels.sparse.ProductPath`; always dense while a
                       window reaches zero with `r1_compat`
    """

    l0_coefficient: float = at_least(0)
    l0_warmup_steps: int = at_least(0)
    bandwidth: float = positive()
    ste: STE
    initial_threshold: float = positive()
    subtract_b_dec: bool
    lr_threshold: float = positive()
    path: ProductPath


class JumpReLU(DictionaryMethod[JumpReLUSettings]):
    """JumpReLU sparse autoencoder (Rajamanoharan et al. 2024; as trained by Bussmann et al. 2024).

    z = W_enc (x [- b_dec]) + b_enc, f = z H(z - theta), x_hat = W_dec f + b_dec
    loss = mean over entries of (x - x_hat)^2 + l0_coefficient E[sum_i H(z_i - theta_i)]
    """

    def declare_weights(self) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = initial_weights(self.settings)
        self.log_threshold = nn.Parameter(torch.full_like(self.b_enc, math.log(self.settings.initial_threshold)))

    @property
    def threshold(self) -> Tensor:
        """theta `[m]`."""
        return self.log_threshold.exp()

    def parameter_groups(self) -> list[dict[str, Any]]:
        others = [p for name, p in self.named_parameters() if name != "log_threshold"]
        return [{"params": others}, {"params": [self.log_threshold], "lr": self.settings.lr_threshold}]

    def encode(self, x: Tensor) -> Codes:
        s, theta = self.settings, self.threshold.detach()
        floor, path = window_floor(theta, s.bandwidth) if self.training else theta, s.path
        if self.training and s.ste == "r1_compat" and bool((floor < 0).any()):
            path = "dense"  # its kernel's window reaches the zeros of rectified entries
        centre = self.b_dec if s.subtract_b_dec else None
        pre = sparse.pre_activations_above(x, self.W_enc, self.b_enc, floor, centre, path)
        return jumprelu(pre, self.log_threshold, s.bandwidth, s.ste)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        s = self.settings
        coefficient = s.l0_coefficient * ramp(self.n_updates + 1, s.l0_warmup_steps)
        l0 = l0_penalty(codes, self.log_threshold, s.bandwidth, s.ste)
        return {"reconstruction": mse(x, self.decode(codes)), "l0_penalty": coefficient * l0}

    def inference_rule(self) -> Inference:
        return Inference(self.W_enc, self.b_enc, "jumprelu", self.settings.subtract_b_dec, self.threshold)
