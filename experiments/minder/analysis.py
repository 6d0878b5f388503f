"""What the analyses of a trained crosscoder share: its activations on training and held-out tokens, and its latents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis.latent_scaling import LatentScaling
from core.analysis.latent_use import LatentUse, kinds_of
from core.analysis.specificity import Specificity, latent_table
from core.batch import Batch
from core.kernels.codes import Codes
from core.methods.crosscoder import latent_sizes, scaled
from core.methods.dictionary import Dictionary
from core.metrics.crosscoder import CLASSES, in_class, relative_norm
from core.notices import say_once
from core.runtime import Runtime
from core.text.chat import is_role
from experiments.common import once_per, source
from experiments.minder.common import HELD_OUT, crosscoder


@once_per(*HELD_OUT, "stream", "scaling.n_tokens")
def _kept(cfg: DictConfig) -> list[Batch]:
    return list(_training(cfg))


def training_batches(cfg: DictConfig) -> Iterable[Batch]:
    """The first `scaling.n_tokens` tokens of the training, in its order; in memory for all cells, if
    `evaluation.keep_activations` is true."""
    return _kept(cfg) if cfg.evaluation.keep_activations else _training(cfg)


def _training(cfg: DictConfig) -> Iterable[Batch]:
    paired = source(cfg)
    return islice(paired.open(Runtime.of(cfg)), -(-cfg.scaling.n_tokens // paired.batch_size))


@dataclass(frozen=True, eq=False)
class Trained:
    """A crosscoder with the sizes of its decoders, `[m]`: an activation is v = f times the size (sum of norms)."""

    crosscoder: Dictionary
    sizes: Tensor

    @classmethod
    def of(cls, crosscoder: Dictionary) -> Trained:
        return cls(crosscoder.eval(), latent_sizes(crosscoder.W_dec.detach(), "sum"))

    @property
    def decoder(self) -> Tensor:
        """W_dec `[m, 2, d]`."""
        return self.crosscoder.W_dec.detach()

    @torch.no_grad()
    def codes(self, batch: Batch) -> tuple[Tensor, Codes]:
        """Normalised activations `[B, 2, d]` and f."""
        x = batch.normalised(self.crosscoder.norm)
        return x, self.crosscoder.encode(x)

    def v(self, codes: Codes) -> Codes:
        return scaled(codes, self.sizes)

    def scaling(self, batches: Iterable[Batch]) -> LatentScaling:
        sums = LatentScaling(self.crosscoder)
        for batch in batches:
            sums.add(*self.codes(batch))
        return sums

    def use(self, batches: Iterable[Batch]) -> LatentUse:
        use = LatentUse(self.crosscoder.dict_size)
        for batch in batches:
            use.add(self.v(self.codes(batch)[1]), kinds(batch))
        return use


def the_crosscoder(cfg: DictConfig) -> Trained:
    return Trained.of(crosscoder(cfg))


def kinds(batch: Batch) -> Tensor:
    """`[B]`, places in `core.analysis.latent_use.KINDS`."""
    return kinds_of(is_role(batch.truth["roles"], "template"), batch.truth["is_chat"])


def specificity(cfg: DictConfig, table: pd.DataFrame) -> Specificity:
    """The compared latents by `scaling.effective` and `scaling.n_effective`. Says so where the class chat-only is
    empty."""
    found = Specificity.of(table, cfg.scaling.n_effective, cfg.scaling.effective == "class")
    if found.is_ranked and cfg.scaling.effective == "class":
        say_once(
            "scaling.effective=class: no latent is chat-only (Delta_norm >= 0.9), so those with the highest Delta_norm "
            f"are compared instead ({int(found.effective.sum())})."
        )
    return found


def measured_latents(cfg: DictConfig, trained: Trained) -> Specificity:
    """Latent Scaling on training tokens, as in the paper."""
    return specificity(cfg, latent_table(trained.decoder, trained.scaling(training_batches(cfg))))


def by_norm_alone(cfg: DictConfig, trained: Trained, n_active: np.ndarray) -> Specificity:
    """The compared latents, where ratios are not needed."""
    delta = relative_norm(trained.decoder).cpu()
    table = pd.DataFrame({"delta": delta.numpy(), "class": "other", "n_active": n_active})
    for name in CLASSES:
        table.loc[in_class(delta, name).numpy(), "class"] = name
    return specificity(cfg, table)
