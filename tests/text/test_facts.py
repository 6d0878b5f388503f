import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from core.analysis.editing import ask
from core.errors import UserError
from core.text.facts import Facts, TextWithFacts, planted_facts

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "entities": ["ana", "bo", "cy", "di", "eva"],
    "values": {"job": ["cook", "smith"], "pet": ["cat", "dog", "hen"]},
    "statements": {
        "job": ["{entity} is a {value}."],
        "pet": ["{entity} keeps a {value}.", "a {value} is with {entity}."],
    },
    "prompts": {"job": [" what {entity} is, is a"], "pet": [" with {entity} is a"]},
}  # fmt: skip


GOOD_SEED = 5  # no two entities get the same facts


def planted(**changed: Any) -> Facts:
    return planted_facts(**{**SETTINGS, "seed": GOOD_SEED, **changed})


@given(st.integers(0, 10_000), st.integers(2, 5))
def test_each_value_is_given_to_equally_many_entities_up_to_one(seed: int, n: int):
    try:
        facts = planted(seed=seed, entities=[f"e{i}" for i in range(n)])
    except UserError as error:
        assert "two entities have the same facts" in str(error)
        return
    for attribute, values in SETTINGS["values"].items():
        counts = Counter(facts.answers[entity][attribute] for entity in facts.entities)
        assert max(counts.values()) - min(counts[value] for value in values) <= 1


def test_a_prompt_that_begins_a_statement_is_refused():
    with pytest.raises(UserError, match="Use another prompt"):
        planted(prompts={**SETTINGS["prompts"], "job": [" {entity} is a"]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"entities": ["bo", "bo"]}, "contains a name twice"),
        ({"prompts": {**SETTINGS["prompts"], "pet": []}}, "facts.prompts.pet is empty"),
        ({"prompts": {**SETTINGS["prompts"], "pet": [" with it is a"]}}, "must contain {entity} exactly once"),
        ({"prompts": {"pet": [" with {entity} is a"]}}, "facts.prompts asks for pet"),
        ({"statements": {"job": ["{entity} is a {value}."]}}, "facts.values has job, pet"),
        ({"entities": ["ana"]}, "at least 2"),
        ({"entities": list("abcdefg")}, "two entities have the same facts"),
    ],
)
def test_facts_that_do_not_fit_together_are_refused(changed: dict[str, Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        planted(**changed)


def text(words, **changed: Any) -> TextWithFacts:
    return TextWithFacts(
        words, planted(), **{"max_chars": 20, "fact_documents": 2, "statements_per_document": 3, **changed}
    )


def pattern(template: str) -> re.Pattern[str]:
    slots = {r"\{entity\}": r"(?P<entity>\w+)", r"\{value\}": r"(?P<value>\w+)"}
    regex = re.escape(template)
    for slot, group in slots.items():
        regex = regex.replace(slot, group)
    return re.compile(regex)


def test_every_statement_in_the_text_is_true_and_none_is_repeated_in_a_document(words):
    facts, source = planted(), text(words)
    patterns = {name: [pattern(template) for template in templates] for name, templates in facts.statements.items()}
    stated: Counter[tuple[str, str]] = Counter()
    for document in source.documents("train", 0):
        if document.tag == "facts":
            sentences = [sentence + "." for sentence in document.text.split(".") if sentence]
            assert len(sentences) == 3 and all(sentence.startswith(" ") for sentence in sentences)
            triples = [
                (match["entity"], name, match["value"])
                for sentence in sentences
                for name, compiled in patterns.items()
                for each in compiled
                if (match := each.fullmatch(sentence.strip()))
            ]
            assert len(set(triples)) == 3
            assert all(facts.answers[entity][name] == value for entity, name, value in triples)
            stated.update((entity, name) for entity, name, _ in triples)
        else:
            assert len(document.text) <= 20
    assert len(stated) == 5 * 2


def test_the_text_continues_from_a_saved_position(words):
    source = text(words)
    whole = [document.text for document in source.documents("train", 3)]
    stream = source.documents("train", 3)
    head = [document.text for document in islice(stream, 40)]
    assert head + [document.text for document in source.documents("train", 3, stream.state_dict())] == whole
    assert whole != [document.text for document in source.documents("train", 4)]


def test_facts_without_statements_and_too_many_statements_are_refused(words):
    with pytest.raises(UserError, match="facts=planted"):
        TextWithFacts(words, Facts(answers=planted().answers, prompts=SETTINGS["prompts"]), 20, 1, 1)
    with pytest.raises(UserError, match="there are 10 facts"):
        text(words, statements_per_document=11)


def test_names_and_values_of_the_planted_facts_are_single_tokens_of_the_bundled_model():
    facts = instantiate(OmegaConf.load(ROOT / "conf/facts/planted.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "core/models/bundled")
    for entity, questions in ask(facts, tokenizer).items():
        for question in (q for qs in questions.values() for q in qs):
            assert tokenizer.decode(question.tokens[question.entity_position]) == f" {entity}"


def test_the_cities_differ_in_every_attribute():
    facts = instantiate(OmegaConf.load(ROOT / "conf/facts/cities.yaml"))
    assert not any(facts.shared(a, b) for a in facts.entities for b in facts.entities if a != b)
    assert facts.attributes == ["country", "language", "continent", "currency"]
