"""Answers that a chat model writes itself, and how well a latent tells which behaviour an answer shows.

Shapes: T tokens of a dialogue, n latents, N dialogues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.analysis.latent_use import columns
from core.analysis.paired_tokens import PairedTokens
from core.methods.crosscoder import scaled
from core.methods.dictionary import Dictionary
from core.metrics.statistics import roc_auc
from core.models.language_model import LanguageModel
from core.models.pair import ModelPair
from core.text.chat import ROLES, Message, answer_positions, prompt_of
from core.text.paired_rows import Row


@torch.no_grad()
def answered(lm: LanguageModel, messages: Sequence[Message], max_new_tokens: int, n_ctx: int) -> Row | None:
    """The first question of a dialogue, with the model's greedy answer in the place of the given one; cut at n_ctx
    tokens. None if the question alone is longer."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    prompt = prompt_of(lm.tokenizer, messages[:first])
    room = min(max_new_tokens, n_ctx - len(prompt.chat.ids))
    if room < 1:
        return None
    ids = prompt.chat.ids[None].to(lm.device)
    out = lm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room,
        do_sample=False,
        eos_token_id=prompt.end,
        pad_token_id=prompt.end,
        use_cache=True,  # some configurations switch it off
    )[0].cpu()
    answer = out[len(prompt.chat.ids) :]
    roles = torch.where(answer == prompt.end, ROLES.index("template"), ROLES.index("assistant"))
    return Row(out, torch.cat([prompt.chat.roles, roles]), True)


@torch.no_grad()
def largest_in_answers(
    pair: ModelPair, crosscoder: Dictionary, sizes: Tensor, tokens: PairedTokens, latents: Tensor, rows_per_batch: int
) -> np.ndarray:
    """`[R, n]`: the largest activation of each latent at the positions of a row that predict its answers. `sizes` `[m]`
    are those of the decoders (`core.methods.crosscoder.latent_sizes`)."""
    largest = []
    for start in range(0, len(tokens), rows_per_batch):
        part = tokens[slice(start, start + rows_per_batch)]
        at = answer_positions(part.roles) & part.valid
        row, position = at.nonzero(as_tuple=True)
        x = pair.capture(part.ids)[row.to(pair.device), position.to(pair.device)]
        v = columns(scaled(crosscoder.encode(crosscoder.norm(x)[0]), sizes), latents)  # [n wanted, n]
        of_row = torch.zeros(len(part), len(latents), dtype=v.dtype)
        largest.append(of_row.scatter_reduce(0, row[:, None].expand_as(v), v, "amax"))
    return torch.cat(largest).numpy()


@dataclass(frozen=True)
class BestProbe:
    """The latent that tells a behaviour best on one half of the dialogues, and its area under the ROC curve on the
    other half, which did not choose it."""

    place: int  # among the latents
    auc: float


def best_probe(scores: np.ndarray, labels: np.ndarray) -> BestProbe | None:
    """Scores `[N, n]`, labels bool `[N]`. Even rows choose, odd rows judge. None if a half lacks a kind of label."""
    on_even = roc_auc(scores[::2], labels[::2])
    if not scores.shape[1] or np.isnan(on_even).any():
        return None
    place = int(on_even.argmax())
    auc = float(roc_auc(scores[1::2, [place]], labels[1::2])[0])
    return None if np.isnan(auc) else BestProbe(place, auc)
