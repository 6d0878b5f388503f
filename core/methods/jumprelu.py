"""JumpReLU sparse autoencoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.batch import Normalisation
from core.kernels import sparse
from core.kernels.codes import Codes
from core.kernels.sparse import Path
from core.methods.base import DecoderNorm, DictionaryMethod, ramp
from core.methods.checks import require, require_one_of
from core.methods.sparsity import STE, jumprelu, l0_penalty, mse, window_floor


class JumpReLU(DictionaryMethod):
    """JumpReLU sparse autoencoder (Rajamanoharan et al. 2024; as trained by Bussmann et al. 2024).

    z = W_enc (x [- b_dec]) + b_enc, f = z H(z - theta), x_hat = W_dec f + b_dec
    loss = mean over entries of (x - x_hat)^2 + l0_coefficient E[sum_i H(z_i - theta_i)]
    Where the squared error is summed over coordinates instead, the same trade-off needs l0_coefficient times d_model.

    bandwidth          epsilon of the straight-through estimators; it has to be seen against the scale of z
    ste                `correct` or `r1_compat`, see `core.methods.sparsity`
    initial_threshold  theta of all latents at first
    lr_threshold       learning rate of log theta: Adam moves it by about this much per step, so a run of a few thousand
                       steps needs far more than the other parameters do
    l0_warmup_steps    the coefficient rises linearly over this many steps
    subtract_b_dec     whether the encoder sees x - b_dec
    path               `sparse`, `dense`, or `auto`: how products with codes are made; equal to rounding. `auto` counts
                       in every batch whether few enough pre-activations reach their threshold's window. With
                       `r1_compat` it is dense while a window reaches zero
    """

    def __init__(
        self,
        d_model: int,
        dict_size: int,
        l0_coefficient: float,
        l0_warmup_steps: int,
        bandwidth: float,
        ste: STE,
        initial_threshold: float,
        subtract_b_dec: bool,
        lr: float,
        lr_threshold: float,
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
        require(l0_coefficient >= 0, "l0_coefficient", l0_coefficient, "be 0 or more")
        require(l0_warmup_steps >= 0, "l0_warmup_steps", l0_warmup_steps, "be 0 or more")
        for name, value in (
            ("bandwidth", bandwidth),
            ("initial_threshold", initial_threshold),
            ("lr_threshold", lr_threshold),
        ):
            require(value > 0, name, value, "be positive")
        require_one_of(ste, "ste", STE)
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
        self.l0_coefficient, self.l0_warmup_steps = float(l0_coefficient), int(l0_warmup_steps)
        self.bandwidth, self.lr_threshold = float(bandwidth), float(lr_threshold)
        self.ste: STE = ste
        self.subtract_b_dec = bool(subtract_b_dec)
        self.path: Path = path
        self.log_threshold = nn.Parameter(torch.full((dict_size,), math.log(initial_threshold)))
        self._options |= {
            "l0_coefficient": self.l0_coefficient,
            "l0_warmup_steps": self.l0_warmup_steps,
            "bandwidth": self.bandwidth,
            "ste": ste,
            "initial_threshold": float(initial_threshold),
            "subtract_b_dec": self.subtract_b_dec,
            "lr_threshold": self.lr_threshold,
            "path": path,
        }

    @property
    def threshold(self) -> Tensor:
        """theta `[m]`."""
        return self.log_threshold.exp()

    def parameter_groups(self) -> list[dict[str, Any]]:
        others = [p for name, p in self.named_parameters() if name != "log_threshold"]
        return [{"params": others}, {"params": [self.log_threshold], "lr": self.lr_threshold}]

    def encode(self, x: Tensor) -> Codes:
        theta = self.threshold.detach()
        floor = window_floor(theta, self.bandwidth) if self.training else theta
        path: Path = self.path
        if self.training and self.ste == "r1_compat" and bool((floor < 0).any()):
            path = "dense"  # its kernel's window reaches the zeros of rectified entries
        centre = self.b_dec if self.subtract_b_dec else None
        pre = sparse.pre_activations_above(x, self.W_enc, self.b_enc, floor, centre, path)
        return jumprelu(pre, self.log_threshold, self.bandwidth, self.ste)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        coefficient = self.l0_coefficient * ramp(self.n_updates + 1, self.l0_warmup_steps)
        l0 = l0_penalty(codes, self.log_threshold, self.bandwidth, self.ste)
        return {"reconstruction": mse(x, self.decode(codes)), "l0_penalty": coefficient * l0}
