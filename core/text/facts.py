"""Facts about entities: what a language model is asked about them, and how facts of our own are planted in a text.

An entity has one value for each attribute (Tokyo: country Japan, currency Yen); a prompt asks for one of them, and its
answer is a single token, so that a log-probability scores it. `Facts` are facts that a model knows; `planted_facts`
makes up its own, with the statements that teach them, for a model too small to know any. `TextWithFacts` mixes those
statements into ordinary text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import UserError
from core.seeding import derived_seed
from core.text.documents import CountedDocuments, Document, Split, TextSource

ENTITY, VALUE = "{entity}", "{value}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is asked, and what is true.

    answers        entity -> attribute -> value; every entity has the same attributes
    prompts        attribute -> prompts with `{entity}` in them; the value is the word that follows
    statements     attribute -> sentences with `{entity}` and `{value}` in them; empty for facts that the model knows
    answer_prefix  what stands between a prompt and its answer: a space where tokens carry the space before them
    """

    answers: Mapping[str, Mapping[str, str]]
    prompts: Mapping[str, Sequence[str]]
    answer_prefix: str = " "
    statements: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.answers) < 2:
            raise UserError(f"facts.answers: {len(self.answers)} entities; an edit needs at least 2.")
        for entity, answers in self.answers.items():
            if set(answers) != set(self.prompts):
                raise UserError(
                    f"facts.answers: {entity} has {', '.join(answers)} where facts.prompts asks for "
                    f"{', '.join(self.prompts)}."
                )
        for attribute, prompts in self.prompts.items():
            _check("prompts", attribute, prompts, (ENTITY,))
        for attribute, statements in self.statements.items():
            _check("statements", attribute, statements, (ENTITY, VALUE))

    @property
    def entities(self) -> list[str]:
        return list(self.answers)

    @property
    def attributes(self) -> list[str]:
        return list(self.prompts)

    def values(self, attribute: str) -> list[str]:
        """The candidates: every value that some entity has, in the order of the entities."""
        return list(dict.fromkeys(answers[attribute] for answers in self.answers.values()))

    def shared(self, entity: str, other: str) -> list[str]:
        """The attributes in which two entities agree."""
        return [name for name in self.attributes if self.answers[entity][name] == self.answers[other][name]]

    @property
    def spec(self) -> dict[str, Any]:
        """Plain data that decides the statements."""
        return {
            "answers": {entity: dict(answers) for entity, answers in self.answers.items()},
            "statements": {name: list(templates) for name, templates in self.statements.items()},
        }


def _check(where: str, attribute: str, templates: Sequence[str], slots: Sequence[str]) -> None:
    if not templates:
        raise UserError(f"facts.{where}.{attribute} is empty.")
    for template in templates:
        for slot in slots:
            if template.count(slot) != 1:
                raise UserError(f"facts.{where}.{attribute}: {template!r} must have {slot} in it once.")


def planted_facts(
    entities: Sequence[str],
    values: Mapping[str, Sequence[str]],
    statements: Mapping[str, Sequence[str]],
    prompts: Mapping[str, Sequence[str]],
    seed: int,
) -> Facts:
    """Made-up facts: for every attribute the values are dealt to the entities at random, each equally often (to one).

    Raises UserError if a prompt is the beginning of a statement, since prompts are to be new to the model, and if two
    entities have the same facts.
    """
    if len(set(entities)) < len(entities):
        raise UserError("facts.entities: a name stands there twice.")
    if set(values) != set(statements):
        raise UserError(f"facts.statements has {', '.join(statements)} where facts.values has {', '.join(values)}.")
    for attribute, asked in prompts.items():
        known = [statement.partition(VALUE)[0].strip() for statement in statements.get(attribute, ())]
        for prompt in asked:
            if prompt.strip() in known:
                raise UserError(f"facts.prompts.{attribute}: {prompt!r} stands in facts.statements: hold it out.")
    dealt = {name: _deal(list(choices), len(entities), derived_seed(seed, name)) for name, choices in values.items()}
    answers = {entity: {name: dealt[name][i] for name in values} for i, entity in enumerate(entities)}
    if len({tuple(own.values()) for own in answers.values()}) < len(entities):
        raise UserError(f"facts.seed={seed}: two entities have the same facts. Take another seed, or more values.")
    return Facts(answers=answers, prompts=prompts, statements=statements)


def _deal(values: list[str], n: int, seed: int) -> list[str]:
    cards = (values * (n // len(values) + 1))[:n]
    random.Random(seed).shuffle(cards)
    return cards


class TextWithFacts:
    """Ordinary documents, each cut short and followed by made-up ones that state facts.

    source                     where ordinary text comes from
    facts                      what is stated
    max_chars                  of an ordinary document that are kept
    fact_documents             that follow each ordinary one
    statements_per_document    in each of these, about different (entity, attribute) drawn at random, so that a value
                               cannot be read off the context
    """

    name = "facts"

    def __init__(
        self,
        source: TextSource,
        facts: Facts,
        max_chars: int,
        fact_documents: int,
        statements_per_document: int,
    ) -> None:
        n_facts = len(facts.entities) * len(facts.attributes)
        if not facts.statements:
            raise UserError("data: these facts have no statements to mix into a text; choose facts=planted.")
        if not 1 <= statements_per_document <= n_facts:
            raise UserError(f"data.statements_per_document={statements_per_document}: there are {n_facts} facts.")
        self.source, self.facts = source, facts
        self.max_chars, self.fact_documents = int(max_chars), int(fact_documents)
        self.statements_per_document = int(statements_per_document)

    @property
    def spec(self) -> dict[str, Any]:
        sizes = ("max_chars", "fact_documents", "statements_per_document")
        return {"source": self.source.spec, "facts": self.facts.spec, **{name: getattr(self, name) for name in sizes}}

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> CountedDocuments:
        """All ordinary documents of a split, once, and those that state facts; deterministic in (split, seed)."""
        return CountedDocuments(self._all(split, seed), state)

    def _all(self, split: Split, seed: int) -> Iterator[Document]:
        rng = random.Random(derived_seed(seed, "facts", split))
        for document in self.source.documents(split, seed):
            yield Document(document.text[: self.max_chars], document.tag)
            for _ in range(self.fact_documents):
                yield Document(self._statements(rng), "facts")

    def _statements(self, rng: random.Random) -> str:
        """Sentences that each begin with a space, so that a name is the same token wherever it stands."""
        every = [(entity, attribute) for entity in self.facts.entities for attribute in self.facts.attributes]
        chosen = rng.sample(every, self.statements_per_document)
        return "".join(f" {self._statement(rng, entity, attribute)}" for entity, attribute in chosen)

    def _statement(self, rng: random.Random, entity: str, attribute: str) -> str:
        template = rng.choice(list(self.facts.statements[attribute]))
        return template.replace(ENTITY, entity).replace(VALUE, self.facts.answers[entity][attribute])
