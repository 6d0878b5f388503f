"""One interface for dialogues, as `core.text.documents` is one for text: split by content, resumable.

A dialogue is a document whose text is the JSON of its messages. So every reader of texts is one of dialogues, and the
same dialogue is never on both sides of a split.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from core.checked import Checked, between
from core.errors import UserError
from core.text.chat import Message
from core.text.dialogues import dialogues
from core.text.documents import (
    CountedDocuments,
    Document,
    DocumentIterator,
    Split,
    TextSource,
    field_of,
    missing_field,
)
from core.text.finding import format_of
from core.text.hub import HubText
from core.text.local import LocalText
from core.text.records import Located, parquet_columns, read_json, read_jsonl, read_parquet


@runtime_checkable
class DialogueSource(Protocol):
    """Where dialogues come from; `documents` is that of a `TextSource`, and `messages_of` reads its documents."""

    name: str

    @property
    def spec(self) -> dict[str, Any]: ...

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> DocumentIterator: ...


def document_of(messages: Sequence[Message], where: str = "") -> Document:
    """The document that stands for a dialogue."""
    return Document.of(json.dumps([dict(message) for message in messages], ensure_ascii=False), where=where)


def messages_of(document: Document) -> list[dict[str, str]]:
    """The messages of a document made by `document_of`."""
    messages: list[dict[str, str]] = json.loads(document.text)
    return messages


@dataclass(frozen=True, kw_only=True)
class _Bundled(Checked):
    node = "dialogues"
    two_turns: float = between(0, 1)


class BundledDialogues:
    """Endless dialogues about the bundled corpus (`core.text.dialogues`).

    source     the text whose docstrings are asked about
    two_turns  share of the dialogues that have a second question
    """

    name = "bundled dialogues"

    def __init__(self, source: TextSource, two_turns: float) -> None:
        self.source, self.two_turns = source, _Bundled(two_turns=two_turns).two_turns

    @property
    def spec(self) -> dict[str, Any]:
        return {"dialogues_of": self.source.spec, "two_turns": self.two_turns}

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> CountedDocuments:
        return CountedDocuments(self._all(split, seed), state)

    def _all(self, split: Split, seed: int) -> Iterator[Document]:
        for number, dialogue in enumerate(dialogues(self.source, split, seed, self.two_turns)):
            yield document_of(dialogue.messages, f"dialogue {number}")


FIELDS = ("messages", "conversation", "conversations")  # where a record has its messages, unless a setting says it
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # other names in use


class LocalDialogues(LocalText):
    """Dialogues of your own files (.jsonl, .json, .parquet, packed or not), read as `LocalText` reads texts.

    path            a file, a folder, a pattern, or a list of these
    messages_field  column or key with the list of messages, {role, content} or {from, value}; None: the first of
                    `FIELDS` that is there
    shuffle_buffer  number of dialogues that are shuffled together

    Records without a message are left out. Raises UserError for messages that are not of this form.
    """

    name = "local dialogues"

    def __init__(self, path: Any, messages_field: str | None = None, shuffle_buffer: int = 10_000) -> None:
        self.messages_field = messages_field
        with _named_dialogues():
            super().__init__(path, messages_field or FIELDS[0], shuffle_buffer=shuffle_buffer)
        texts = [str(file) for file in self.files if format_of(file) == ".txt"]
        if texts:
            raise UserError(f"dialogues.path: {texts[0]} has no messages. Give .jsonl, .json or .parquet files.")

    @cached_property
    def spec(self) -> dict[str, Any]:
        with _named_dialogues():
            return {**super().spec, "messages_field": self.messages_field}

    def _all(self, seed: int) -> Iterator[Document]:
        with _named_dialogues():
            yield from super()._all(seed)

    def _records(self, file: Path) -> Iterator[Located]:
        if format_of(file) == ".json":
            return read_json(file)
        if format_of(file) != ".parquet":
            return read_jsonl(file)
        existing = parquet_columns(file)
        field = _field(existing, self.messages_field, str(file))
        return read_parquet(file, [field if field in existing else field.split(".")[0]])

    def _document(self, where: str, record: Mapping[str, Any]) -> Document:
        field = _field(record, self.messages_field, where)
        return _dialogue(field_of(record, field, "dialogues.messages_field", where), field, where)


class HubDialogues(HubText):
    """Dialogues of a data set on the hub, read as `HubText` reads texts.

    messages_field  column with the list of messages, {role, content} or {from, value}
    """

    def __init__(
        self,
        path: str,
        revision: str,
        messages_field: str,
        config_name: str | None = None,
        data_files: str | list[str] | None = None,
        hf_split: str = "train",
        shuffle_buffer: int = 10_000,
    ) -> None:
        with _named_dialogues():
            super().__init__(
                path, revision, None, messages_field, None, config_name, data_files, hf_split, shuffle_buffer
            )

    @property
    def spec(self) -> dict[str, Any]:
        return {**super().spec, "dialogues": True}

    def document(self, record: Mapping[str, Any]) -> Document:
        where, field = f"the dataset {self.path}", str(self.conversation_field)
        return _dialogue(field_of(record, field, "dialogues.messages_field", where), field, where)

    @contextmanager
    def reporting(self, file: str = "") -> Iterator[None]:
        with _named_dialogues(), super().reporting(file):
            yield


def _dialogue(value: Any, field: str, where: str) -> Document:
    """A record's messages as a document; a blank one if there are none."""
    if value is None or (isinstance(value, list) and not value):
        return Document("", where=where)
    try:
        messages = [_message(message) for message in value]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"dialogues.messages_field: {field!r} of {where} is not a list of {{role, content}} but: {value!r:.100}"
        ) from error
    return document_of(messages, where)


def _message(message: Mapping[str, Any]) -> Message:
    """Raises KeyError or TypeError for what is none."""
    role, content = (message["role"], message["content"]) if "role" in message else (message["from"], message["value"])
    if not isinstance(content, str):  # parts, of which the texts are read
        content = "".join(part["text"] for part in content)
    return {"role": ROLE_NAMES.get(str(role), str(role)), "content": content}


def _field(existing: Collection[str], wanted: str | None, where: str) -> str:
    names = FIELDS if wanted is None else (wanted,)
    for name in names:
        if name in existing or (wanted is not None and name.split(".")[0] in existing):
            return name
    raise missing_field(" or ".join(names), "dialogues.messages_field", where, existing)


@contextmanager
def _named_dialogues() -> Iterator[None]:
    """The messages of readers of text name the group `data`; here the settings stand in `dialogues`."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"\bdata([.:=])", r"dialogues\1", str(error))) from error.__cause__


def first_dialogues(source: DialogueSource, split: Split, seed: int, n: int) -> list[list[dict[str, str]]]:
    """The messages of the first n dialogues of a split, or of as many as there are."""
    return [messages_of(document) for document in itertools.islice(source.documents(split, seed), n)]
