"""Crosscoders made elsewhere: `core.methods.crosscoder` at inference, with what their files say of normalisation.

Shapes: B rows in the batch, M models, d = d_model, m = dict_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from core.checked import Checked, at_least, positive
from core.errors import UserError
from core.input_norm import AnyNormalisation, InputNorm
from core.kernels import sparse
from core.kernels.codes import Codes, DenseCodes, SparseCodes
from core.methods.crosscoder import TINY, CodeNorm, latent_sizes
from core.methods.dictionary import Dictionary

Rule = Literal["relu", "threshold"]


@dataclass(frozen=True, kw_only=True)
class PretrainedCrosscoderSettings(Checked):
    """
    rule        `relu`: f = ReLU(z); `threshold`: of these, f_j is kept where v_j is above the threshold
    code_norm   the size of a latent, as in `core.methods.crosscoder`; `decoupled`: every model m has a threshold of its
                own, and f_j counts in its reconstruction where f_j |d_j^m| is above it
    input_norm  also `affine`, which has its numbers from a file
    """

    node: ClassVar[str] = "dictionary"  # they come from files, not from the configuration
    d_model: int = positive()
    n_models: int = at_least(2)
    dict_size: int = positive()
    rule: Rule
    code_norm: CodeNorm | Literal["decoupled"]
    input_norm: AnyNormalisation


class PretrainedCrosscoder(Dictionary):
    """A crosscoder that is only used. The rule is the same in training mode.

    source  where it comes from, in words and names that JSON can hold
    """

    threshold: Tensor  # of v, `[]`; decoupled: `[M]`

    def __init__(self, source: Mapping[str, Any], **settings: Any) -> None:
        super().__init__()
        self.settings = s = PretrainedCrosscoderSettings.of(settings)
        self.source = dict(source)
        self.W_enc, self.W_dec = (nn.Parameter(torch.zeros(s.dict_size, s.n_models, s.d_model)) for _ in range(2))
        self.b_enc, self.b_dec = (
            nn.Parameter(torch.zeros(s.dict_size)),
            nn.Parameter(torch.zeros(s.n_models, s.d_model)),
        )
        self.register_buffer("threshold", torch.zeros((s.n_models,) if s.code_norm == "decoupled" else ()))
        self.norm = InputNorm(s.input_norm, (s.n_models,), s.d_model)
        self.requires_grad_(False)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        *,
        threshold: Tensor | None,
        code_norm: CodeNorm | Literal["decoupled"] = "sum",
        input_norm: AnyNormalisation = "none",
        offset: Tensor | None = None,
        scale: Tensor | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> PretrainedCrosscoder:
        """From weights W_enc and W_dec `[m, M, d]`, b_enc `[m]` and b_dec `[M, d]`; a threshold of v, or None for a
        plain ReLU; offset `[M, d]` and scale `[M, 1]` of the normalisation, as `InputNorm` has them. Evaluation mode.

        Raises UserError where shapes do not fit together or a number is not finite."""
        m, M, d = W_dec.shape
        rule: Rule = "relu" if threshold is None else "threshold"
        sizes = {"d_model": d, "n_models": M, "dict_size": m}
        crosscoder = cls(source or {}, **sizes, rule=rule, code_norm=code_norm, input_norm=input_norm)
        given = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
        state = crosscoder.state_dict()
        for name, tensor in (given | {"norm.offset": offset, "norm.scale": scale}).items():
            if tensor is None:
                continue
            if name not in state or tensor.shape != state[name].shape:
                fitting = list(state[name].shape) if name in state else "not used"
                raise UserError(f"{name} has the shape {list(tensor.shape)}, not {fitting} as W_dec asks for.")
            if not tensor.isfinite().all():
                raise UserError(f"{name} holds numbers that are NaN or infinite: the file is damaged or half-trained.")
            state[name].copy_(tensor)
        return crosscoder.eval()

    def encode(self, x: Tensor) -> Codes:
        if self.settings.rule == "relu":
            return sparse.encode_relu(x, self.W_enc, self.b_enc)
        return sparse.encode_threshold(x, self.W_enc, self.b_enc, self.floors())

    def floors(self) -> Tensor:
        """`[m]`: f_j is in the codes where it is above this. Decoupled: where it counts in some model."""
        if self.settings.code_norm == "decoupled":
            return (self.threshold / self.norms().clamp(min=TINY)).amin(1)
        return self.threshold / latent_sizes(self.W_dec, self.settings.code_norm).clamp(min=TINY)

    def norms(self) -> Tensor:
        """|d_j^m|, `[m, M]`."""
        return torch.linalg.vector_norm(self.W_dec, dim=2)

    def decode(self, codes: Codes) -> Tensor:
        if self.settings.code_norm != "decoupled" or self.settings.rule == "relu":
            return super().decode(codes)
        counted = [
            sparse.decode(above(codes, floor), self.W_dec[:, i])
            for i, floor in enumerate((self.threshold / self.norms().clamp(min=TINY)).T)
        ]
        return torch.stack(counted, 1) + self.b_dec

    def require_one_code(self) -> None:
        if self.settings.code_norm == "decoupled":
            raise UserError(
                "method.repo: the crosscoder has a threshold for each model (code_normalization DECOUPLED), so its "
                "models do not share their codes. This analysis needs one code for all: choose another crosscoder."
            )

    def hyperparameters(self) -> dict[str, Any]:
        return {**self.settings.plain(), "source": self.source}


def above(codes: Codes, floors: Tensor) -> Codes:
    """The codes with all activations of latent j set to 0 that are not above floors_j, `[m]`."""
    if isinstance(codes, DenseCodes):
        return DenseCodes(codes.values.where(codes.values > floors, 0))
    return SparseCodes.on(codes.support, codes.values.where(codes.values > floors[codes.cols], 0))
