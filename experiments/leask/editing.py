"""Editing what a language model knows of an entity through meta-latents (Leask et al. 2025, the cities)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis.editing import (
    Composition,
    Directions,
    Editor,
    EntityLatent,
    MetaEdits,
    Outcome,
    Preset,
    Question,
    ask,
    edited_rows,
    entity_latents,
    the_latent,
)
from core.analysis.meta_sae import decompose, meta_request, trained_metas
from core.atomic import write_table
from core.building import build, plain
from core.errors import UserError
from core.fleet import Request
from core.methods.batchtopk import BatchTopK
from core.methods.dictionary import Dictionary
from core.metrics.reconstruction import VarianceExplained
from core.metrics.statistics import bootstrap_interval
from core.models.finetune import fine_tuned
from core.models.language_model import LanguageModel
from core.runtime import Runtime
from core.seeding import generator
from core.streams.decoder_rows import directions
from core.text.facts import Facts
from experiments.common import language_model, meta_node, requests, trained
from experiments.leask.settings import EditingSettings

SETTINGS = EditingSettings

Asked = Mapping[str, Mapping[str, Sequence[Question]]]
CONTROLS = ("random", "third")  # what the meta-latents' edits are compared with, of as many edits
KINDS = ("meta", *CONTROLS, "swap", "swap_at_entity")


def check(cfg: DictConfig) -> None:
    """Raises UserError for a dictionary of decoder rows that is not made of all rows alike."""
    if cfg.meta.min_firing_rate is not None or cfg.meta.sampling == "frequency":
        raise UserError(
            "leask_editing takes all decoder rows alike: meta.min_firing_rate=null and meta.sampling=shuffled."
        )


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell. The model first learns facts that it does not know."""
    return requests(planted(cfg))


def later_dictionaries(cfg: DictConfig) -> Iterator[list[Request]]:
    """What the fleet trains once the dictionary is there."""
    cfg = planted(cfg)
    yield [meta_dictionary(cfg, trained(cfg))]


def run(cfg: DictConfig) -> dict[str, float]:
    """For pairs of entities A and B, try every edit of A's decoder row that removes meta-latents of A and adds some of
    B. Which subsets of attributes become B's while the others stay A's? The controls are a swap of the two latents,
    random directions instead of the meta-latents', and the meta-latents of a third entity.

    Claims: leask/editing-1 to -5.
    """
    cfg = planted(cfg)
    facts, lm, method = build(cfg.facts), language_model(cfg), trained(cfg)
    asked = ask(facts, lm.tokenizer)
    known, knowledge = known_entities(lm, asked, facts)
    n_prompts = cfg.editing.prompts_per_attribute
    latents = entity_latents(method, lm, cfg.stream.site, asked, cfg.editing.min_coverage, cfg.editing.min_specificity)
    [meta] = trained_metas([meta_dictionary(cfg, method)], Runtime.of(cfg), method.W_dec.device)
    chosen = trios(cfg, facts, [entity for entity in facts.entities if latents[entity]], known)
    compositions = composed_of(cfg, meta, method, {name: latent for name, latent in latents.items() if latent})
    editor = Editor(method, lm, cfg.stream.site, cfg.editing.splice, cfg.editing.rows_per_forward)
    few = {e: {a: questions[:n_prompts] for a, questions in own.items()} for e, own in asked.items()}
    study = Study(cfg, editor, facts, few, latents, compositions, Directions.of(meta))
    outcomes = [(trio, study.outcomes(trio)) for trio in chosen]
    save_tables(Path(cfg.cell_folder), facts, latents, compositions, outcomes)
    rows = learned_rows(method)
    return {
        **knowledge,
        "n_rows": len(rows),
        "n_pairs": len(chosen),
        "n_entities": len(facts.entities),
        "n_entities_with_latent": len(compositions),
        "entity_latent_specificity": mean(latent.specificity for latent in latents.values() if latent),
        "entity_latent_coverage": mean(latent.coverage for latent in latents.values() if latent),
        "meta_latents_per_entity": mean(len(c.values) for c in compositions.values()),
        "meta_ve": VarianceExplained.of(rows, meta.decode(decompose(meta, rows))).centred,
        **summary([{kind: outcome.metrics() for kind, outcome in by_kind.items()} for _, by_kind in outcomes]),
    }


def planted(cfg: DictConfig) -> DictConfig:
    """The configuration with a model trained on the facts' statements; unchanged if the facts have none."""
    if not build(cfg.facts).statements:
        return cfg
    changed = cfg.copy()
    changed.model.source = str(fine_tuned(Runtime.of(cfg), plain(cfg.model), build(cfg.data), plain(cfg.planting)))
    changed.model.name = f"{cfg.model.name} with planted facts"
    return changed


def meta_dictionary(cfg: DictConfig, method: Dictionary) -> Request:
    """One trained on the directions of all decoder rows except those of dead latents, which are random."""
    return meta_request(meta_node(cfg), learned_rows(method), cfg.trainer.precision)


def learned_rows(method: Dictionary) -> Tensor:
    """Unit directions of the latents that are alive, `[N, d]`."""
    return directions(method.W_dec[~method.dead], "method")


def composed_of(
    cfg: DictConfig, meta: BatchTopK, method: Dictionary, latents: Mapping[str, EntityLatent]
) -> dict[str, Composition]:
    """The meta-latents that make up each entity's latent."""
    rows = directions(method.W_dec, "method")
    codes = decompose(meta, rows[[latent.latent for latent in latents.values()]]).dense()
    at_most = cfg.editing.meta_latents_per_row
    return {entity: Composition.of(row, at_most) for entity, row in zip(latents, codes, strict=True)}


def known_entities(lm: LanguageModel, asked: Asked, facts: Facts) -> tuple[set[str], dict[str, float]]:
    """The entities of which the model gets all attributes right, and how often it is right among the values of an
    attribute, and among all tokens."""
    known: set[str] = set()
    right: list[bool] = []
    right_of_all: list[bool] = []
    log_probs: list[float] = []
    for entity, questions in asked.items():
        before = len(right)
        for question in (q for qs in questions.values() for q in qs):
            scores = lm.logits(question.tokens[None])[0, -1].float().log_softmax(-1).cpu()
            truth = facts.values(question.attribute).index(facts.answers[entity][question.attribute])
            right.append(int(scores[question.candidates].argmax()) == truth)
            right_of_all.append(int(scores.argmax()) == int(question.candidates[truth]))
            log_probs.append(float(scores[question.candidates[truth]]))
        if all(right[before:]):
            known.add(entity)
    return known, {
        "knowledge_accuracy": mean(right),
        "knowledge_accuracy_all_tokens": mean(right_of_all),
        "knowledge_log_prob_nats": mean(log_probs),
        "n_entities_known": len(known),
    }


Trio = tuple[str, str, str]  # A, whose row is edited; B, whose attributes are wanted; C, the control


def trios(cfg: DictConfig, facts: Facts, with_latent: Sequence[str], known: set[str]) -> list[Trio]:
    """(A, B, C): the pairs of `editing.pairs`, or `editing.n_pairs` random pairs that differ in all attributes, each
    with a third entity that shares no attribute with either. Raises UserError if there is none."""

    def apart(*entities: str) -> bool:
        return not any(facts.shared(a, b) for a, b in permutations(entities, 2))

    e = cfg.editing
    usable = [entity for entity in with_latent if entity in known or not e.only_known]
    wanted = [tuple(pair) for pair in e.pairs] if e.pairs else list(permutations(usable, 2))
    chosen = []
    for a, b in wanted:
        for entity in (a, b):
            if entity not in usable:
                lacking = "an attribute that the model gets wrong" if entity in with_latent else "no latent of its own"
                raise UserError(f"editing.pairs: {entity!r} has {lacking}.")
        thirds = [c for c in usable if c not in (a, b) and apart(a, b, c)]
        if thirds and apart(a, b):
            chosen.append((a, b, thirds[0]))
    if not chosen:
        raise UserError(
            f"facts: {len(with_latent)} of {len(facts.entities)} entities have a latent of their own, and the model "
            f"knows {len(usable)} of these. No three of them differ in every attribute. Train for longer "
            "(planting.n_tokens, stream.n_tokens), or lower editing.min_specificity."
        )
    order = torch.randperm(len(chosen), generator=generator(e.pair_seed, "pairs")).tolist()
    return [chosen[i] for i in order[: e.n_pairs]]


@dataclass(frozen=True, eq=False)
class Study:
    """What the edits of all pairs share."""

    cfg: DictConfig
    editor: Editor
    facts: Facts
    asked: Asked
    latents: Mapping[str, EntityLatent | None]
    compositions: Mapping[str, Composition]
    meta: Directions

    def outcomes(self, trio: Trio) -> dict[str, Outcome]:
        """What each kind of edit does to A's attributes."""
        a, b, _ = trio
        scores: dict[str, dict[str, Tensor]] = {}
        for attribute, questions in self.asked[a].items():
            asked = [
                self._scores(question, other, trio)
                for question, other in zip(questions, self.asked[b][attribute], strict=True)
            ]
            for kind in ("clean", *KINDS):
                scores.setdefault(kind, {})[attribute] = torch.stack([one[kind] for one in asked]).mean(0).cpu()
        clean = {attribute: log_probs[0] for attribute, log_probs in scores.pop("clean").items()}
        old, new = (
            {name: self.facts.values(name).index(self.facts.answers[entity][name]) for name in self.facts.attributes}
            for entity in (a, b)
        )
        return {kind: Outcome(log_probs, clean, old, new) for kind, log_probs in scores.items()}

    def _scores(self, question: Question, same_of_b: Question, trio: Trio) -> dict[str, Tensor]:
        """kind -> log-probabilities `[E, V]` of one prompt's candidates."""
        a, b, _ = (the_latent(self.latents, entity).latent for entity in trio)
        clean = self.editor.clean(question)
        script = self.cfg.editing.preset == "script_compat"
        value = float(clean.codes.max() if script else self.editor.clean(same_of_b).codes[:, b].max())
        return {
            "clean": self.editor.unedited(clean),
            "swap": self.editor.with_swap(clean, a, b, value),
            "swap_at_entity": self.editor.with_swap(clean, a, b, value, only_where_active=True),
            **{k: self.editor.with_rows(clean, a, rows, script) for k, rows in self.rows(trio).items()},
        }

    def rows(self, trio: Trio) -> dict[str, Tensor]:
        """kind -> A's row under every edit, `[E, d]`."""
        a, b, _ = trio
        preset: Preset = self.cfg.editing.preset
        row = self.editor.W_dec[the_latent(self.latents, a).latent]
        random = self.meta.random(generator(self.cfg.seed, "random meta-directions", a, b))
        own, other, third = (self.compositions[entity] for entity in trio)
        return {
            kind: edited_rows(row, own, source, edits_of(self.cfg, own, source), along, preset)
            for kind, source, along in (
                ("meta", other, self.meta),
                ("random", other, random),
                ("third", third, self.meta),
            )
        }


def edits_of(cfg: DictConfig, own: Composition, other: Composition) -> MetaEdits:
    return MetaEdits.all_pairs(len(own.values), len(other.values), cfg.editing.max_edits)


def summary(pairs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Means over pairs with 95 % bootstrap intervals, for each kind of edit, and for meta-latents minus each
    control."""
    metrics: dict[str, float] = {}
    for name in pairs[0]["meta"]:
        values = {kind: [pair[kind][name] for pair in pairs] for kind in KINDS}
        for control in (*CONTROLS, "swap"):
            values[f"meta_minus_{control}"] = [x - y for x, y in zip(values["meta"], values[control], strict=True)]
        for kind, of_pairs in values.items():
            metrics[f"{name}_{kind}"] = mean(of_pairs)
            if len(of_pairs) > 1 and kind != "swap_at_entity":
                interval = bootstrap_interval(of_pairs, seed=0)
                metrics |= {f"{name}_{kind}_low": interval.low, f"{name}_{kind}_high": interval.high}
    return metrics


def save_tables(
    folder: Path,
    facts: Facts,
    latents: Mapping[str, EntityLatent | None],
    compositions: Mapping[str, Composition],
    outcomes: Sequence[tuple[Trio, Mapping[str, Outcome]]],
) -> None:
    """latents.parquet: every entity's latent and its meta-latents; pairs.parquet: the metrics of each pair and kind of
    edit; answers.parquet: the log-probability of every candidate after every edit."""
    rows = [
        {**vars(latent), "meta_latents": compositions[entity].meta_latents.tolist(),
         "values": compositions[entity].values.tolist()}
        for entity, latent in latents.items() if latent
    ]  # fmt: skip
    write_table(pd.DataFrame(rows), folder / "latents.parquet")
    pairs = [
        {"entity": a, "target": b, "third": c, "kind": kind, "n_edits": len(outcome.subsets),
         "reached": sorted(outcome.reached), **outcome.metrics()}
        for (a, b, c), by_kind in outcomes for kind, outcome in by_kind.items()
    ]  # fmt: skip
    write_table(pd.DataFrame(pairs), folder / "pairs.parquet")
    write_table(pd.DataFrame(list(_answers(facts, outcomes))), folder / "answers.parquet")


def _answers(facts: Facts, outcomes: Sequence[tuple[Trio, Mapping[str, Outcome]]]) -> Iterator[dict[str, Any]]:
    for (a, b, _), by_kind in outcomes:
        clean = {name: scores[None] for name, scores in by_kind["meta"].clean.items()}
        for kind, log_probs in (("clean", clean), *((k, o.log_probs) for k, o in by_kind.items())):
            for attribute, scores in log_probs.items():
                for candidate, column in zip(facts.values(attribute), scores.T, strict=True):
                    for edit, log_prob in enumerate(column.tolist()):
                        yield {"entity": a, "target": b, "kind": kind, "edit": edit, "attribute": attribute,
                               "candidate": candidate, "log_prob": log_prob}  # fmt: skip


def mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
