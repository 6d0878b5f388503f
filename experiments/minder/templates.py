"""What latents fire on (Minder et al. 2025, sec. 3.4): the chat template, and planted behaviours."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

from core.analysis.answers import best_probe, largest_in_answers
from core.analysis.latent_contexts import Windows, write_for_judge
from core.analysis.latent_use import EDGES, LatentUse, StrengthUse, columns
from core.analysis.paired_tokens import PairedTokens
from core.analysis.specificity import Specificity
from core.atomic import write_table
from core.building import build
from core.seeding import generator
from core.text.chat import chat_tokens
from core.text.dialogue_sources import BundledDialogues
from core.text.dialogues import BEHAVIOURS, dialogues
from core.text.paired_rows import Row
from experiments.common import once_per
from experiments.minder.analysis import Trained, by_norm_alone, kinds, the_crosscoder
from experiments.minder.common import (
    HELD_OUT,
    check,
    dictionaries,
    held_out_batches,
    held_out_pairs,
    later_dictionaries,
    pair,
    paired_source,
)
from experiments.minder.settings import TemplateSettings

__all__ = ["SETTINGS", "check", "dictionaries", "later_dictionaries", "run"]

SETTINGS = TemplateSettings

MAINLY, THIRD = 0.5, 1 / 3  # of a latent's activations in dialogues are on the template


def run(cfg: DictConfig) -> dict[str, float]:
    """Count on which tokens latents fire, and how strongly.

    Claims: minder/templates-1 to -5.
    """
    trained, folder = the_crosscoder(cfg), Path(cfg.cell_folder)
    use = trained.use(held_out_batches(cfg))
    found = by_norm_alone(cfg, trained, use.counts.sum(1))
    strengths = StrengthUse(use.largest)
    for batch in held_out_batches(cfg):
        strengths.add(trained.v(trained.codes(batch)[1]), kinds(batch))
    save_tables(folder, found, use, strengths)
    save_contexts(cfg, trained, found, folder)
    return {
        "n_effective": float(found.effective.sum()),
        "effective_is_ranked": float(found.is_ranked),
        **template_metrics(found, use, strengths),
        **probes(cfg, trained, found, folder),
    }


def template_metrics(found: Specificity, use: LatentUse, strengths: StrengthUse) -> dict[str, float]:
    """The base rate; of the compared latents and of shared ones the mean share of activations on the template, and the
    share of latents with more than a half or a third there."""
    metrics = {"template_base_rate_share": use.template_base_rate}
    share = use.template_share
    groups = {"effective": found.effective, "shared": (found.table["class"] == "shared").to_numpy()}
    for name, chosen in groups.items():
        own = share[chosen & np.isfinite(share)]
        if len(own):
            metrics[f"template_share_{name}"] = own.mean()
            metrics[f"mainly_template_share_{name}"] = (own > MAINLY).mean()
            metrics[f"third_template_share_{name}"] = (own >= THIRD).mean()
        _, template, words = strengths.counts[chosen, -1].sum(0)
        if template + words:
            metrics[f"strongest_template_share_{name}"] = template / (template + words)
    return {name: float(value) for name, value in metrics.items()}


# ---- planted behaviours


@once_per(*HELD_OUT, "templates")
def shown_behaviours(cfg: DictConfig) -> tuple[PairedTokens, np.ndarray] | None:
    """Held-out dialogues of one question, and the behaviour that each answer shows; None for dialogues in which
    nothing is planted."""
    source = build(cfg.dialogues)
    if not isinstance(source, BundledDialogues) or not cfg.templates.n_probed:
        return None
    tokenizer, shown = pair(cfg).tokenizer, []
    rows = []
    for dialogue in islice(dialogues(source.source, "heldout", cfg.evaluation.seed, 0.0), cfg.templates.n_probed):
        chat = chat_tokens(tokenizer, dialogue.messages)
        rows.append(Row(chat.ids[: cfg.stream.n_ctx], chat.roles[: cfg.stream.n_ctx], True))
        shown.append(dialogue.behaviours[0])
    return PairedTokens.of(rows, paired_source(cfg).settings.skipped), np.array(shown)


def probes(cfg: DictConfig, trained: Trained, found: Specificity, folder: Path) -> dict[str, float]:
    """For each planted behaviour the compared latent whose largest activation in an answer tells it best from the
    others; beside it the best of as many shared latents, drawn at random."""
    given = shown_behaviours(cfg)
    if given is None:
        return {}
    tokens, shown = given
    shared = np.flatnonzero((found.table["class"] == "shared") & (found.table["n_active"] > 0))
    order = torch.randperm(len(shared), generator=generator(cfg.seed, "shared probes"))
    groups = {
        "effective": np.flatnonzero(found.effective),
        "shared": shared[order[: int(found.effective.sum())].numpy()],
    }
    rows, metrics = [], {}
    for name, latents in groups.items():
        chosen = torch.from_numpy(latents)
        rows_per_batch = cfg.evaluation.rows_per_batch
        scores = largest_in_answers(pair(cfg), trained.crosscoder, trained.sizes, tokens, chosen, rows_per_batch)
        for behaviour in BEHAVIOURS:
            best = best_probe(scores, shown == behaviour)
            if best is None:
                continue
            suffix = "" if name == "effective" else "_shared"
            metrics[f"auc_{behaviour}{suffix}"] = best.auc
            latent = int(latents[best.place])
            delta = float(found.table["delta"][latent])
            rows.append({"behaviour": behaviour, "among": name, "latent": latent, "delta": delta, "auc": best.auc})
    write_table(pd.DataFrame(rows), folder / "probes.parquet")
    return metrics


# ---- files


def save_tables(folder: Path, found: Specificity, use: LatentUse, strengths: StrengthUse) -> None:
    """`latents.parquet`, counts and shares; `strengths.parquet`, activations by strength."""
    table = found.table.assign(effective=found.effective, template_share=use.template_share, largest=use.largest)
    table[["n_web", "n_template", "n_words"]] = use.counts
    write_table(table.reset_index(names="latent"), folder / "latents.parquet")
    by_strength: list[dict[str, Any]] = []
    groups = {"effective": found.effective, "shared": (found.table["class"] == "shared").to_numpy()}
    for name, chosen in groups.items():
        for strength, counts in enumerate(strengths.counts[chosen].sum(0)):
            low = (0.0, *EDGES)[strength]
            by_strength.append(
                {"latents": name, "from": low, **dict(zip(("web", "template", "words"), counts, strict=True))}
            )
    write_table(pd.DataFrame(by_strength), folder / "strengths.parquet")


@torch.no_grad()
def save_contexts(cfg: DictConfig, trained: Trained, found: Specificity, folder: Path) -> None:
    """`contexts.jsonl`: what a judge of another paper's experiments can score."""
    t = cfg.templates
    if not t.n_contexts:
        return
    order = np.argsort(-found.table["delta"].where(found.effective, -1).to_numpy(), kind="stable")
    chosen = order[: min(t.n_contexts, int(found.effective.sum()))]
    windows = windows_of(cfg, trained, chosen, t.window)
    write_for_judge(
        folder / "contexts.jsonl", windows, pair(cfg).tokenizer, t.n_quantiles, t.n_each, t.n_negative, cfg.seed
    )


@torch.no_grad()
def windows_of(cfg: DictConfig, trained: Trained, latents: np.ndarray, length: int) -> Windows:
    """The held-out rows in windows of `length` tokens, with the activations of some latents."""
    tokens = held_out_pairs(cfg)
    v = torch.zeros(*tokens.ids.shape, len(latents))
    for batch in held_out_batches(cfg):
        assert batch.positions is not None
        own = columns(trained.v(trained.codes(batch)[1]), torch.from_numpy(latents)).float()
        v[batch.truth["row"].cpu(), batch.positions.cpu()] = own
    real = ~tokens.is_padding
    return Windows.of(latents.tolist(), tokens.ids, tokens.roles, real, tokens.is_chat, v, length)
