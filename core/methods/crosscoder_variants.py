"""Crosscoders that are told more about what to look for: the difference itself, latents of one model, shared latents.

  BridgeCrosscoder     between a crosscoder of two models and a dictionary of their difference
  DedicatedCrosscoder  blocks of latents that one model alone has (arXiv 2602.11729)
  TiedCrosscoder       shared latents with one decoder for both models and a smaller penalty (an update by the authors
                       of crosscoders, February 2025)

Shapes: B rows in the batch, M = 2 models (0 base, 1 chat), d = d_model, m = dict_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from core.checked import at_least, between
from core.errors import UserError
from core.kernels.codes import Codes
from core.methods.base import ramp
from core.methods.crosscoder import (
    BatchTopKCrosscoder,
    BatchTopKCrosscoderSettings,
    CrosscoderSettings,
    L1Crosscoder,
    L1CrosscoderSettings,
    error_of,
    latent_sizes,
    scaled,
)
from core.methods.settings import Settings


@dataclass(frozen=True, kw_only=True)
class BridgeSettings(BatchTopKCrosscoderSettings):
    """
    bridge  lambda: the squared error of a row is |e_base|^2 + |e_chat|^2 + 2 lambda <e_base, e_chat>, over 2. 0: a
            crosscoder; -1: |e_chat - e_base|^2, so that only the difference of the models is reconstructed
    """

    bridge: float = between(-1, 1)

    def check(self) -> None:
        super().check()
        require_two(self)
        if self.error != "squared":
            raise UserError(f"method.error: {self.error!r} will not do with method.bridge; set it to squared.")


@dataclass(frozen=True, kw_only=True)
class DedicatedSettings(BatchTopKCrosscoderSettings):
    """
    base_share, chat_share  of the latents, those that read and write one model alone: the first ones the base model,
                            the next ones the chat model. All others are shared
    """

    base_share: float = between(0, 1)
    chat_share: float = between(0, 1)

    def check(self) -> None:
        super().check()
        require_two(self)
        if self.base_share + self.chat_share > 1:
            raise UserError(
                f"method.base_share + method.chat_share: {self.base_share:g} + {self.chat_share:g} is more than 1."
            )

    @property
    def n_of_one_model(self) -> tuple[int, int]:
        return round(self.base_share * self.dict_size), round(self.chat_share * self.dict_size)


@dataclass(frozen=True, kw_only=True)
class TiedSettings(L1CrosscoderSettings):
    """
    tied_share    of the latents, the first ones: their decoder is the same in both models
    tied_penalty  what l1_coefficient is multiplied with for them; below 1, what can be shared is
    """

    tied_share: float = between(0, 1)
    tied_penalty: float = at_least(0)

    def check(self) -> None:
        super().check()
        require_two(self)

    @property
    def n_tied(self) -> int:
        return round(self.tied_share * self.dict_size)


def require_two(s: CrosscoderSettings) -> None:
    if s.n_models != 2:
        raise UserError(f"method.n_models: this crosscoder compares 2 models, not {s.n_models}.")


class BridgeCrosscoder(BatchTopKCrosscoder):
    """A BatchTopK crosscoder whose error leans towards the difference of the models; L_aux leans with it."""

    settings_class: ClassVar[type[Settings]] = BridgeSettings

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        x_hat = self.decode(codes)
        aux = self.settings.aux_coefficient * self.aux_loss(x, x_hat)
        return {"reconstruction": self.square(x - x_hat).mean() / 2, "aux": aux}

    def square(self, e: Tensor) -> Tensor:
        across = (e[:, 0] * e[:, 1]).sum(1)
        return super().square(e) + 2 * cast(BridgeSettings, self.settings).bridge * across


class DedicatedCrosscoder(BatchTopKCrosscoder):
    """A BatchTopK crosscoder with blocks of latents that the other model has no weights for."""

    settings_class: ClassVar[type[Settings]] = DedicatedSettings

    def declare_weights(self) -> None:
        super().declare_weights()
        mask = self.mask()
        for W in (self.W_enc, self.W_dec):
            W.data.mul_(mask)
            W.register_hook(lambda gradient: gradient * mask.to(gradient.device))

    def mask(self) -> Tensor:
        """`[m, 2, 1]`: 0 where a latent has no weights."""
        n_base, n_chat = cast(DedicatedSettings, self.settings).n_of_one_model
        mask = torch.ones(self.settings.dict_size, 2, 1)
        mask[:n_base, 1] = 0
        mask[n_base : n_base + n_chat, 0] = 0
        return mask


class TiedCrosscoder(L1Crosscoder):
    """An L1 crosscoder, some of whose latents have one decoder for both models: its gradient is the sum of both."""

    settings_class: ClassVar[type[Settings]] = TiedSettings
    W_dec: nn.Parameter

    def declare_weights(self) -> None:
        super().declare_weights()  # all models start with the same rows
        n = cast(TiedSettings, self.settings).n_tied

        def summed(gradient: Tensor) -> Tensor:
            total = gradient[:n].sum(1, keepdim=True).expand(-1, 2, -1)
            return torch.cat([total, gradient[n:]])

        self.W_dec.register_hook(summed)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        s = cast(TiedSettings, self.settings)
        mu = s.l1_coefficient * ramp(self.n_updates + 1, s.l1_warmup_steps)
        sizes = latent_sizes(self.W_dec, s.code_norm)
        weights = torch.cat([sizes[: s.n_tied] * s.tied_penalty, sizes[s.n_tied :]])
        penalty = mu * scaled(codes, weights).values.sum() / len(x)
        return {"reconstruction": error_of(x, self.decode(codes), s.error), "l1": penalty}
