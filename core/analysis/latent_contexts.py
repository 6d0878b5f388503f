"""Pieces of text on which a latent fires, and others on which it does not: for people and for judges.

Rows are cut into windows of equal length. A window is activating if the latent fires in it, by the strength of its
largest activation there; it is non-activating only if the latent is off at every token of it. (The library that the
authors of Minder et al. 2025 used took its negatives from activating contexts.)

Shapes: R rows of T tokens, W windows of L tokens, n latents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.analysis.diff_page import Context
from core.analysis.latent_use import COUNTED
from core.atomic import write_atomically
from core.seeding import generator
from core.text.chat import is_role

LEAST_REAL = 0.5  # of a window's tokens are no padding


@dataclass(frozen=True, eq=False)
class Windows:
    """
    latents  the n latents
    ids, template, real   `[W, L]`: token ids, whether they are the template's, and whether they are no padding
    is_chat  bool `[W]`
    v        `[W, L, n]`, activations; 0 where the crosscoder was not trained
    """

    latents: Sequence[int]
    ids: Tensor
    template: Tensor
    real: Tensor
    is_chat: Tensor
    v: Tensor

    @classmethod
    def of(
        cls, latents: Sequence[int], ids: Tensor, roles: Tensor, real: Tensor, is_chat: Tensor, v: Tensor, length: int
    ) -> Windows:
        """From rows `[R, T]` and `[R]`, and v `[R, T, n]`; what is left at the end of a row is dropped."""
        n = ids.shape[1] // length

        def cut(rows: Tensor) -> Tensor:
            return rows[:, : n * length].reshape(len(rows) * n, length, *rows.shape[2:])

        kept = cut(real).float().mean(1) >= LEAST_REAL
        template = is_role(roles, "template") & is_chat[:, None]
        ids, template, real = (cut(part)[kept] for part in (ids, template, real))
        return cls(latents, ids, template, real, is_chat.repeat_interleave(n)[kept], cut(v)[kept])

    @cached_property
    def largest(self) -> Tensor:
        """`[W, n]`, the largest activation in each window."""
        return self.v.amax(1)

    def strongest(self, i: int, n: int) -> list[int]:
        """The n windows in which the i-th latent is strongest, or as many as there are, strongest first."""
        values, windows = self.largest[:, i].topk(min(n, len(self.ids)))
        return windows[values > COUNTED].tolist()

    def by_quantile(self, i: int, n_quantiles: int, n_each: int, seed: int) -> list[list[int]]:
        """For each quantile of the activating windows, weakest first, n windows drawn at random, or all."""
        windows = (self.largest[:, i] > COUNTED).nonzero().squeeze(1)
        ordered = windows[self.largest[windows, i].argsort(stable=True)]
        g = generator(seed, "contexts", self.latents[i])
        return [part[torch.randperm(len(part), generator=g)[:n_each]].tolist() for part in ordered.chunk(n_quantiles)]

    def non_activating(self, i: int, n: int, seed: int) -> list[int]:
        """n windows drawn at random from those in which the latent is off everywhere."""
        windows = (self.largest[:, i] <= 0).nonzero().squeeze(1)
        g = generator(seed, "negatives", self.latents[i])
        return windows[torch.randperm(len(windows), generator=g)[:n]].tolist()

    def context(self, window: int, i: int, tokenizer: Any) -> Context:
        """A window in words, without its padding; strengths are shares of the latent's maximum over all windows."""
        real = self.real[window]
        strengths = self.v[window, real, i] / self.largest[:, i].max().clamp(min=COUNTED)
        tokens = [tokenizer.decode([token_id]) for token_id in self.ids[window, real].tolist()]
        where = "chat" if self.is_chat[window] else "web"
        return Context(where, tokens, strengths.tolist(), self.template[window, real].tolist())


def write_for_judge(
    path: Path, windows: Windows, tokenizer: Any, n_quantiles: int, n_each: int, n_negative: int, seed: int
) -> None:
    """A line of JSON for each latent, which a judge can score: activating contexts by quantile (0 is the weakest), and
    non-activating ones. A context has its tokens, and how strongly the latent fires at each."""
    lines = []
    for i, latent in enumerate(windows.latents):
        drawn: list[tuple[str, int | None, int]] = [
            ("activating", quantile, window)
            for quantile, chosen in enumerate(windows.by_quantile(i, n_quantiles, n_each, seed))
            for window in chosen
        ]
        drawn += [("non_activating", None, window) for window in windows.non_activating(i, n_negative, seed)]
        contexts = [
            {"label": label, "quantile": quantile, **windows.context(window, i, tokenizer)._asdict()}
            for label, quantile, window in drawn
        ]
        lines.append(json.dumps({"latent": latent, "contexts": contexts}))
    write_atomically(path, "\n".join(lines) + "\n")
