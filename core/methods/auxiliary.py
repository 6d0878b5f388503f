"""AuxK: the loss that brings dead latents back by letting them explain the reconstruction's error.

L_aux = |e - e_hat|^2 with e = x - x_hat and e_hat = z_aux W_dec, where z_aux are the k_aux largest activations of each
row among the dead latents. The sources disagree:
  r1          Bussmann et al. 2024, authors' code: mean over entries; e keeps its gradient, so the term also weighs the
              main residual a little more
  normalized  the dictionary_learning library: e detached, the error divided by the variance of e over the batch; it
              uses k_aux = d / 2 and far more patient dead_after_tokens
  r2_compat   the meta-SAE authors' package: its codes are already sparse, so those of dead latents are
              zero; no dead latent learns and the term adds the mean of e^2 while any latent is dead
  none        no such term
Pre-activations of the dead latents alone are computed again. Where no latent is dead, only the check costs time.

Shapes: B rows in the batch, d = d_model, m = dict_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor
from torch.nn import Parameter

from core.checked import at_least, positive
from core.kernels import sparse
from core.kernels.codes import Codes
from core.kernels.mean_square import mse, normalised_mse
from core.kernels.sparse import ProductPath
from core.methods.decoder import initial_weights, unit_rows_
from core.methods.settings import Settings, require_k

Aux = Literal["r1", "normalized", "r2_compat", "none"]


@dataclass(frozen=True, kw_only=True)
class KSparseSettings(Settings):
    """What TopK and BatchTopK share.

    k                     active latents per row, in BatchTopK on average over the batch
    use_enc_bias          whether b_enc takes part
    enc_init_norm         norm of W_enc's rows at the start; None: as they are drawn, about sqrt(2 d / m)
    aux, aux_coefficient  which L_aux is added to the mean of (x - x_hat)^2 over entries, and how much of it
    k_aux                 dead latents per row that L_aux uses; None: half of d_model, as Gao et al. 2024 advise
    path                  how products with codes are made, see `core.kernels.sparse.ProductPath`
    """

    k: int = at_least(1)
    use_enc_bias: bool
    enc_init_norm: float | None = positive()
    aux: Aux
    aux_coefficient: float = at_least(0)
    k_aux: int | None = at_least(1)
    path: ProductPath

    def check(self) -> None:
        require_k(self.k, self.dict_size, self.node)


class KSparse(Protocol):
    """A method with these settings: TopK or BatchTopK."""

    W_enc: Parameter  # [m, d]
    W_dec: Parameter  # [m, d]
    b_enc: Parameter  # [m]
    b_dec: Parameter  # [d]

    @property
    def settings(self) -> KSparseSettings: ...
    @property
    def dead(self) -> Tensor: ...  # bool [m]
    def decode(self, codes: Codes) -> Tensor: ...


def k_sparse_weights(s: KSparseSettings) -> tuple[Parameter, ...]:
    """W_enc, W_dec, b_enc and b_dec of `initial_weights`, with the encoder's rows at their norm and b_enc fixed unless
    it takes part."""
    W_enc, W_dec, b_enc, b_dec = initial_weights(s)
    if s.enc_init_norm is not None:
        unit_rows_(W_enc.data).mul_(s.enc_init_norm)
    b_enc.requires_grad_(s.use_enc_bias)
    return W_enc, W_dec, b_enc, b_dec


def used_bias(method: KSparse) -> Tensor | None:
    """b_enc, where it takes part."""
    return method.b_enc if method.settings.use_enc_bias else None


def k_sparse_losses(method: KSparse, x: Tensor, codes: Codes) -> dict[str, Tensor]:
    """The mean of (x - x_hat)^2 over entries, and the weighted L_aux, for x `[B, d]` and its codes `[B, m]`."""
    x_hat = method.decode(codes)
    return {"reconstruction": mse(x, x_hat), "aux": method.settings.aux_coefficient * aux_loss(method, x, x_hat)}


def aux_loss(method: KSparse, x: Tensor, x_hat: Tensor) -> Tensor:
    """L_aux, a scalar, for x and x_hat `[B, d]`; 0 where no latent is dead."""
    s, b_enc = method.settings, used_bias(method)
    dead = method.dead.nonzero().squeeze(1)  # [n_dead]; waits for the device
    if s.aux == "none" or dead.numel() == 0:
        return x.new_zeros(())
    if s.aux == "r2_compat":
        return mse(x, x_hat)
    b_dead, k = None if b_enc is None else b_enc[dead], min(s.k_aux or max(1, s.d_model // 2), dead.numel())
    codes = sparse.encode_topk(x, method.W_enc[dead], b_dead, k, centre=method.b_dec, path="auto")
    e, e_hat = x - x_hat, sparse.decode(codes, method.W_dec[dead])
    return mse(e, e_hat) if s.aux == "r1" else normalised_mse(e.detach(), e_hat)
