"""A dictionary with one hidden layer in its encoder (O'Neill et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from core.checked import at_least, require
from core.kernels import sparse
from core.kernels.codes import Codes
from core.kernels.mean_square import normalised_mse
from core.kernels.sparse import ProductPath
from core.methods.base import DictionaryMethod
from core.methods.decoder import initial_rows, uniform, unit_rows_
from core.methods.resampling import resample_if_due
from core.methods.settings import Settings
from core.methods.sparsity import l1_penalty
from core.metrics.flops import mlp_train_step
from core.optimizer import ClippingAdam


@dataclass(frozen=True, kw_only=True)
class MLPEncoderSettings(Settings):
    """
    hidden_per_latent  the hidden layer has h = this times dict_size units; W_hid `[h, d]`, W_enc `[m, h]`
    l1_coefficient     of the loss
    resample_every     steps between resets of dead latents, see `core.methods.resampling`; 0: never
    path               how products with codes are made, see `core.kernels.sparse.ProductPath`
    """

    hidden_per_latent: float
    l1_coefficient: float = at_least(0)
    resample_every: int = at_least(0)
    path: ProductPath

    @property
    def n_hidden(self) -> int:
        return round(self.hidden_per_latent * self.dict_size)

    def check(self) -> None:
        words = f"give a hidden unit or more for {self.dict_size} latents"
        require(self.n_hidden >= 1, self.named("hidden_per_latent"), self.hidden_per_latent, words)


class MLPEncoder(DictionaryMethod[MLPEncoderSettings]):
    """f = ReLU(W_enc ReLU(W_hid x + b_hid) + b_enc), x_hat = W_dec f + b_dec (O'Neill et al. 2025, GPT-2 section).

    loss = mean square of x - x_hat over that of predicting the batch's mean + l1_coefficient E[sum_i f_i]

    Initialisation: encoder weights uniform between -+ 1 / sqrt(fan-in) (torch's `Linear`, as in the authors' code),
    biases zero, W_dec random rows of unit norm.
    """

    def declare_weights(self) -> None:
        s = self.settings
        m, d, h = s.dict_size, s.d_model, s.n_hidden
        self.W_enc = nn.Parameter(uniform(h**-0.5, s.seed, "W_enc", shape=(m, h)))
        self.W_dec = nn.Parameter(unit_rows_(initial_rows(s)))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(d))
        self.W_hid = nn.Parameter(uniform(d**-0.5, s.seed, "W_hid", shape=(h, d)))
        self.b_hid = nn.Parameter(torch.zeros(h))

    def encode(self, x: Tensor) -> Codes:
        hidden = linear(x, self.W_hid, self.b_hid).relu()  # [B, h]
        return sparse.encode_relu(hidden, self.W_enc, self.b_enc, None, self.settings.path)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        l1 = self.settings.l1_coefficient * l1_penalty(codes)
        return {"reconstruction": normalised_mse(x, self.decode(codes)), "l1": l1}

    def after_step(self, optimizer: ClippingAdam) -> None:
        resample_if_due(self, self.W_enc, self.b_enc, optimizer, self.settings.resample_every, like_decoder=False)

    def train_step_flops(self, batch_size: int) -> float:
        s = self.settings
        return mlp_train_step(s.dict_size, s.d_model, s.n_hidden, batch_size, True, "corrected", bias=True)
