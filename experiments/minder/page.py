"""The page that minder_crosscoder ends in: what a crosscoder says a tuning changed (`core.analysis.diff_page`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
from omegaconf import DictConfig

from core.analysis.diff_page import Bar, Fact, Kind, Latent, Point, write_page
from core.analysis.latent_use import LatentUse
from core.analysis.patching import PatchedKL, patched_kl
from core.analysis.specificity import Specificity
from experiments.minder.analysis import Trained, measured_latents
from experiments.minder.causality import asked_dialogues, interventions, most_specific
from experiments.minder.common import held_out_batches, pair
from experiments.minder.templates import windows_of

PAGE = "diff.html"
SHOWN = {  # interventions on the page, and their names there
    "none": "nothing (base model)",
    "effective": "latents that lean to chat",
    "best_rank_sum": "best half by Latent Scaling",
    "worst_rank_sum": "worst half by Latent Scaling",
    "random_0": "a random half",
    "template": "template tokens",
    "all": "every latent",
    "error": "what no latent holds",
}
WHERE = {"all": "all tokens of answers", "first": "the first tokens of answers"}


def write(cfg: DictConfig, trained: Trained, metrics: Mapping[str, float]) -> None:
    """`diff.html` in the cell's folder, with `page.n_latents` latents; nothing for 0 of them."""
    if not cfg.page.n_latents:
        return
    found = measured_latents(cfg, trained)
    use = trained.use(held_out_batches(cfg))
    listed = np.array(in_order(found)[: cfg.page.n_latents])
    models = pair(cfg)
    write_page(
        Path(cfg.cell_folder) / PAGE,
        f"{models.chat.name} against {models.base.name}, at {models.site}",
        note(cfg, trained, found),
        facts(found, metrics),
        points(found, use),
        latents(cfg, trained, use, listed),
        bars(cfg, trained, found),
    )


def in_order(found: Specificity) -> list[int]:
    """The compared latents: those that are ranked, most specific first, then the others by Delta_norm."""
    ranked = most_specific(found, len(found.table))
    rest = [i for i in np.argsort(-found.table["delta"].to_numpy(), kind="stable") if found.effective[i]]
    return list(dict.fromkeys([*ranked, *map(int, rest)]))


def note(cfg: DictConfig, trained: Trained, found: Specificity) -> str:
    kind = type(trained.crosscoder).__name__
    words = f"{kind} with {trained.crosscoder.dict_size:,} latents, seed {cfg.seed}, {cfg.stream.n_tokens:,} tokens. "
    how = "with the highest Delta_norm (none has 0.9 or more)" if found.is_ranked else "with Delta_norm of 0.9 or more"
    if found.is_ranked and ((found.table["class"] == "chat_only") & (found.table["n_active"] > 0)).any():
        how = "with the highest Delta_norm"
    return f"{words}The list has latents {how}, the most specific to the chat model first."


def facts(found: Specificity, metrics: Mapping[str, float]) -> list[Fact]:
    chosen = found.effective
    return [
        Fact("variance explained, base", f"{metrics['fve_base']:.1%}"),
        Fact("variance explained, chat", f"{metrics['fve_chat']:.1%}"),
        Fact("active latents per token", f"{metrics['l0']:.1f}"),
        Fact("latents that never fire", f"{metrics['n_dead']:.0f} of {len(found.table):,}"),
        Fact(
            "listed latents that Latent Scaling calls specific", f"{(found.specific & chosen).sum()} of {chosen.sum()}"
        ),
        Fact("base-only twins of chat-only latents", f"{metrics['n_twins']:.0f}"),
    ]


def points(found: Specificity, use: LatentUse) -> list[Point]:
    """Latents that fire on held-out text or did in the training."""
    table, specific = found.table, found.specific
    alive = (table["n_active"] > 0).to_numpy() | (use.counts.sum(1) > 0)
    judged = found.judged
    error, reconstruction = (np.where(judged, table[f"nu_{target}"], np.nan) for target in ("error", "reconstruction"))
    return [
        Point(
            int(i),
            cast(Kind, table["class"][i]),
            float(table["delta"][i]),
            float(error[i]),
            float(reconstruction[i]),
            bool(specific[i]),
        )
        for i in np.flatnonzero(alive)
    ]


def latents(cfg: DictConfig, trained: Trained, use: LatentUse, listed: np.ndarray) -> list[Latent]:
    windows, tokenizer = windows_of(cfg, trained, listed, cfg.page.window), pair(cfg).tokenizer
    web, template, words = use.n_tokens
    share = use.template_share
    return [
        Latent(
            int(latent),
            float(use.counts[latent, 0] / max(1, web)),
            float(use.counts[latent, 1:].sum() / max(1, template + words)),
            float(share[latent]),
            [windows.context(window, i, tokenizer) for window in windows.strongest(i, cfg.page.n_contexts)],
        )
        for i, latent in enumerate(listed)
    ]


def bars(cfg: DictConfig, trained: Trained, found: Specificity) -> list[Bar]:
    wanted = [one for one in interventions(found, cfg.causality.random_halves) if one.name in SHOWN]
    tokens = asked_dialogues(cfg)
    result: PatchedKL = patched_kl(pair(cfg), trained.crosscoder, tokens, wanted, cfg.causality.rows_per_batch)
    pools, made = {one.name: one.pool for one in wanted}, []
    for positions, where in WHERE.items():
        means = result.at("first" if positions == "first" else "all")
        for name, words in SHOWN.items():
            if name in pools and means.n:
                mean = means.mean(name)
                made.append(Bar(words, where, mean.mean, mean.low, mean.high, pools[name]))
    return made
