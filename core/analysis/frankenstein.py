"""A dictionary that grows by the novel latents of every larger one of a family (Leask et al., in their post of
2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from core.analysis.stitch_path import insertion_in_order, walk
from core.analysis.stitching import NOVEL, check_pair, nearest, score_latents
from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.methods.stitched import Stitched


def frankenstein(
    family: Sequence[Dictionary],
    batches: Callable[[], Iterable[Tensor]],
    seed: int,
    below: float | None = None,
    n_blocks: int = 64,
    n_steps: int = 20,
) -> list[Stitched]:
    """The smallest dictionary of a family, then the same grown by the novel latents of each larger one in turn.

    A latent is novel if it lowers the error when it is inserted alone into the dictionary grown so far (for its whole
    bootstrap interval). Novel latents overlap, so all of them together can raise the error. Only those are added whose
    largest cosine with the grown dictionary's rows is under `below`. With None, they are added by ascending cosine in
    `n_steps` steps of equal number, up to the step with the lowest error, or not at all. `batches()` gives batches
    `[B, d]` of raw activations from the beginning. The decoder bias of the smallest dictionary stays. Raises UserError
    for a family of one, or if the dictionaries do not fit together.
    """
    if len(family) < 2:
        raise UserError(f"family: {len(family)} dictionary is no family; name two or more of different sizes.")
    ordered = sorted(family, key=lambda method: method.dict_size)
    for larger in ordered[1:]:
        check_pair(ordered[0], larger)
    b_dec = ordered[0].b_dec.detach()
    parts = [(ordered[0], torch.ones(ordered[0].dict_size, dtype=torch.bool))]
    grown = [Stitched.of(parts, b_dec)]
    for larger in ordered[1:]:
        novel = score_latents(grown[-1], larger, batches(), n_blocks).classes(seed) == NOVEL
        cosine = nearest(grown[-1], larger).cosine
        if below is None:
            path = insertion_in_order(cosine.cpu(), novel.cpu(), grown[-1].dict_size, n_steps)
            best = int(walk(grown[-1], larger, batches(), {"": path})[""].mse.argmin())
            taken = path.comes <= best
        else:
            taken = (novel & (cosine < below)).cpu()
        parts.append((larger, taken))
        grown.append(Stitched.of(parts, b_dec))
    return grown
