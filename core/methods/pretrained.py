"""Dictionaries made elsewhere, and any trained one as it is at inference.

What other libraries do differently is folded into the weights where that is exact (`core.interop`), so that three
activation functions and one choice of centring are enough.

Shapes: B rows in the batch, d = d_model, m = dict_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from core.batch import Normalisation
from core.errors import UserError
from core.kernels import sparse
from core.kernels.codes import Codes, DenseCodes
from core.methods.base import DictionaryMethod
from core.methods.batchtopk import BatchTopK
from core.methods.checks import require, require_k, require_one_of
from core.methods.jumprelu import JumpReLU
from core.methods.relu_l1 import ReluL1
from core.methods.topk import TopK
from core.methods.untrained import Untrained

Activation = Literal["relu", "topk", "jumprelu"]


class Pretrained(Untrained):
    """A dictionary that is only used: z = W_enc (x [- b_dec]) + b_enc, f = activation(z), x_hat = W_dec f + b_dec.

    activation      `relu`; `topk`: the k largest entries > 0 of a row; `jumprelu`: z where z > threshold_i, which is at
                    least 0 (a BatchTopK dictionary has the same for all latents)
    k               active latents per row at most, for `topk`; else None
    subtract_b_dec  whether the encoder sees x - b_dec
    source          where it comes from, in words and names that JSON can hold; `hook` is the site as its makers call it

    The rule is the same in training mode. `dead` says of no latent that it is, since it is not known.
    """

    threshold: Tensor

    def __init__(
        self,
        d_model: int,
        dict_size: int,
        activation: Activation,
        k: int | None,
        subtract_b_dec: bool,
        input_norm: Normalisation,
        source: Mapping[str, Any],
    ) -> None:
        require_one_of(activation, "activation", Activation)
        require((k is not None) == (activation == "topk"), "k", k, "be given for topk, and for topk alone")
        if k is not None:
            require_k(k, dict_size)
        super().__init__(
            d_model=d_model,
            dict_size=dict_size,
            input_norm=input_norm,
        )
        self.activation: Activation = activation
        self.k = None if k is None else int(k)
        self.subtract_b_dec, self.source = bool(subtract_b_dec), dict(source)
        self.register_buffer("threshold", torch.zeros(dict_size))
        self.requires_grad_(False)

    @classmethod
    def of(
        cls,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
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
        """From weights W_enc and W_dec `[m, d]`, b_enc `[m]`, b_dec `[d]`, and threshold `[m]` or a scalar, with
        `jumprelu`. `scale` is the constant of `input_norm=scalar`. Evaluation mode; fp32.

        Raises UserError where shapes do not fit together or a number is not finite.
        """
        require((threshold is not None) == (activation == "jumprelu"), "threshold", threshold, "come with jumprelu")
        m, d = W_enc.shape
        method = cls(d, m, activation, k, subtract_b_dec, input_norm, source or {})
        threshold = torch.zeros(m) if threshold is None else threshold.clamp(min=0).expand(m)
        state = method.state_dict() | {
            "W_enc": W_enc,
            "W_dec": W_dec,
            "b_enc": b_enc,
            "b_dec": b_dec,
            "threshold": threshold,
            **({} if scale is None else {"norm.scale": scale}),
        }
        for name, shape in ((name, tuple(tensor.shape)) for name, tensor in method.state_dict().items()):
            if tuple(state[name].shape) != shape:
                raise UserError(f"{name} has the shape {list(state[name].shape)}, not {list(shape)} as W_enc asks for.")
            if not state[name].isfinite().all():
                raise UserError(f"{name} holds numbers that are NaN or infinite: the file is damaged or half-trained.")
        method.load_state_dict(state)
        return method.eval()

    def encode(self, x: Tensor) -> Codes:
        centre = self.b_dec if self.subtract_b_dec else None
        if self.k is not None:
            return sparse.encode_topk(x, self.W_enc, self.b_enc, self.k, centre=centre, path="auto")
        pre = sparse.pre_activations_above(x, self.W_enc, self.b_enc, self.threshold, centre)
        return DenseCodes(pre.values.where(pre.values > self.threshold, 0)) if isinstance(pre, DenseCodes) else pre

    def hyperparameters(self) -> dict[str, Any]:
        return {
            "d_model": self.d_model,
            "dict_size": self.dict_size,
            "activation": self.activation,
            "k": self.k,
            "subtract_b_dec": self.subtract_b_dec,
            "input_norm": self.norm.kind,
            "source": self.source,
        }


def require_one_matrix(method: type[DictionaryMethod]) -> None:
    """UserError unless codes are an activation function of one product, which is what `at_inference` can say."""
    if not issubclass(method, Pretrained | ReluL1 | TopK | BatchTopK | JumpReLU):
        raise UserError(
            f"method: {method.__name__} has no encoder of one matrix and an activation function, which is all that "
            "other libraries' formats can hold; ReLU, TopK, BatchTopK and JumpReLU dictionaries have."
        )


@torch.no_grad()
def at_inference(method: DictionaryMethod) -> Pretrained:
    """The same codes and reconstructions as `method` gives in evaluation mode, on the CPU.

    Raises UserError for a method whose encoder is not one matrix (an MLP, LCA), or whose threshold is not measured.
    """
    require_one_matrix(type(method))
    state = {name: tensor.detach().cpu() for name, tensor in method.state_dict().items()}
    options: dict[str, Any] = {"input_norm": method.norm.kind, "scale": state["norm.scale"], "subtract_b_dec": True}
    if isinstance(method, Pretrained):
        options |= {"activation": method.activation, "k": method.k, "source": method.source}
        options["subtract_b_dec"] = method.subtract_b_dec
        if method.activation == "jumprelu":
            options["threshold"] = state["threshold"]
    elif isinstance(method, ReluL1):
        options |= {"activation": "relu", "subtract_b_dec": method.subtract_b_dec}
    elif isinstance(method, TopK):
        options |= {"activation": "topk", "k": method.k}
    elif isinstance(method, BatchTopK):
        if method.threshold.isnan():
            raise UserError("The threshold of this BatchTopK dictionary is not measured: finish(batches) does that.")
        options |= {"activation": "jumprelu", "threshold": state["threshold"]}
    elif isinstance(method, JumpReLU):
        options |= {"activation": "jumprelu", "threshold": method.threshold.detach().cpu()}
        options["subtract_b_dec"] = method.subtract_b_dec
    unbiased = isinstance(method, TopK | BatchTopK) and method.bias is None
    b_enc = torch.zeros_like(state["b_enc"]) if unbiased else state["b_enc"]
    return Pretrained.of(state["W_enc"], state["W_dec"], b_enc, state["b_dec"], **options)
