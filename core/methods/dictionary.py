"""What a dictionary can do, however it came about: trained here, loaded, or made of parts of others.

Shapes: B rows in the batch, d = d_model, m = dict_size. `[B, d]` stands for `[B, n_models, d]` as well, activations of
several models on the same tokens; then W_dec is `[m, n_models, d]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.input_norm import InputNorm
from core.kernels import sparse
from core.kernels.codes import Codes, DenseCodes

Activation = Literal["relu", "topk", "jumprelu"]


class Inference(NamedTuple):
    """Codes at inference as an activation function of one product; see `core.methods.pretrained.Pretrained`."""

    W_enc: Tensor  # [m, d]
    b_enc: Tensor | None  # [m]; None: zero
    activation: Activation
    subtract_b_dec: bool = True
    threshold: Tensor | None = None  # [m] or a scalar
    k: int | None = None
    source: Mapping[str, Any] | None = None


Encode = Callable[["Dictionary", Tensor], Codes]


def _of_rows(encode: Encode) -> Encode:
    """`encode` with its input checked and in the weights' dtype, so that no class has to."""

    @wraps(encode)
    def encode_rows(self: Dictionary, x: Tensor) -> Codes:
        _require_input(x, x.shape[1:] == self.input_shape, f"[rows, {', '.join(map(str, self.input_shape))}]")
        x = x.to(self.W_dec.dtype).contiguous()
        return encode(self, x) if len(x) else DenseCodes(x.new_zeros(0, self.dict_size))

    return encode_rows


def _require_input(x: Tensor, fits: bool, wanted: str) -> None:
    if not fits or x.is_complex():
        raise UserError(f"The dictionary takes real activations {wanted}, not {x.dtype} {list(x.shape)}.")


class Dictionary(nn.Module, ABC):
    """m directions in R^d, the rows of W_dec, and an encoder that says which of them make up an input.

    version  a part of every stored dictionary's key: raise it when a change alters what the same settings give
    """

    version: ClassVar[int] = 1
    W_dec: nn.Parameter  # [m, d]
    b_dec: nn.Parameter  # [d]
    norm: InputNorm

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "encode" in cls.__dict__:
            setattr(cls, "encode", _of_rows(cls.__dict__["encode"]))  # noqa: B010  (no name of one class)

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """Normalised activations `[B, d]` -> codes `[B, m]`: by the training rule in training mode, else by the rule of
        inference. Changes no state. B may be 0, and x of any real dtype. Raises UserError for another width."""

    @abstractmethod
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments, fit for JSON: `type(m)(**m.hyperparameters())` is `m` before training."""

    def description(self) -> dict[str, Any]:
        """`class` and `hyperparameters`: what `core.methods.settings.rebuilt` needs, fit for JSON."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": name, "hyperparameters": self.hyperparameters()}

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[-1]

    @property
    def dict_size(self) -> int:
        return self.W_dec.shape[0]

    @property
    def input_shape(self) -> torch.Size:
        """Of one row: `(d,)`, or `(n_models, d)`."""
        return self.W_dec.shape[1:]

    @property
    def dead(self) -> Tensor:
        """bool `[m]`. Where nothing counted how often latents fire, none is called dead."""
        return torch.zeros(self.dict_size, dtype=torch.bool, device=self.W_dec.device)

    def require_one_code(self) -> None:
        """Raises UserError for a crosscoder whose codes differ between its models. For analyses of f_j d_j^m."""

    def require_sound(self) -> None:
        """Called when weights were read from a file. Raises UserError where they do not fit together."""

    def decode(self, codes: Codes) -> Tensor:
        """codes `[B, m]` -> x_hat `[B, d]`, in normalised space."""
        return sparse.decode(codes, self.W_dec) + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw activations `[..., d]` -> their reconstruction, in the same dtype; for whole numbers as of `x.float()`.

        Raises UserError for another width, and for complex numbers."""
        fits = x.shape[max(0, x.ndim - len(self.input_shape)) :] == self.input_shape
        _require_input(x, fits, f"[..., {', '.join(map(str, self.input_shape))}]")
        normalised, shift = self.norm(x.reshape(-1, *self.input_shape))
        x_hat = self.norm.undo(self.decode(self.encode(normalised)), shift)
        return x_hat.view(x.shape).to(x.dtype if x.is_floating_point() else torch.float32)

    def inference_rule(self) -> Inference:
        """How codes are made in evaluation mode; a class whose encoder is one matrix says so here. Raises UserError if
        something that inference needs is not measured yet."""
        raise NotImplementedError

    def train_step_flops(self, batch_size: int) -> float:
        """Operations of one training step with dense products (`core.metrics.flops`, corrected). Raises UserError where
        they are not counted."""
        raise UserError(f"method: the operations of a training step of {type(self).__name__} are not counted here.")

    @classmethod
    def require_inference_rule(cls) -> None:
        """Raises UserError for a class without `inference_rule`."""
        if cls.inference_rule is Dictionary.inference_rule:
            raise UserError(
                f"method: {cls.__name__} has no encoder of one matrix and an activation function, which is all that "
                "other libraries' formats can hold; ReLU, TopK, BatchTopK and JumpReLU dictionaries have."
            )
