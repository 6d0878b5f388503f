"""TopK sparse autoencoder."""

from __future__ import annotations

from torch import Tensor

from core.kernels import sparse
from core.kernels.codes import Codes
from core.methods.auxiliary import KSparseSettings, k_sparse_losses, k_sparse_weights, used_bias
from core.methods.base import DictionaryMethod
from core.methods.dictionary import Inference


class TopK(DictionaryMethod[KSparseSettings]):
    """TopK sparse autoencoder (Gao et al. 2024, as the baseline of Bussmann et al. 2024).

    f = topk(ReLU(W_enc (x - b_dec) [+ b_enc])), x_hat = W_dec f + b_dec
    loss = mean over entries of (x - x_hat)^2 + aux_coefficient L_aux
    """

    def declare_weights(self) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = k_sparse_weights(self.settings)

    def encode(self, x: Tensor) -> Codes:
        s = self.settings
        return sparse.encode_topk(x, self.W_enc, used_bias(self), s.k, centre=self.b_dec, path=s.path)

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        return k_sparse_losses(self, x, codes)

    def inference_rule(self) -> Inference:
        return Inference(self.W_enc, used_bias(self), "topk", k=self.settings.k)
