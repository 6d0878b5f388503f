"""A dictionary with one hidden layer in its encoder (O'Neill et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from core.batch import Normalisation
from core.kernels import sparse
from core.kernels.codes import Codes, DenseCodes
from core.kernels.sparse import Path
from core.methods.base import DecoderNorm, DictionaryMethod
from core.methods.checks import require, require_one_of
from core.methods.optimizer import ClippingAdam
from core.methods.resampling import is_due, resample_dead
from core.methods.sparsity import l1_penalty, normalised_mse
from core.seeding import generator


class MLPEncoder(DictionaryMethod):
    """f = ReLU(W_enc ReLU(W_hid x + b_hid) + b_enc), x_hat = W_dec f + b_dec (O'Neill et al. 2025, GPT-2 section).

    loss = mean square of x - x_hat over that of predicting the batch's mean + l1_coefficient E[sum_i f_i]

    hidden_per_latent  the hidden layer has h = this times dict_size units; W_hid `[h, d]`, W_enc `[m, h]`
    resample_every     dead latents start anew every so many steps, see `core.methods.resampling`; 0: never
    path               `sparse`, `dense`, or `auto` (by the share of positive entries in every batch): how products with
                       codes are made; equal to rounding

    Initialisation: encoder weights uniform between -+ 1 / sqrt(fan-in) (torch's `Linear`, as in the authors' code),
    biases zero, W_dec random rows of unit norm.
    """

    def __init__(
        self,
        d_model: int,
        dict_size: int,
        hidden_per_latent: float,
        l1_coefficient: float,
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
        require(resample_every >= 0, "resample_every", resample_every, "be 0 or more")
        require_one_of(path, "path", Path)
        h = round(hidden_per_latent * dict_size)
        require(h >= 1, "hidden_per_latent", hidden_per_latent, f"give a hidden unit or more for {dict_size} latents")
        self.l1_coefficient, self.resample_every = float(l1_coefficient), int(resample_every)
        self.path: Path = path
        self.W_hid = nn.Parameter(_uniform(h, d_model, seed, "W_hid"))
        self.b_hid = nn.Parameter(torch.zeros(h))
        self.W_enc = nn.Parameter(_uniform(dict_size, h, seed, "W_enc"))
        self._options |= {
            "hidden_per_latent": float(hidden_per_latent),
            "l1_coefficient": self.l1_coefficient,
            "resample_every": self.resample_every,
            "path": path,
        }

    def encode(self, x: Tensor) -> Codes:
        hidden = linear(x, self.W_hid, self.b_hid).relu()  # [B, h]
        zero = x.new_zeros(())
        pre = sparse.pre_activations_above(hidden, self.W_enc, self.b_enc, zero, path=self.path)
        return DenseCodes(pre.values.relu()) if isinstance(pre, DenseCodes) else pre

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        return {
            "reconstruction": normalised_mse(x, self.decode(codes)),
            "l1": self.l1_coefficient * l1_penalty(codes),
        }

    def after_step(self, optimizer: ClippingAdam) -> None:
        if is_due(self.n_updates, self.resample_every):
            resample_dead(self, optimizer, encoder_like_decoder=False)


def _uniform(fan_out: int, fan_in: int, seed: int, name: str) -> Tensor:
    """`[fan_out, fan_in]`, uniform between -+ 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    random = generator(seed, "init", name, fan_out, fan_in)
    return torch.rand(fan_out, fan_in, generator=random).mul_(2 * bound).sub_(bound)
