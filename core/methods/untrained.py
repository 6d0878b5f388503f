"""What dictionaries that are only used have in common: made elsewhere, or made of parts of others."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from core.batch import Normalisation
from core.errors import UserError
from core.kernels.codes import Codes
from core.methods.base import DictionaryMethod
from core.methods.sparsity import mse


class Untrained(DictionaryMethod):
    """A dictionary without settings of a training. Raises UserError where an optimiser is asked for."""

    def __init__(self, d_model: int, dict_size: int, input_norm: Normalisation) -> None:
        super().__init__(
            d_model=d_model,
            dict_size=dict_size,
            lr=1.0,
            betas=(0.9, 0.999),
            input_norm=input_norm,
            seed=0,
            decoder_norm="none",
            dead_after_tokens=1,
            grad_clip=1.0,
            warmup_steps=0,
            decay_fraction=0.0,
        )

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        return {"reconstruction": mse(x, self.decode(codes))}

    def configure_optimizers(self) -> NoReturn:
        raise UserError(f"method: a dictionary that was loaded or put together ({type(self).__name__}) is not trained.")
