"""Push a model along a latent's direction while it writes.

Source: Minder et al. 2025, App., and the authors' code: alpha times the latent's largest activation, along its chat
decoder of norm 1, is added at the crosscoder's site. Shapes: d = d_model, T tokens of a prompt.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.models.language_model import Edit, LanguageModel


@torch.no_grad()
def continuation(
    lm: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    end: int,
    push: Tensor | None = None,
    site: str = "",
    prompt_only: bool = False,
) -> str:
    """What the model writes after a prompt `[T]`, greedily and up to the token `end`, in words.

    push  `[d]`, added to the activations at `site`: of all tokens, or of the prompt's alone
    """

    def edit(x: Tensor) -> Tensor:
        assert push is not None
        return x if prompt_only and x.shape[1] == 1 else x + push.to(x)  # each new token is a pass of its own

    ids = prompt[None].to(lm.device)
    with lm.edited(Edit(site, edit)) if push is not None else nullcontext():
        out = lm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            use_cache=True,  # some configurations switch it off
        )
    return str(lm.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)).strip()


def push_of(direction: Tensor, largest: float, alpha: float) -> Tensor:
    """`[d]`: alpha times the largest activation along a direction `[d]`."""
    return alpha * largest * normalize(direction.detach().float(), dim=0)
