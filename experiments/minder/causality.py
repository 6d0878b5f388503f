"""Which latents carry the chat model's behaviour (Minder et al. 2025, sec. 3.3): KL under patching, and steering."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis.answers import answered
from core.analysis.paired_tokens import PairedTokens
from core.analysis.patching import Intervention, Kind, PatchedKL, halves, patched_kl, random_half
from core.analysis.specificity import Rank, Specificity
from core.analysis.steering import continuation, push_of
from core.atomic import write_atomically, write_table
from core.building import build
from core.errors import UserError
from core.text.chat import Message, chat_tokens, prompt_of
from core.text.dialogue_sources import first_dialogues
from core.text.paired_rows import Row
from experiments.common import once_per
from experiments.minder.analysis import Trained, measured_latents, the_crosscoder
from experiments.minder.common import check, dictionaries, held_out_batches, later_dictionaries, pair, paired_source
from experiments.minder.settings import CausalitySettings

__all__ = ["SETTINGS", "check", "dictionaries", "later_dictionaries", "run"]

SETTINGS = CausalitySettings

RANKS: tuple[Rank, Rank] = ("delta", "rank_sum")
POSITIONS: tuple[Literal["all", "first"], ...] = ("all", "first")
HOW: dict[Literal["replace", "add"], str] = {"replace": "", "add": "_add"}
LEANING = 0.7  # Delta_norm from which a latent leans to the chat model
LOW_ACTIVATION_RATIOS = (0.6, 0.3)  # bounds of |nu_activation| (authors' code)


def run(cfg: DictConfig) -> dict[str, float]:
    """Put latents into the base model's activations, and see how much of the chat model comes back.

    Claims: minder/causality-1 to -8.
    """
    trained = the_crosscoder(cfg)
    found = measured_latents(cfg, trained)
    tokens = asked_dialogues(cfg)
    wanted = list(interventions(found, cfg.causality.random_halves))
    result = patched_kl(pair(cfg), trained.crosscoder, tokens, wanted, cfg.causality.rows_per_batch)
    folder = Path(cfg.cell_folder)
    write_table(kl_table(result, wanted), folder / "kl.parquet")
    gaps = gap_table(result)
    write_table(gaps, folder / "gaps.parquet")
    return {
        "n_dialogues": float(len(tokens)),
        "n_effective": float(found.effective.sum()),
        "effective_is_ranked": float(found.is_ranked),
        "n_ranked": float(found.ranked.sum()),
        **kl_metrics(result, cfg.causality.random_halves),
        **{f"kl_{row.a}_minus_{row.b}_{row.positions}": row.difference for row in gaps.itertuples()},
        **steer(cfg, trained, found, folder),
    }


# ---- dialogues


ASKED = ("pair", "data", "dialogues", "stream.n_ctx", "evaluation", "causality")


@once_per(*ASKED)
def asked_dialogues(cfg: DictConfig) -> PairedTokens:
    """Held-out dialogues: as they are, or the first question of each with the chat model's own answer."""
    c, chat = cfg.causality, pair(cfg).chat
    given = first_dialogues(build(cfg.dialogues), "heldout", cfg.evaluation.seed, c.n_dialogues)
    rows = [
        answered(chat, messages, c.max_new_tokens, cfg.stream.n_ctx)
        if c.answers == "greedy"
        else as_written(cfg, messages)
        for messages in given
    ]
    kept = [row for row in rows if row is not None]
    if not kept:
        raise UserError(f"stream.n_ctx: none of {len(given)} dialogues fits into {cfg.stream.n_ctx} tokens.")
    return PairedTokens.of(kept, paired_source(cfg).settings.skipped)


def as_written(cfg: DictConfig, messages: Sequence[Message]) -> Row:
    chat = chat_tokens(pair(cfg).tokenizer, messages)
    return Row(chat.ids[: cfg.stream.n_ctx], chat.roles[: cfg.stream.n_ctx], True)


# ---- interventions


def interventions(found: Specificity, n_random: int) -> Iterator[Intervention]:
    """All of the paper's, and halves drawn at random. The pool is in every one."""
    kinds: tuple[Kind, ...] = ("none", "all", "error", "template")
    yield from (Intervention(kind, kind, pool="every latent" if kind == "all" else "") for kind in kinds)
    pool = torch.from_numpy(found.ranked)
    how_chosen = "with the highest Delta_norm" if found.is_ranked else "with Delta_norm >= 0.9"
    words = f"{int(pool.sum())} latents {how_chosen}, ratios within [-0.1, 2]"
    sets = {"effective": (pool, words)}
    for rank in RANKS:
        best, worst = halves(found.scores(rank), pool)
        sets |= {f"best_{rank}": (best, words), f"worst_{rank}": (worst, words)}
    sets |= {f"random_{i}": (random_half(pool, seed=i), words) for i in range(n_random)}
    judged, words = torch.from_numpy(found.judged), "every latent that fires 100 times"
    sets["delta_high"] = (judged & _mask(found.table["delta"] >= LEANING), words)
    for bound in LOW_ACTIVATION_RATIOS:
        low = _mask(found.table["nu_activation"].abs() <= bound)
        sets[f"nu_activation_{bound:g}"] = (judged & low, words)
    for kind, suffix in HOW.items():
        for name, (latents, pool_words) in sets.items():
            yield Intervention(f"{name}{suffix}", kind, latents, pool_words)


def _mask(values: pd.Series[bool]) -> Tensor:
    return torch.from_numpy(values.to_numpy(copy=True))


# ---- tables


def kl_table(result: PatchedKL, wanted: Sequence[Intervention]) -> pd.DataFrame:
    """A row for each intervention and set of positions."""
    rows = []
    for positions in POSITIONS:
        means = result.at(positions)
        for intervention in wanted:
            mean, (reduction, low, high) = means.mean(intervention.name), means.reduction(intervention.name)
            latents = intervention.latents
            rows.append(
                {
                    "intervention": intervention.name,
                    "pool": intervention.pool,
                    "n_latents": None if latents is None else int(latents.sum()),
                    "positions": positions,
                    "n_positions": means.n,
                    **mean._asdict(),
                    "reduction": reduction,
                    "reduction_low": low,
                    "reduction_high": high,
                }
            )
    return pd.DataFrame(rows)


def gap_table(result: PatchedKL) -> pd.DataFrame:
    """Differences of interventions, a minus b, with their intervals over dialogues."""
    pairs = [(f"worst_{rank}{suffix}", f"best_{rank}{suffix}") for rank in RANKS for suffix in HOW.values()]
    rows = [
        {"a": a, "b": b, "positions": positions, "difference": difference, "low": low, "high": high}
        for positions in POSITIONS
        for a, b in pairs
        for difference, low, high in [result.at(positions).difference(a, b)]
    ]
    return pd.DataFrame(rows)


def kl_metrics(result: PatchedKL, n_random: int) -> dict[str, float]:
    """Mean KL and how much of it each intervention takes away; random halves are averaged."""
    metrics = {}
    for positions in POSITIONS:
        means = result.at(positions)
        for name in result.names:
            metrics[f"kl_{name}_{positions}"] = means.mean(name).mean
            metrics[f"kl_reduction_{name}_{positions}"] = means.reduction(name)[0]
        for suffix in HOW.values():
            for form in ("kl", "kl_reduction"):
                own = [metrics.pop(f"{form}_random_{i}{suffix}_{positions}") for i in range(n_random)]
                metrics[f"{form}_random{suffix}_{positions}"] = sum(own) / n_random
    return metrics


# ---- steering


def steer(cfg: DictConfig, trained: Trained, found: Specificity, folder: Path) -> dict[str, float]:
    """What the chat model writes with and without a push along the most specific latents: `steering.jsonl`."""
    s, models = cfg.steering, pair(cfg)
    if not s.n_latents or not s.n_prompts:
        return {}
    questions = [
        [message for message in islice(dialogue, 1) if message["role"] == "user"]
        for dialogue in first_dialogues(build(cfg.dialogues), "heldout", cfg.evaluation.seed, s.n_prompts)
    ]
    largest = trained.use(held_out_batches(cfg)).largest
    lines = []
    for latent in most_specific(found, s.n_latents):
        for question in (q for q in questions if q):
            prompt = prompt_of(models.tokenizer, question)
            ids = prompt.chat.ids[-(cfg.stream.n_ctx - s.max_new_tokens) :]
            before = continuation(models.chat, ids, s.max_new_tokens, prompt.end)
            for alpha in s.alphas:
                push: Tensor = push_of(trained.decoder[latent, 1], float(largest[latent]), alpha)
                after = continuation(models.chat, ids, s.max_new_tokens, prompt.end, push, models.site, s.prompt_only)
                lines.append({"latent": latent, "delta": float(found.table["delta"][latent]), "alpha": alpha,
                              "question": question[0]["content"], "before": before, "after": after})  # fmt: skip
    write_atomically(folder / "steering.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    return {"steering_changed_share": sum(line["before"] != line["after"] for line in lines) / max(1, len(lines))}


def most_specific(found: Specificity, n: int) -> list[int]:
    """The latents with the lowest rank sums; where none is ranked, those with the highest Delta_norm."""
    chosen = torch.from_numpy(found.ranked if found.ranked.any() else found.effective)
    scores = found.scores("rank_sum" if found.ranked.any() else "delta")
    latents = chosen.nonzero().squeeze(1)
    return latents[scores[latents].argsort(descending=True, stable=True)[:n]].tolist()
