"""TopK sparse autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from core.batch import Normalisation
from core.kernels import sparse
from core.kernels.codes import Codes
from core.kernels.sparse import Path
from core.methods.auxiliary import Aux, aux_loss
from core.methods.base import DecoderNorm, DictionaryMethod
from core.methods.checks import require, require_k, require_one_of
from core.methods.sparsity import mse


class TopK(DictionaryMethod):
    """TopK sparse autoencoder (Gao et al. 2024, as the baseline of Bussmann et al. 2024).

    f = topk(ReLU(W_enc (x - b_dec) [+ b_enc])), x_hat = W_dec f + b_dec
    loss = mean over entries of (x - x_hat)^2 + aux_coefficient L_aux

    k             active latents per row
    use_enc_bias  whether b_enc takes part
    aux, k_aux    see `core.methods.auxiliary`
    path          `sparse`, `dense`, or `auto` (by dict_size / k): how products with codes are made; equal to rounding
    """

    def __init__(
        self,
        d_model: int,
        dict_size: int,
        k: int,
        use_enc_bias: bool,
        aux: Aux,
        aux_coefficient: float,
        k_aux: int,
        lr: float,
        betas: Sequence[float],
        input_norm: Normalisation,
        seed: int,
        decoder_norm: DecoderNorm,
        dead_after_tokens: int,
        grad_clip: float,
        warmup_steps: int,
        decay_fraction: float,
        path: Path,
    ) -> None:
        require_k(k, dict_size)
        require(k_aux >= 1, "k_aux", k_aux, "be at least 1")
        require(aux_coefficient >= 0, "aux_coefficient", aux_coefficient, "be 0 or more")
        require_one_of(aux, "aux", Aux)
        require_one_of(path, "path", Path)
        super().__init__(
            d_model=d_model,
            dict_size=dict_size,
            lr=lr,
            betas=betas,
            input_norm=input_norm,
            seed=seed,
            decoder_norm=decoder_norm,
            dead_after_tokens=dead_after_tokens,
            grad_clip=grad_clip,
            warmup_steps=warmup_steps,
            decay_fraction=decay_fraction,
        )
        self.k, self.k_aux, self.aux_coefficient = int(k), int(k_aux), float(aux_coefficient)
        self.aux: Aux = aux
        self.path: Path = path
        self.b_enc.requires_grad_(use_enc_bias)
        self._options |= {
            "k": self.k,
            "use_enc_bias": bool(use_enc_bias),
            "aux": aux,
            "aux_coefficient": self.aux_coefficient,
            "k_aux": self.k_aux,
            "path": path,
        }

    @property
    def bias(self) -> Tensor | None:
        """b_enc, where it takes part."""
        return self.b_enc if self._options["use_enc_bias"] else None

    def encode(self, x: Tensor) -> Codes:
        return sparse.encode_topk(x, self.W_enc, self.bias, self.k, centre=self.b_dec, path=self.path)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        x_hat = self.decode(codes)
        aux = aux_loss(self.aux, x, x_hat, self.dead, self.k_aux, self.W_enc, self.bias, self.b_dec, self.W_dec)
        return {"reconstruction": mse(x, x_hat), "aux": self.aux_coefficient * aux}
