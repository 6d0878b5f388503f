"""The ReLU dictionary with an L1 penalty: the family that Leask et al. 2025 stitch; the SAE of O'Neill et al. 2025."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from core.batch import Normalisation
from core.kernels import sparse
from core.kernels.codes import Codes, DenseCodes
from core.kernels.sparse import Path
from core.methods.base import DecoderNorm, DictionaryMethod, ramp
from core.methods.checks import require, require_one_of
from core.methods.optimizer import ClippingAdam
from core.methods.resampling import is_due, resample_dead
from core.methods.sparsity import l1_penalty, normalised_mse

BDecInit = Literal["zero", "geometric_median"]
Reconstruction = Literal["squared_error", "normalised_mse"]


class ReluL1(DictionaryMethod):
    """f = ReLU(W_enc (x [- b_dec]) + b_enc), x_hat = W_dec f + b_dec; loss = error + l1_coefficient E[sum_i f_i].

    reconstruction   what the error is. `squared_error`: E|x - x_hat|^2, summed over coordinates (Leask et al. 2025, the
                     ReLU family), unlike in the k-sparse methods; `normalised_mse`: the mean square over that of
                     predicting the batch's mean (O'Neill et al. 2025, authors' code)
    subtract_b_dec   whether the encoder sees x - b_dec (not in O'Neill et al.)
    resample_every   dead latents start anew every so many steps, see `core.methods.resampling`; 0: never
    l1_warmup_steps  the coefficient rises linearly over this many steps
    b_dec_init       `geometric_median`: b_dec starts at the geometric median of the first batch
    path             `sparse`, `dense`, or `auto` (by the share of positive entries in every batch): how products with
                     codes are made; equal to rounding
    """

    def __init__(
        self,
        d_model: int,
        dict_size: int,
        l1_coefficient: float,
        l1_warmup_steps: int,
        reconstruction: Reconstruction,
        subtract_b_dec: bool,
        b_dec_init: BDecInit,
        resample_every: int,
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
        require(l1_coefficient >= 0, "l1_coefficient", l1_coefficient, "be 0 or more")
        require(l1_warmup_steps >= 0, "l1_warmup_steps", l1_warmup_steps, "be 0 or more")
        require(resample_every >= 0, "resample_every", resample_every, "be 0 or more")
        require_one_of(reconstruction, "reconstruction", Reconstruction)
        require_one_of(b_dec_init, "b_dec_init", BDecInit)
        require_one_of(path, "path", Path)
        self.l1_coefficient, self.l1_warmup_steps = float(l1_coefficient), int(l1_warmup_steps)
        self.reconstruction: Reconstruction = reconstruction
        self.subtract_b_dec, self.resample_every = bool(subtract_b_dec), int(resample_every)
        self.b_dec_init: BDecInit = b_dec_init
        self.path: Path = path
        self._options |= {
            "l1_coefficient": self.l1_coefficient,
            "l1_warmup_steps": self.l1_warmup_steps,
            "reconstruction": reconstruction,
            "subtract_b_dec": self.subtract_b_dec,
            "b_dec_init": b_dec_init,
            "resample_every": self.resample_every,
            "path": path,
        }

    def start(self, x: Tensor) -> None:
        if self.b_dec_init == "geometric_median":
            self.b_dec.data.copy_(geometric_median(x))

    def encode(self, x: Tensor) -> Codes:
        zero = x.new_zeros(())
        centre = self.b_dec if self.subtract_b_dec else None
        pre = sparse.pre_activations_above(x, self.W_enc, self.b_enc, zero, centre, self.path)
        return DenseCodes(pre.values.relu()) if isinstance(pre, DenseCodes) else pre

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        l1 = self.l1_coefficient * ramp(self.n_updates + 1, self.l1_warmup_steps)
        x_hat = self.decode(codes)
        normalised = self.reconstruction == "normalised_mse"
        error = normalised_mse(x, x_hat) if normalised else (x - x_hat).square().sum(1).mean()
        return {"reconstruction": error, "l1": l1 * l1_penalty(codes)}

    def after_step(self, optimizer: ClippingAdam) -> None:
        if is_due(self.n_updates, self.resample_every):
            resample_dead(self, optimizer, encoder_like_decoder=True)


@torch.no_grad()
def geometric_median(x: Tensor, n_iterations: int = 50) -> Tensor:
    """The point `[d]` whose distances to the rows of `[N, d]` have the smallest sum, by Weiszfeld's iteration from the
    mean; approximate."""
    median = x.mean(0)
    for _ in range(n_iterations):
        weights = 1 / (x - median).norm(dim=1).clamp(min=1e-6)
        median = (weights @ x) / weights.sum()
    return median
