"""Dead latents start anew (O'Neill et al. 2025, the GPT-2 section; after Bricken et al. 2023, without its data).

Every `resample_every` steps each dead latent gets a random unit vector as decoder row, 0.2 times a unit vector as
encoder row (the same one where both live in R^d, else a random one) and bias 0. Adam's moments of these entries are
cleared, and the latent counts as having just fired. Adam's step count is shared by all latents, so the first step of a
revived one is larger, (1 - beta_1) / sqrt(1 - beta_2) lr: 3.2 lr with betas of 0.9 and 0.999.

The loss rises after a revival, so the last one should come well before the end of training. Vectors depend on the
method's seed and the number of the step only, as a resumed run needs.

Shapes: m = dict_size, e = width of what the encoder's last layer sees (d, or the hidden width), n = dead latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.methods.base import DictionaryMethod
from core.methods.decoder import unit_rows_
from core.optimizer import ClippingAdam
from core.seeding import generator

ENCODER_NORM = 0.2


@torch.no_grad()
def resample_if_due(
    method: DictionaryMethod, W_enc: Tensor, b_enc: Tensor, optimizer: ClippingAdam, every: int, like_decoder: bool
) -> None:
    """Start the dead latents anew, in place, after every `every` steps; 0: never. W_enc `[m, e]` and b_enc `[m]` are
    the method's. `like_decoder`: encoder rows are along the decoder's, which needs W_enc `[m, d]`."""
    if every == 0 or method.n_updates % every:
        return
    dead = method.dead.nonzero().squeeze(1)  # [n]
    random = generator(method.settings.seed, "resample", method.n_updates)
    # Vectors for all latents are drawn, so that one latent's do not depend on which others are dead.
    directions = _unit_rows(method.W_dec, random, method.axes)[dead]  # [n, d]
    rows = directions if like_decoder else _unit_rows(W_enc, random, W_enc.ndim - 1)[dead]  # [n, e]
    method.W_dec[dead] = directions
    W_enc[dead] = ENCODER_NORM * rows
    b_enc[dead] = 0.0
    for parameter in (method.W_dec, W_enc, b_enc):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment][dead] = 0.0
    method.tokens_since_fired[dead] = 0


def _unit_rows(like: Tensor, random: torch.Generator, axes: int) -> Tensor:
    return unit_rows_(torch.randn(like.shape, generator=random), axes).to(like.device)
