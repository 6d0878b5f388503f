"""What every dictionary-learning method is: one complete optimiser step, counters, and what Lightning calls.

A Lightning step covers a chunk of many optimiser steps, so that the framework's cost per step is shared by all of them
and the device is waited for once per chunk (to see whether the loss is finite).

Shapes: B rows in the batch, d = d_model, m = dict_size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar, cast, get_args, get_origin

import pytorch_lightning as pl
import torch
from torch import Tensor

from core import distributed
from core.batch import Batch
from core.errors import NonFiniteLoss, UserError
from core.input_norm import InputNorm
from core.kernels.codes import Codes
from core.kernels.device import products_in_bf16
from core.methods.centre import centre
from core.methods.decoder import project_gradient, unit_columns_, unit_rows_
from core.methods.dictionary import Dictionary
from core.methods.settings import Settings
from core.optimizer import ClippingAdam

S = TypeVar("S", bound=Settings)


class DictionaryMethod(Dictionary, pl.LightningModule, Generic[S]):
    """A dictionary that is trained: `class TopK(DictionaryMethod[TopKSettings])`. A method declares its weights in
    `declare_weights` and says how it encodes and what it minimises; the settings come as keyword arguments.

    axes  trailing axes of W_dec that one decoder norm runs over. 1: every row; with W_dec `[m, n_models, d]` this means
          a norm for each model, and 2 means one norm for all models of a latent together

    Parameters, moments and thresholds are fp32 always.
    """

    settings_class: ClassVar[type[Settings]]
    settings: S
    axes: int = 1
    tokens_since_fired: Tensor

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__dict__.get("__orig_bases__", ()):
            if get_origin(base) is DictionaryMethod:
                (cls.settings_class,) = get_args(base)

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = cast(S, self.settings_class.of(settings))
        self.automatic_optimization = False
        self.n_steps: int | None = None  # optimiser steps of the whole training
        self.n_updates = 0  # optimiser steps made so far
        self.has_start = False  # the parameters were given (`core.fleet.Start`), `start` must leave them
        self.register_buffer("tokens_since_fired", torch.zeros(self.settings.dict_size, dtype=torch.int64))
        self.declare_weights()
        self.norm = InputNorm(self.settings.input_norm, self.input_shape[:-1])

    # ---- what a method says

    @abstractmethod
    def declare_weights(self) -> None:
        """Assign W_dec `[m, d]` or `[m, n_models, d]`, b_dec, and whatever the encoder needs, with initial values."""

    @abstractmethod
    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        """The terms whose sum is minimised, as scalars, from normalised activations and their codes."""

    def start(self, x: Tensor) -> None:
        """Called once, before the first step, with the first batch of normalised activations `[B, d]` of all ranks, but
        not where the parameters were given. Here b_dec gets its start; one that is not finite changes nothing."""
        if self.settings.b_dec_init != "zeros":
            start = centre(x, self.settings.b_dec_init)
            self.b_dec.data.copy_(start.where(start.isfinite().all(), self.b_dec))

    def observe(self, codes: Codes) -> None:
        """Called in every training step, before the losses: counts how long every latent has not fired."""
        self.tokens_since_fired += codes.shape[0] * distributed.n_ranks()
        self.tokens_since_fired.masked_fill_(distributed.anywhere(codes.fired()), 0)

    def after_step(self, optimizer: ClippingAdam) -> None:
        """Called after every optimiser step, once `n_updates` counts it and the decoder is rescaled."""

    def finish(self, batches: Iterable[Batch]) -> None:
        """Called once, after training, with batches of the training size: what inference needs is measured here."""

    @property
    def dead(self) -> Tensor:
        """bool `[m]`."""
        return self.tokens_since_fired >= self.settings.dead_after_tokens

    def hyperparameters(self) -> dict[str, Any]:
        return self.settings.plain()

    # ---- training

    def configure_optimizers(self) -> ClippingAdam:
        s = self.settings
        return ClippingAdam(self.parameter_groups(), s.lr, s.betas, max_norm=s.grad_clip)

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
                if not self.has_start:
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
        norm = self.settings.decoder_norm
        if norm in ("before_step", "after_step") and self.W_dec.grad is not None:
            project_gradient(self.W_dec.grad, self.W_dec, self.axes)
        if norm == "before_step":
            unit_rows_(self.W_dec, self.axes)
        grad_norm = optimizer.prepare(self.lr_factor())
        (step or optimizer.step)()
        if norm == "after_step":
            unit_rows_(self.W_dec, self.axes)
        elif norm == "rows_compat":
            unit_columns_(self.W_dec)
        self.n_updates += 1
        scalars = {"loss": loss, **terms, "l0": codes.l0(), "n_dead": self.dead.sum().float()}
        self.after_step(optimizer)
        return {name: value.detach() for name, value in scalars.items()} | {"grad_norm": grad_norm}

    def lr_factor(self) -> float:
        """What the learning rate is multiplied by in the coming step."""
        decay_fraction = self.settings.decay_fraction
        factor = ramp(self.n_updates + 1, self.settings.warmup_steps)
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
