"""Dead latents start anew (O'Neill et al. 2025, the GPT-2 section; after Bricken et al. 2023, without its data).

Every `resample_every` steps each latent that has not fired for `dead_after_tokens` tokens gets a random unit vector as
decoder row, 0.2 times a unit vector as encoder row (the same one where both live in R^d, else a random one), and
bias 0; Adam's moments of these entries are cleared and the latent counts as having just fired. Adam's step count is
shared by all latents, so with moments of zero a revived one's first step is larger, (1 - beta_1) / sqrt(1 - beta_2) lr:
3.2 lr with betas of 0.9 and 0.999.

A revived latent is not part of the loss that chose the others: the loss rises in the next step, so the last time should
lie well before the end. Vectors depend on the method's seed and the number of the step only, as a resumed run needs.

Shapes: m = dict_size, e = width of what the encoder's last layer sees (d, or the hidden width), n = dead latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.methods.base import DictionaryMethod
from core.methods.optimizer import ClippingAdam
from core.seeding import generator

ENCODER_NORM = 0.2


def is_due(n_updates: int, every: int) -> bool:
    """Whether dead latents are to be resampled after this step; `every` 0 means never."""
    return every > 0 and n_updates % every == 0


@torch.no_grad()
def resample_dead(method: DictionaryMethod, optimizer: ClippingAdam, encoder_like_decoder: bool) -> None:
    """Start the dead latents of `method` anew, in place. `encoder_like_decoder`: encoder rows are along the decoder's,
    for which the encoder must see what the decoder gives (W_enc `[m, d]`)."""
    dead = method.dead.nonzero().squeeze(1)  # [n]
    random = generator(method.hyperparameters()["seed"], "resample", method.n_updates)
    # Vectors for all latents are drawn, so that one latent's do not depend on which others are dead.
    directions = _unit_rows(method.W_dec, random)[dead]  # [n, d]
    rows = directions if encoder_like_decoder else _unit_rows(method.W_enc, random)[dead]  # [n, e]
    method.W_dec[dead] = directions
    method.W_enc[dead] = ENCODER_NORM * rows
    method.b_enc[dead] = 0.0
    for parameter in (method.W_dec, method.W_enc, method.b_enc):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment][dead] = 0.0
    method.tokens_since_fired[dead] = 0


def _unit_rows(like: Tensor, random: torch.Generator) -> Tensor:
    return normalize(torch.randn(like.shape, generator=random), dim=1).to(like.device)
