"""What every dictionary-learning method is: parameters, one complete optimiser step, and what Lightning calls.

A Lightning step covers a chunk of many optimiser steps, so that the framework's cost per step is shared by all of them
and the device is waited for once per chunk (to see whether the loss is finite).

Shapes: B rows in the batch, d = d_model, m = dict_size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from core import distributed
from core.batch import Batch, InputNorm, Normalisation
from core.errors import NonFiniteLoss, UserError
from core.kernels import sparse
from core.kernels.codes import Codes
from core.kernels.device import products_in_bf16
from core.methods.checks import require, require_one_of
from core.methods.decoder import project_gradient, unit_columns_, unit_rows_
from core.methods.optimizer import ClippingAdam
from core.seeding import generator

DecoderNorm = Literal["before_step", "after_step", "rows_compat", "none"]


class DictionaryMethod(pl.LightningModule, ABC):
    """A dictionary of m directions in R^d with an encoder that says which of them make up an input.

    d_model            width d of the activations
    dict_size          number m of latents
    lr, betas          of Adam (eps 1e-8, no weight decay)
    input_norm         how activations are normalised first (`core.batch.InputNorm`); losses are in that space.
                       `scalar` is measured on the first batch
    seed               of the initialisation, which depends on the shape as well: sizes share no rows
    decoder_norm       keep decoder rows at unit norm, with the gradient's part along them removed: rescaled before the
                       optimiser's step (then saved rows are off by O(lr), as in the BatchTopK authors' code) or after.
                       `rows_compat`: instead the columns of W_dec, one for each coordinate, get unit norm after the
                       step, and the gradient is left whole. This is the axis slip of O'Neill et al.'s GPT-2 code, which
                       normalised the rows of a [d, m] matrix: atoms then have a norm of about sqrt(d / m)
    dead_after_tokens  a latent is dead when it has not fired for this many tokens
    grad_clip          largest norm of the whole gradient
    warmup_steps       the learning rate rises linearly over this many steps
    decay_fraction     and falls linearly to zero over this last part of `n_steps`, which whoever trains must then set

    Initialisation (Bussmann et al. 2024, authors' code): W_enc uniform with variance 2 / m (Kaiming with fan-in m), so
    that a latent's encoder has norm about sqrt(2 d / m); W_dec the same rows at unit norm; biases zero.
    Parameters, moments and thresholds are fp32 always.
    """

    version: ClassVar[int] = 1

    def __init__(
        self,
        d_model: int,
        dict_size: int,
        lr: float,
        betas: Sequence[float],
        input_norm: Normalisation,
        seed: int,
        decoder_norm: DecoderNorm,
        dead_after_tokens: int,
        grad_clip: float,
        warmup_steps: int,
        decay_fraction: float,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "d_model": int(d_model),
            "dict_size": int(dict_size),
            "lr": float(lr),
            "betas": [float(beta) for beta in betas],
            "input_norm": input_norm,
            "seed": int(seed),
            "decoder_norm": decoder_norm,
            "dead_after_tokens": int(dead_after_tokens),
            "grad_clip": float(grad_clip),
            "warmup_steps": int(warmup_steps),
            "decay_fraction": float(decay_fraction),
        }
        for name in ("d_model", "dict_size", "lr", "dead_after_tokens", "grad_clip"):
            require(self._options[name] > 0, name, self._options[name], "be positive")
        require(warmup_steps >= 0, "warmup_steps", warmup_steps, "be 0 or more")
        require(0 <= decay_fraction <= 1, "decay_fraction", decay_fraction, "lie between 0 and 1")
        require_one_of(decoder_norm, "decoder_norm", DecoderNorm)
        require_one_of(input_norm, "input_norm", Normalisation)

        self.automatic_optimization = False
        self.d_model, self.dict_size = int(d_model), int(dict_size)
        self.decoder_norm: DecoderNorm = decoder_norm
        self.n_steps: int | None = None  # optimiser steps of the whole training
        self.n_updates = 0  # optimiser steps made so far
        self.norm = InputNorm(input_norm)

        bound = math.sqrt(6 / dict_size)
        random = generator(seed, "init", int(dict_size), int(d_model))
        W = torch.rand(dict_size, d_model, generator=random).mul_(2 * bound).sub_(bound)
        self.W_enc = nn.Parameter(W)
        self.W_dec = nn.Parameter(unit_rows_(W.clone()))
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.tokens_since_fired: Tensor
        self.register_buffer("tokens_since_fired", torch.zeros(dict_size, dtype=torch.int64))

    # ---- what a method says

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Normalised activations `[B, d]` -> codes `[B, m]`: by the training rule in training mode, else by the rule of
        inference. Changes no state."""

    @abstractmethod
    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        """The terms whose sum is minimised, as scalars, from normalised activations and their codes."""

    def start(self, x: Tensor) -> None:
        """Called once, before the first step, with the first batch of normalised activations `[B, d]`."""

    def observe(self, codes: Codes) -> None:
        """Called in every training step, before the losses: counts how long every latent has not fired."""
        self.tokens_since_fired += codes.shape[0] * distributed.n_ranks()
        self.tokens_since_fired.masked_fill_(distributed.anywhere(codes.fired()), 0)

    def after_step(self, optimizer: ClippingAdam) -> None:
        """Called after every optimiser step, once `n_updates` counts it and the decoder is rescaled."""

    def finish(self, batches: Iterable[Batch]) -> None:
        """Called once, after training, with batches of the training size: what inference needs is measured here."""

    # ---- what it can do then

    def decode(self, codes: Codes) -> Tensor:
        """codes `[B, m]` -> x_hat `[B, d]`, in normalised space."""
        return sparse.decode(codes, self.W_dec) + self.b_dec

    def loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """{name: scalar} for a batch; changes no state."""
        x = batch.normalised(self.norm)
        return self.losses(x, self.encode(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw activations `[..., d]` -> their reconstruction, in the same dtype."""
        normalised, shift = self.norm(x.reshape(-1, x.shape[-1]))
        x_hat = self.norm.undo(self.decode(self.encode(normalised)), shift)
        return x_hat.view(x.shape).to(x.dtype)

    @property
    def dead(self) -> Tensor:
        """bool `[m]`."""
        return self.tokens_since_fired >= self._options["dead_after_tokens"]

    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments, fit for JSON: `type(m)(**m.hyperparameters())` is `m` before training."""
        return dict(self._options)

    # ---- training

    def configure_optimizers(self) -> ClippingAdam:
        o = self._options
        return ClippingAdam(self.parameter_groups(), o["lr"], o["betas"], max_norm=o["grad_clip"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser; one with an `lr` of its own keeps it, scaled by the schedule."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def update(
        self, batch: Batch, optimizer: ClippingAdam, step: Callable[[], object] | None = None
    ) -> dict[str, Tensor]:
        """One complete optimiser step. Returns `loss`, its terms, `l0`, `n_dead` and `grad_norm` as detached scalars on
        the device. A step whose gradient is not finite leaves parameters as they were. `step` is called in the place of
        `optimizer.step`."""
        if self.W_dec.dtype != torch.float32:
            raise UserError(f"trainer.precision: parameters must stay in fp32, not {self.W_dec.dtype}; use 32-true.")
        kind = self.W_dec.device.type
        with products_in_bf16(torch.is_autocast_enabled(kind)), torch.autocast(kind, enabled=False):
            if self.n_updates == 0:
                first = distributed.all_rows(batch.x)
                self.norm.fit(first)
                self.start(self.norm(first)[0])
            x = batch.normalised(self.norm)
            codes = self.encode(x)
            self.observe(codes)
            terms = self.losses(x, codes)
            loss = torch.stack(list(terms.values())).sum()
            for parameter in self.parameters():
                parameter.grad = None
            loss.backward()
            distributed.mean_gradients_(self.parameters())
        if self.decoder_norm in ("before_step", "after_step") and self.W_dec.grad is not None:
            project_gradient(self.W_dec.grad, self.W_dec)
        if self.decoder_norm == "before_step":
            unit_rows_(self.W_dec)
        grad_norm = optimizer.prepare(self.lr_factor())
        (step or optimizer.step)()
        if self.decoder_norm == "after_step":
            unit_rows_(self.W_dec)
        elif self.decoder_norm == "rows_compat":
            unit_columns_(self.W_dec)
        self.n_updates += 1
        scalars = {"loss": loss, **terms, "l0": codes.l0(), "n_dead": self.dead.sum().float()}
        self.after_step(optimizer)
        return {name: value.detach() for name, value in scalars.items()} | {"grad_norm": grad_norm}

    def lr_factor(self) -> float:
        """What the learning rate is multiplied by in the coming step."""
        warmup, decay_fraction = self._options["warmup_steps"], self._options["decay_fraction"]
        factor = ramp(self.n_updates + 1, warmup)
        if decay_fraction > 0:
            if self.n_steps is None:
                raise RuntimeError("method.decay_fraction needs the length of the training: set `n_steps` first.")
            factor *= min(1.0, max(0, self.n_steps - self.n_updates) / (decay_fraction * self.n_steps))
        return factor

    def train_on(
        self, chunk: Sequence[Batch], optimizer: ClippingAdam, last_step: Callable[[], object] | None = None
    ) -> dict[str, Tensor]:
        """One optimiser step per batch. Returns the means over the chunk of what `update` returns, on the device.

        Raises `NonFiniteLoss` after the chunk if one of its losses or gradients was not finite. `last_step` is called
        in the place of the last `optimizer.step`.
        """
        first = self.n_updates
        steps = [self.update(batch, optimizer) for batch in chunk[:-1]]
        steps.append(self.update(chunk[-1], optimizer, last_step))
        table = {name: distributed.mean(torch.stack([step[name] for step in steps])) for name in steps[0]}
        finite = (table["loss"].isfinite() & table["grad_norm"].isfinite()).cpu()
        if not finite.all():
            raise NonFiniteLoss(first + int((~finite).nonzero()[0]), type(self).__name__)
        return {name: values.mean() for name, values in table.items()}

    def training_step(self, chunk: list[Batch], batch_idx: int) -> None:
        """`train_on` and logging; the last step goes through Lightning's wrapper, so `global_step` counts chunks."""
        wrapped = self.optimizers()
        assert isinstance(wrapped, pl.core.optimizer.LightningOptimizer)
        assert isinstance(wrapped.optimizer, ClippingAdam)
        means = self.train_on(chunk, wrapped.optimizer, last_step=wrapped.step)
        for name, value in means.items():
            self.log(name, value, prog_bar=name in ("loss", "l0"), batch_size=len(chunk[0].x))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["n_updates"] = self.n_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.n_updates = checkpoint["n_updates"]


def ramp(step: int, n_steps: int) -> float:
    """step / n_steps, at most 1; 1 where there is nothing to ramp."""
    return min(1.0, step / n_steps) if n_steps > 0 else 1.0
