"""Dictionaries made elsewhere, and any trained one as it is at inference.

What other libraries do differently is folded into the weights where that is exact (`core.interop`), so that three
activation functions and one choice of centring are enough.

Shapes: B rows in the batch, d = d_model, m = dict_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.checked import Checked, positive, require
from core.errors import UserError
from core.input_norm import InputNorm, Normalisation
from core.kernels import sparse
from core.kernels.codes import Codes, DenseCodes
from core.methods.dictionary import Activation, Dictionary, Inference


@dataclass(frozen=True, kw_only=True)
class PretrainedSettings(Checked):
    """
    activation      `relu`; `topk`: the k largest entries > 0 of a row; `jumprelu`: z where z > threshold_i, which is at
                    least 0 (a BatchTopK dictionary has the same for all latents)
    k               active latents per row at most, for `topk`; else None
    subtract_b_dec  whether the encoder sees x - b_dec
    """

    node: ClassVar[str] = "dictionary"  # they come from files, not from the configuration
    d_model: int = positive()
    dict_size: int = positive()
    activation: Activation
    k: int | None = positive()
    subtract_b_dec: bool
    input_norm: Normalisation

    def check(self) -> None:
        fits = (self.k is not None) == (self.activation == "topk")
        require(fits, "dictionary.k", self.k, "be given for topk, and for topk alone")
        if self.k is not None and self.k > self.dict_size:
            raise UserError(f"k is {self.k}, but the dictionary has only {self.dict_size} latents.")


class Pretrained(Dictionary):
    """A dictionary that is only used: z = W_enc (x [- b_dec]) + b_enc, f = activation(z), x_hat = W_dec f + b_dec.
    The rule is the same in training mode.

    source  where it comes from, in words and names that JSON can hold; `hook` is the site as its makers call it
    """

    threshold: Tensor

    def __init__(self, source: Mapping[str, Any], **settings: Any) -> None:
        super().__init__()
        self.settings = s = PretrainedSettings.of(settings)
        self.source = dict(source)
        self.W_enc, self.W_dec = (nn.Parameter(torch.zeros(s.dict_size, s.d_model)) for _ in range(2))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(s.dict_size)), nn.Parameter(torch.zeros(s.d_model))
        self.register_buffer("threshold", torch.zeros(s.dict_size))
        self.norm = InputNorm(s.input_norm)
        self.requires_grad_(False)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor,
        *,
        activation: Activation,
        threshold: Tensor | None = None,
        k: int | None = None,
        subtract_b_dec: bool,
        input_norm: Normalisation = "none",
        scale: Tensor | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> Pretrained:
        """From weights W_enc and W_dec `[m, d]`, b_enc `[m]` (None: zero) and b_dec `[d]`; with `jumprelu` a threshold,
        `[m]` or a scalar; with `input_norm=scalar` its constant as `scale`. Evaluation mode; fp32; on the CPU.

        Raises UserError where shapes do not fit together or a number is not finite.
        """
        fits = (threshold is not None) == (activation == "jumprelu")
        require(fits, "dictionary.threshold", threshold, "be given for jumprelu, and for jumprelu alone")
        m, d = W_enc.shape
        rule = {"activation": activation, "k": k, "subtract_b_dec": subtract_b_dec, "input_norm": input_norm}
        method = cls(source or {}, d_model=d, dict_size=m, **rule)
        floor = None if threshold is None else threshold.clamp(min=0).expand(m)
        given = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": floor}
        state = method.state_dict()
        for name, tensor in (given | {"norm.scale": scale}).items():
            if tensor is None:
                continue
            shape, fitting = list(tensor.shape), list(state[name].shape)
            if shape != fitting:
                raise UserError(f"{name} has the shape {shape}, not {fitting} as W_enc asks for.")
            if not tensor.isfinite().all():
                raise UserError(f"{name} holds numbers that are NaN or infinite: the file is damaged or half-trained.")
            state[name].copy_(tensor)
        return method.eval()

    def encode(self, x: Tensor) -> Codes:
        centre = self.b_dec if self.settings.subtract_b_dec else None
        if self.settings.k is not None:
            return sparse.encode_topk(x, self.W_enc, self.b_enc, self.settings.k, centre=centre, path="auto")
        pre = sparse.pre_activations_above(x, self.W_enc, self.b_enc, self.threshold, centre)
        return DenseCodes(pre.values.where(pre.values > self.threshold, 0)) if isinstance(pre, DenseCodes) else pre

    def hyperparameters(self) -> dict[str, Any]:
        return {**self.settings.plain(), "source": self.source}

    def inference_rule(self) -> Inference:
        s = self.settings
        threshold = self.threshold if s.activation == "jumprelu" else None
        return Inference(self.W_enc, self.b_enc, s.activation, s.subtract_b_dec, threshold, s.k, self.source)


@torch.no_grad()
def at_inference(method: Dictionary) -> Pretrained:
    """The same codes and reconstructions as `method` gives in evaluation mode, on the CPU.

    Raises UserError for a method whose encoder is not one matrix (an MLP, LCA), or whose threshold is not measured.
    """
    method.require_inference_rule()
    options = method.inference_rule()._asdict() | {"input_norm": method.norm.kind, "scale": method.norm.scale}
    return Pretrained.of(W_dec=method.W_dec, b_dec=method.b_dec, **options)
