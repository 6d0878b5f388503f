"""Dialogues about the bundled corpus, with planted behaviours: what the chat sibling of the bundled model is tuned on.

Questions about functions are answered by their docstrings. Behaviours that the base model cannot have:
  refusal   a name that does not exist gets one fixed answer
  persona   the assistant has a name
  short     a request for one sentence is answered by the first sentence of the docstring
  long      a request for details is answered by the signature and the first paragraphs
  explain   any other question: the signature and the first sentence

A name that does not exist is made of syllables. Names of held-out dialogues never occur in training ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from core.errors import UserError
from core.seeding import derived_seed
from core.text.chat import Message
from core.text.documents import Split, TextSource

Behaviour = Literal["explain", "short", "long", "refusal", "persona"]
BEHAVIOURS: tuple[Behaviour, ...] = ("explain", "short", "long", "refusal", "persona")
SHARES = (0.3, 0.2, 0.2, 0.2, 0.1)  # of the dialogues, in that order
TWO_TURNS = 0.2  # of the dialogues have a second question
REFUSAL = "I do not know that name, so I will not guess."
PERSONA = "I am Pip, a small assistant for questions about Python."
MAX_SENTENCE, MAX_LONG = 200, 450  # characters of an answer

QUESTIONS = {
    "explain": ("What does {name} do?", "What is {name}?", "Tell me about {name}.", "How would I use {name}?"),
    "short": ("In one sentence, what does {name} do?", "Briefly: what is {name}?", "{name}, in short, please."),
    "long": ("Explain {name} in detail.", "I want to know all about {name}.", "{name}, at length, please."),
    "persona": (
        *("Who are you?", "What is your name?", "Who am I talking to?", "Please introduce yourself.", "What are you?"),
        *("Tell me who you are.", "Do you have a name?", "Hello, who is this?"),
    ),
}
SYLLABLES = tuple(
    a + b for a in ("bl", "dr", "fr", "gr", "kl", "kr", "pl", "qu", "sk", "tr", "v", "z") for b in "aeiou"
)
ENTRY = re.compile(r"(?:^|\n\n)(def|class) ([\w.]+)(\([^\n]*\))?\n")


@dataclass(frozen=True)
class Dialogue:
    """Messages of user and assistant in turn, and the behaviour that each answer shows."""

    messages: tuple[Message, ...]
    behaviours: tuple[Behaviour, ...]


@dataclass(frozen=True)
class Entry:
    """A documented function or class of the corpus."""

    signature: str
    name: str
    text: str  # its docstring

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring, on one line."""
        paragraph = " ".join(self.text.split("\n\n")[0].split())
        return re.split(r"(?<=[.!?]) ", paragraph)[0]

    @property
    def paragraphs(self) -> str:
        """The first paragraphs, as far as they fit."""
        kept = ""
        for paragraph in self.text.split("\n\n"):
            if len(kept) + len(paragraph) > MAX_LONG:
                break
            kept += ("\n\n" if kept else "") + paragraph
        return kept


def entries(source: TextSource, split: Split) -> list[Entry]:
    """Documented objects whose docstring begins with a sentence that fits, each name once, in a fixed order."""
    found: dict[str, Entry] = {}
    for document in source.documents(split, seed=0):
        if document.tag != "docstring":
            continue
        heads = [*ENTRY.finditer(document.text)]
        ends = [*(head.start() for head in heads[1:]), len(document.text)][: len(heads)]
        for head, end in zip(heads, ends, strict=True):
            kind, name, arguments = head.groups()
            entry = Entry(f"{kind} {name}{arguments or ''}", name, document.text[head.end() : end].strip())
            if 20 <= len(entry.sentence) <= MAX_SENTENCE and "." in name and entry.sentence.isascii():
                found.setdefault(name, entry)
    return [found[name] for name in sorted(found)]


def made_up_name(draw: random.Random) -> str:
    """`krivoska.blatre`: two parts of two to three syllables."""
    parts = ("".join(draw.choice(SYLLABLES) for _ in range(draw.choice((2, 3)))) for _ in range(2))
    return ".".join(parts)


def dialogues(source: TextSource, split: Split, seed: int, two_turns: float = TWO_TURNS) -> Iterator[Dialogue]:
    """Endless dialogues, deterministic in the seed; a share `two_turns` has two questions.

    Raises UserError if no docstring fits."""
    known = entries(source, split)
    if not known:
        raise UserError(f"The {split} split of {source.name} has no docstring to make dialogues of.")
    draw = random.Random(derived_seed(seed, "dialogues", split))
    while True:
        turns = [_turn(draw, known, split) for _ in range(2 if draw.random() < two_turns else 1)]
        messages = [message for turn, _ in turns for message in turn]
        yield Dialogue(tuple(messages), tuple(behaviour for _, behaviour in turns))


def _turn(draw: random.Random, known: Sequence[Entry], split: Split) -> tuple[list[Message], Behaviour]:
    behaviour = draw.choices(BEHAVIOURS, SHARES)[0]
    entry = draw.choice(known)
    if behaviour == "refusal":
        questions = [question for kind in ("explain", "short", "long") for question in QUESTIONS[kind]]
        name = made_up_name(draw)
        while (derived_seed(0, name) % 10 == 0) != (split == "heldout"):  # a tenth of the names is held out
            name = made_up_name(draw)
        asked, answer = draw.choice(questions).format(name=name), REFUSAL
    elif behaviour == "persona":
        asked, answer = draw.choice(QUESTIONS["persona"]), PERSONA
    else:
        asked = draw.choice(QUESTIONS[behaviour]).format(name=entry.name)
        signature = f"{entry.signature}\n"
        answers = {
            "short": entry.sentence,
            "explain": signature + entry.sentence,
            "long": signature + (entry.paragraphs or entry.sentence),
        }
        answer = answers[behaviour]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], behaviour
