"""Edit what a language model knows about an entity, through its latent's decoder row (Leask et al. 2025, the cities).

A dictionary's latent for entity A is turned into one for a chimera: its decoder row loses meta-latents of A and gains
meta-latents of entity B, in every combination. Prompts then show which attributes have become those of B. For
comparison the two whole latents are swapped. As controls there are edits of equal size along random directions, and
with the meta-latents of a third entity.

Shapes: T tokens in a prompt, d = width of the site, m latents, M meta-latents, E edits, n attributes, V values of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.errors import UserError
from core.methods.dictionary import Dictionary
from core.models.language_model import LanguageModel
from core.text.facts import ENTITY, Facts
from core.text.tokenizing import bos_token_id, token_ids

Preset = Literal["rebuild", "difference", "script_compat"]
Splice = Literal["error_kept", "reconstruction"]
SCRIPT_SCALE = 100.0  # factor of a meta-direction in the authors' script


# ---- questions


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt about one entity. tokens `[T]` begin with BOS; candidates `[V]` are the tokens of the values."""

    entity: str
    attribute: str
    tokens: Tensor
    entity_position: int
    candidates: Tensor


def ask(facts: Facts, tokenizer: Any) -> dict[str, dict[str, list[Question]]]:
    """entity -> attribute -> one question for each prompt.

    Raises UserError, naming the word, for a value or an entity that is not a single token.
    """
    bos = bos_token_id(tokenizer)
    candidates = {
        name: torch.tensor([single_token(tokenizer, facts.answer_prefix + value) for value in facts.values(name)])
        for name in facts.attributes
    }
    return {
        entity: {
            name: [
                Question(entity, name, *_with_entity(tokenizer, bos, prompt, entity), candidates[name])
                for prompt in facts.prompts[name]
            ]
            for name in facts.attributes
        }
        for entity in facts.entities
    }


def single_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is one token. Raises UserError for any other."""
    ids = _encode(tokenizer, text)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
        raise UserError(
            f"facts: {text!r} is {len(ids)} tokens of this model's tokenizer ({pieces}), but names and values must be "
            "single tokens. Choose another word, or another model."
        )
    return ids[0]


def _with_entity(tokenizer: Any, bos: int, prompt: str, entity: str) -> tuple[Tensor, int]:
    """A prompt's tokens, and the position of the entity."""
    before, _, after = prompt.partition(ENTITY)
    name = before[-1:].isspace() * before[-1:] + entity
    head = _encode(tokenizer, before[: len(before) - (len(name) - len(entity))])
    ids = [bos, *head, single_token(tokenizer, name), *_encode(tokenizer, after)]
    if ids[1:] != _encode(tokenizer, before + entity + after):
        raise UserError(f"facts.prompts: {entity!r} is not a single token in {before + entity + after!r}.")
    return torch.tensor(ids), len(head) + 1


def _encode(tokenizer: Any, text: str) -> list[int]:
    return token_ids(tokenizer, [text], "plain")[0] if text else []


# ---- latents


@dataclass(frozen=True)
class EntityLatent:
    """The latent that stands for an entity.

    activation   mean on the entity's token
    coverage     share of its prompts in which it fires there
    specificity  share of its activation that falls there, of all tokens but BOS in all entities' prompts
    """

    entity: str
    latent: int
    activation: float
    coverage: float
    specificity: float


@torch.no_grad()
def entity_latents(
    method: Dictionary,
    lm: LanguageModel,
    site: str,
    asked: Mapping[str, Mapping[str, Sequence[Question]]],
    min_coverage: float,
    min_specificity: float,
) -> dict[str, EntityLatent | None]:
    """The latent of every entity, or None. A candidate fires on the entity's token in at least `min_coverage` of its
    prompts, with at least `min_specificity` of its activation there. The candidate that contributes most (activation
    times row norm) is chosen."""
    total = torch.zeros(method.dict_size, device=method.W_dec.device)
    there: dict[str, Tensor] = {}
    for entity, questions in asked.items():
        rows = []
        for question in chain.from_iterable(questions.values()):
            codes = Clean.of(method, lm, site, question).codes  # [T, m]
            total += codes[1:].sum(0)
            rows.append(codes[question.entity_position])
        there[entity] = torch.stack(rows)  # [prompts, m]
    norms, latents = method.W_dec.norm(dim=1), {}
    for entity, codes in there.items():
        activation, coverage = codes.mean(0), (codes > 0).float().mean(0)
        specificity = codes.sum(0) / total.clamp(min=1e-12)
        fit = (coverage >= min_coverage) & (specificity >= min_specificity)
        latent = int((activation * norms * fit).argmax())
        values = (float(v[latent]) for v in (activation, coverage, specificity))
        latents[entity] = EntityLatent(entity, latent, *values) if fit[latent] else None
    return latents


def the_latent(latents: Mapping[str, EntityLatent | None], entity: str) -> EntityLatent:
    """Raises UserError for an entity that has no latent of its own."""
    latent = latents[entity]
    if latent is None:
        raise UserError(
            f"facts: no latent stands for {entity!r}: none fires often on its token and rarely elsewhere. Leave "
            "the entity out, choose a larger dictionary, or lower editing.min_specificity or editing.min_coverage."
        )
    return latent


@dataclass(frozen=True, eq=False)
class Clean:
    """A prompt before any edit.

    x      activations `[T, d]`
    codes  `[T, m]`, those of BOS set to 0
    x_hat  the reconstruction `[T, d]`, in raw space
    scale  `[T, 1]`, from the dictionary's space to the raw one
    """

    question: Question
    x: Tensor
    codes: Tensor
    x_hat: Tensor
    scale: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, method: Dictionary, lm: LanguageModel, site: str, question: Question) -> Clean:
        x = lm.capture(question.tokens[None], site)[0].float()
        normalised, shift = method.norm(x)
        codes = method.encode(normalised)
        dense, x_hat = codes.dense().clone(), method.norm.undo(method.decode(codes), shift)
        dense[0] = 0  # no edit touches BOS
        return cls(question, x, dense, x_hat, shift.scale.expand(len(x), 1))


# ---- decoder rows


@dataclass(frozen=True, eq=False)
class Composition:
    """The meta-latents `[n]` that make up a latent's row, strongest first, and their values `[n]`."""

    meta_latents: Tensor
    values: Tensor

    @classmethod
    def of(cls, codes: Tensor, at_most: int | None = None) -> Composition:
        """From the codes `[M]` of one row: all active meta-latents, or the `at_most` strongest."""
        order = codes.argsort(descending=True, stable=True)
        chosen = order[: int((codes > 0).sum())][:at_most]
        return cls(chosen, codes[chosen])


@dataclass(frozen=True, eq=False)
class MetaEdits:
    """Every edit of one latent's row. removed bool `[E, nA]`, added bool `[E, nB]`; edit 0 changes nothing."""

    removed: Tensor
    added: Tensor

    @classmethod
    def all_pairs(cls, n_removable: int, n_addable: int, limit: int) -> MetaEdits:
        """All pairs of a subset to remove and a subset to add. Raises UserError if there are more than `limit`."""
        n = n_removable + n_addable
        if 2**n > limit:
            raise UserError(
                f"editing.max_edits={limit}: {n_removable} meta-latents to remove and {n_addable} to add make 2^{n} = "
                f"{2**n:,} edits. Raise it, or lower editing.meta_latents_per_row."
            )
        bits = (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2 == 1  # [E, n]
        return cls(bits[:, :n_removable], bits[:, n_removable:])

    def __len__(self) -> int:
        return len(self.removed)


def edited_rows(
    row: Tensor, own: Composition, other: Composition, edits: MetaEdits, meta: Directions, preset: Preset
) -> Tensor:
    """The row `[d]` of A's latent under every edit: `[E, d]`.

    rebuild        the meta-dictionary's reconstruction of the row, with the removed meta-latents of A at 0 and the
                   added ones at their value in B's row (also where A has it), at the old norm
    difference     the row itself plus the change of the reconstruction, at the old norm: the part of the row that the
                   meta-dictionary does not explain stays
    script_compat  the authors' script: minus 100 times each removed meta-direction, plus 100 times each added one, at
                   norm 1
    `own`, `other`: the compositions of A's row and of B's, at unit norm. `meta`: the directions of the edits.
    """
    removed, added = edits.removed.to(row.device), edits.added.to(row.device)
    unit = normalize(row, dim=0)
    before = torch.zeros(len(meta.along), device=row.device).index_put((own.meta_latents,), own.values)  # [M]
    if preset == "script_compat":
        change = torch.zeros(len(edits), len(before), device=row.device)
        change[:, own.meta_latents] -= SCRIPT_SCALE * removed.float()
        change[:, other.meta_latents] += SCRIPT_SCALE * added.float()
        return normalize(unit + change @ meta.along, dim=1)
    after = before.repeat(len(edits), 1)  # [E, M]
    after[:, own.meta_latents] = own.values * ~removed
    after[:, other.meta_latents] = torch.where(added, other.values, after[:, other.meta_latents])
    base = unit if preset == "difference" else before @ meta.W_dec + meta.b_dec
    return normalize(base + (after - before) @ meta.along, dim=1) * row.norm()


@dataclass(frozen=True, eq=False)
class Directions:
    """A meta-dictionary's W_dec `[M, d]` and b_dec `[d]`, and the directions `along` which rows are edited, `[M,
    d]`."""

    W_dec: Tensor
    b_dec: Tensor
    along: Tensor

    @classmethod
    def of(cls, meta: Dictionary) -> Directions:
        W_dec = meta.W_dec.detach()
        return cls(W_dec, meta.b_dec.detach(), W_dec)

    def random(self, g: torch.Generator) -> Directions:
        """The same with random directions of the same norms: a control."""
        drawn = normalize(torch.randn(self.W_dec.shape, generator=g), dim=1).to(self.W_dec)
        return Directions(self.W_dec, self.b_dec, drawn * self.W_dec.norm(dim=1, keepdim=True))


# ---- what an edit does


@dataclass(frozen=True, eq=False)
class Editor:
    """Run a language model with edited latents of a dictionary at a site.

    splice  `error_kept`: the dictionary's error stays in the activation, so that no edit is no change;
            `reconstruction`: activations are replaced by the edited reconstruction, as in the authors' script
    """

    method: Dictionary
    lm: LanguageModel
    site: str
    splice: Splice
    rows_per_forward: int

    def clean(self, question: Question) -> Clean:
        return Clean.of(self.method, self.lm, self.site, question)

    @cached_property
    def W_dec(self) -> Tensor:  # noqa: N802
        return self.method.W_dec.detach()

    def with_rows(self, clean: Clean, latent: int, rows: Tensor, unit_decoder: bool = False) -> Tensor:
        """Log-probabilities `[E, V]` of the candidates, with the latent's decoder row replaced by each of `[E, d]`.

        unit_decoder: all other rows at unit norm, as in the authors' script."""
        f = clean.codes[:, latent]  # [T]
        change = f[:, None] * (rows[:, None] - self.W_dec[latent])  # [E, T, d]
        if unit_decoder:
            others = clean.codes.clone()
            others[:, latent] = 0
            change = change + others @ (normalize(self.W_dec, dim=1) - self.W_dec)
        return self._log_probs(clean, change)

    def with_swap(self, clean: Clean, latent: int, other: int, value: float, only_where_active: bool = False) -> Tensor:
        """Log-probabilities `[1, V]` with one latent at 0 and another at `value`, at all positions but BOS, or only
        where the first was active."""
        f = clean.codes  # [T, m]
        where = (f[:, latent] > 0 if only_where_active else torch.arange(len(f), device=f.device) > 0).float()
        change = where[:, None] * (
            (value - f[:, other])[:, None] * self.W_dec[other] - f[:, latent, None] * self.W_dec[latent]
        )
        return self._log_probs(clean, change[None])

    def unedited(self, clean: Clean) -> Tensor:
        """Log-probabilities `[1, V]` of the candidates without an edit, spliced in the same way."""
        return self._log_probs(clean, torch.zeros_like(clean.x)[None])

    @torch.no_grad()
    def _log_probs(self, clean: Clean, change: Tensor) -> Tensor:
        """`change` `[E, T, d]` is in the dictionary's space."""
        base = clean.x if self.splice == "error_kept" else torch.cat([clean.x[:1], clean.x_hat[1:]])
        tokens, candidates = clean.question.tokens[None], clean.question.candidates.to(base.device)
        log_probs = []
        for part in change.split(self.rows_per_forward):
            x = (base + clean.scale * part).to(self.lm.dtype)  # [E, T, d]
            logits = self.lm.logits_with(x, tokens.expand(len(x), -1), self.site, last=1)[:, -1]
            log_probs.append(logits.float().log_softmax(-1)[:, candidates])
        return torch.cat(log_probs)


@dataclass(frozen=True, eq=False)
class Outcome:
    """How edits changed the attributes of A, which should become B's.

    log_probs   attribute -> `[E, V]`, the mean over its prompts
    clean       attribute -> `[V]`, without an edit
    old, new    attribute -> the candidate that is A's value, and B's
    """

    log_probs: Mapping[str, Tensor]
    clean: Mapping[str, Tensor]
    old: Mapping[str, int]
    new: Mapping[str, int]

    @cached_property
    def subsets(self) -> Tensor:
        """int64 `[E]`: the attributes that became B's while all others stayed A's, as bits in the attributes' order;
        -1 if some attribute became neither's. The most likely candidate decides."""
        flipped, kept = [], []
        for name, scores in self.log_probs.items():
            winner = scores.argmax(1)
            flipped.append(winner == self.new[name])
            kept.append(winner == self.old[name])
        is_new, is_old = torch.stack(flipped, 1), torch.stack(kept, 1)  # [E, n]
        bits = (is_new.long() << torch.arange(is_new.shape[1], device=is_new.device)).sum(1)
        return bits.where((is_new | is_old).all(1), -1)

    @property
    def reached(self) -> set[int]:
        """The subsets of attributes that some edit turned into B's, except the empty one."""
        return set(self.subsets.tolist()) - {-1, 0}

    @cached_property
    def changes(self) -> Tensor:
        """`[E, n]`, nats: by how much log p(B's value) - log p(A's value) has risen."""
        names = list(self.log_probs)
        after = torch.stack([self.log_probs[a][:, self.new[a]] - self.log_probs[a][:, self.old[a]] for a in names], 1)
        return after - torch.stack([self.clean[a][self.new[a]] - self.clean[a][self.old[a]] for a in names])

    def selectivity(self) -> tuple[float, float]:
        """(targets, others), nats: the mean change of the attributes in a subset and outside it, under the edit with
        the largest difference; averaged over all subsets but the empty and the whole one."""
        n = self.changes.shape[1]
        of_targets, of_others = [], []
        for subset in range(1, 2**n - 1):
            inside = torch.tensor([bool(subset >> i & 1) for i in range(n)], device=self.changes.device)
            targets, others = self.changes[:, inside].mean(1), self.changes[:, ~inside].mean(1)
            best = int((targets - others).argmax())
            of_targets.append(float(targets[best]))
            of_others.append(float(others[best]))
        return sum(of_targets) / len(of_targets), sum(of_others) / len(of_others)

    def metrics(self) -> dict[str, float]:
        """The share of the 2^n - 1 subsets that were reached, and of the 2^n - 2 proper ones; whether the whole one
        was; the selectivity and its two parts."""
        n = len(self.log_probs)
        proper = self.reached - {2**n - 1}
        targets, others = self.selectivity()
        return {
            "reached_fraction": len(self.reached) / (2**n - 1),
            "reached_proper_fraction": len(proper) / (2**n - 2),
            "reached_all": float(2**n - 1 in self.reached),
            "selectivity_nats": targets - others,
            "target_change_nats": targets,
            "other_change_nats": others,
        }
