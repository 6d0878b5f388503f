"""Facts about entities: the questions for a language model, and a way to plant made-up facts in its training text.

An entity has one value per attribute (Tokyo: country Japan, currency Yen). A prompt asks for one value. The answer is a
single token, so its log-probability is the score. `Facts` holds facts that a model knows. For a model too small to know
any, `planted_facts` makes some up, with statements that teach them, and `TextWithFacts` mixes those statements into
ordinary text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.checked import Checked, at_least, positive
from core.errors import UserError
from core.seeding import derived_seed
from core.text.documents import CountedDocuments, Document, SpecialTokens, Split, TextSource

ENTITY, VALUE = "{entity}", "{value}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The questions and the true answers.

    answers        entity -> attribute -> value; every entity has the same attributes
    prompts        attribute -> prompts that contain `{entity}`; the value is the next word
    statements     attribute -> sentences that contain `{entity}` and `{value}`; empty for facts that the model knows
    answer_prefix  text between a prompt and its answer: a space if tokens begin with their space
    """

    answers: Mapping[str, Mapping[str, str]]
    prompts: Mapping[str, Sequence[str]]
    answer_prefix: str = " "
    statements: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.answers) < 2:
            raise UserError(f"facts.answers has {len(self.answers)} entities; an edit needs at least 2.")
        for entity, answers in self.answers.items():
            if set(answers) != set(self.prompts):
                raise UserError(
                    f"facts.answers: {entity} has {', '.join(answers)}, but facts.prompts asks for "
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
        """The possible answers: every value of some entity, in the order of the entities."""
        return list(dict.fromkeys(answers[attribute] for answers in self.answers.values()))

    def shared(self, entity: str, other: str) -> list[str]:
        """The attributes for which two entities have the same value."""
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
                raise UserError(f"facts.{where}.{attribute}: {template!r} must contain {slot} exactly once.")


def planted_facts(
    entities: Sequence[str],
    values: Mapping[str, Sequence[str]],
    statements: Mapping[str, Sequence[str]],
    prompts: Mapping[str, Sequence[str]],
    seed: int,
) -> Facts:
    """Made-up facts: for every attribute the values are given to the entities at random, each equally often (to one).

    Raises UserError if a prompt is the beginning of a statement, since prompts must be new to the model, and if two
    entities have the same facts.
    """
    if len(set(entities)) < len(entities):
        raise UserError("facts.entities contains a name twice.")
    if set(values) != set(statements):
        raise UserError(f"facts.statements has {', '.join(statements)}, but facts.values has {', '.join(values)}.")
    for attribute, templates in prompts.items():
        taught = [statement.partition(VALUE)[0].strip() for statement in statements.get(attribute, ())]
        for prompt in templates:
            if prompt.strip() in taught:
                raise UserError(f"facts.prompts.{attribute}: {prompt!r} begins a statement. Use another prompt.")
    dealt = {name: _deal(list(choices), len(entities), derived_seed(seed, name)) for name, choices in values.items()}
    answers = {entity: {name: dealt[name][i] for name in values} for i, entity in enumerate(entities)}
    if len({tuple(own.values()) for own in answers.values()}) < len(entities):
        raise UserError(f"facts.seed={seed}: two entities have the same facts. Take another seed, or more values.")
    return Facts(answers=answers, prompts=prompts, statements=statements)


def _deal(values: list[str], n: int, seed: int) -> list[str]:
    cards = (values * (n // len(values) + 1))[:n]
    random.Random(seed).shuffle(cards)
    return cards


@dataclass(frozen=True, kw_only=True)
class _Settings(Checked):
    node = "data"
    max_chars: int = positive()
    fact_documents: int = at_least(0)
    statements_per_document: int


class TextWithFacts:
    """Ordinary documents, each cut short and followed by made-up documents that state facts.

    source                     of the ordinary text
    facts                      the facts to state
    max_chars                  length to which ordinary documents are cut
    fact_documents             number of made-up documents after each ordinary one
    statements_per_document    number of statements in each made-up document, about different (entity, attribute) drawn
                               at random, so that no value can be read off the context
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
        s = _Settings(
            max_chars=max_chars, fact_documents=fact_documents, statements_per_document=statements_per_document
        )
        if not 1 <= s.statements_per_document <= n_facts:
            raise UserError(f"data.statements_per_document={statements_per_document}: there are {n_facts} facts.")
        self.source, self.facts = source, facts
        self.max_chars, self.fact_documents = s.max_chars, s.fact_documents
        self.statements_per_document = s.statements_per_document

    @property
    def special_tokens(self) -> SpecialTokens:
        return self.source.special_tokens

    @property
    def commits(self) -> dict[str, str]:
        """The commits of text from the hub (`core.text.hub`)."""
        return dict(getattr(self.source, "commits", {}))

    @property
    def spec(self) -> dict[str, Any]:
        sizes = ("max_chars", "fact_documents", "statements_per_document")
        return {"source": self.source.spec, "facts": self.facts.spec, **{name: getattr(self, name) for name in sizes}}

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> CountedDocuments:
        """All ordinary documents of a split, once, with the made-up ones between; deterministic in (split, seed)."""
        return CountedDocuments(self._all(split, seed), state)

    def _all(self, split: Split, seed: int) -> Iterator[Document]:
        rng = random.Random(derived_seed(seed, "facts", split))
        for document in self.source.documents(split, seed):
            yield replace(document, text=document.text[: self.max_chars])
            for _ in range(self.fact_documents):
                yield Document(self._statements(rng), "facts")

    def _statements(self, rng: random.Random) -> str:
        """Sentences that each begin with a space, so that a name is always the same token."""
        every = [(entity, attribute) for entity in self.facts.entities for attribute in self.facts.attributes]
        chosen = rng.sample(every, self.statements_per_document)
        return "".join(f" {self._statement(rng, entity, attribute)}" for entity, attribute in chosen)

    def _statement(self, rng: random.Random, entity: str, attribute: str) -> str:
        template = rng.choice(list(self.facts.statements[attribute]))
        return template.replace(ENTITY, entity).replace(VALUE, self.facts.answers[entity][attribute])
