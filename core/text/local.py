"""`data=local`: the user's own text files."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from core.checked import Checked, at_least, rule
from core.errors import UserError
from core.inputs import file_hash, note_file, note_listing
from core.notices import say_once
from core.seeding import derived_seed
from core.text.documents import (
    CountedDocuments,
    Document,
    SpecialTokens,
    Split,
    field_of,
    missing_field,
    shuffled_blocks,
    spec_of_special_tokens,
)
from core.text.finding import ending_of, find_files, format_of
from core.text.records import Located, parquet_columns, read_json, read_jsonl, read_parquet, read_txt

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}


@dataclass(frozen=True, kw_only=True)
class _Settings(Checked):
    node = "data"
    text_field: str = rule(bool, "be a name")
    tag_field: str | None = rule(bool, "be a name, or null")
    document_separator: str | None = rule(bool, "be a text, or null to read each .txt file as one document")
    shuffle_buffer: int = at_least(1)
    special_tokens: SpecialTokens


class LocalText:
    """Documents from files: .txt, .jsonl (or .ndjson), .json and .parquet, all but the last also compressed.

    path                a file, a folder (searched with all below it), a pattern, or a list of these
    text_field          column or key that holds the text in JSON and Parquet; dots lead into nested fields
    tag_field           column or key that holds the tag; None for no tags
    document_separator  text between the documents of a .txt file; None if each file is one document. `\\n` and `\\t`
                        are a newline and a tab
    shuffle_buffer      number of documents that are shuffled together; the files are shuffled as well
    special_tokens      what special tokens written in a text become: `core.text.tokenizing.token_ids`

    Null or blank texts are left out. `n_documents` and `n_skipped` have the number of all and of these per file, for
    files that were read to the end. A running cell's results depend on the files (`core.inputs`).
    """

    name = "local"

    def __init__(
        self,
        path: Any,
        text_field: str = "text",
        tag_field: str | None = None,
        document_separator: str | None = None,
        shuffle_buffer: int = 10_000,
        special_tokens: SpecialTokens = "plain",
    ) -> None:
        s = _Settings(
            text_field=text_field,
            tag_field=tag_field,
            document_separator=document_separator,
            shuffle_buffer=shuffle_buffer,
            special_tokens=special_tokens,
        )
        self.text_field, self.tag_field, self.special_tokens = s.text_field, s.tag_field, s.special_tokens
        self.document_separator = None if s.document_separator is None else unescaped(s.document_separator)
        self.shuffle_buffer = s.shuffle_buffer
        self.path, found = path, find_files(path)
        if found.line():
            say_once(found.line())
        self.files = found.files
        self._known = {file: _state(file) for file in self.files}
        self.n_documents: dict[str, int] = {}
        self.n_skipped: dict[str, int] = {}

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Decided by the files' content, not by their names or dates. Reads every file once in a process."""
        note_listing(self.path)
        names = ("text_field", "tag_field", "document_separator", "shuffle_buffer")
        digests = [self._noted(file) for file in self.files]
        return {
            "local": digests,
            "endings": [ending_of(file) for file in self.files],
            **{name: getattr(self, name) for name in names},
            **spec_of_special_tokens(self.special_tokens),
        }

    def _noted(self, file: Path) -> str:
        try:
            note_file(file)
            return file_hash(file)[:32]
        except OSError as error:
            raise UserError(f"data.path: {file} cannot be read: {error.strerror or error}.") from error

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> CountedDocuments:
        """All documents of a split, once. Raises UserError for a file whose content does not fit its ending, and for
        one that has changed since this object was made."""
        blocks = shuffled_blocks(self._all(seed), split, seed, self.shuffle_buffer)
        return CountedDocuments((document for block in blocks for document in block), state, self.explain)

    def explain(self) -> str:
        """Why there may be few documents, of all files read to the end."""
        n, n_blank = sum(self.n_documents.values()), sum(self.n_skipped.values())
        if n == n_blank:
            return f"All {n:,} documents are blank." if n else f"The files have no documents: {self._shown()}."
        texts = [file for file in self.files if format_of(file) == ".txt"]
        if len(texts) == len(self.files) == n:
            name = "The file is" if n == 1 else "Each of the files is"
            if self.document_separator is None:
                return (
                    f"{name} one document ({self._shown()}), since data.document_separator is null: set it to what "
                    "stands between documents, for instance data.document_separator='\\n\\n'."
                )
            return f"{name} one document ({self._shown()}): {self._never()}"
        return f"There are {n - n_blank:,} documents in all ({self._shown()})."

    def _never(self) -> str:
        return f"data.document_separator={self.document_separator!r} does not occur."

    def _shown(self) -> str:
        more = len(self.files) - 3
        return ", ".join(map(str, self.files[:3])) + (f" and {more:,} more" if more > 0 else "")

    def _all(self, seed: int) -> Iterator[Document]:
        files = list(self.files)
        random.Random(derived_seed(seed, "files")).shuffle(files)
        for file in files:
            n, n_skipped = 0, 0
            for document in self._documents(file):
                n += 1
                n_skipped += not document.text.strip()
                yield document
            self.n_documents[str(file)], self.n_skipped[str(file)] = n, n_skipped
        self._say()

    def _say(self) -> None:
        """What a user should know of the text, once all of it was read."""
        n, n_blank = sum(self.n_documents.values()), sum(self.n_skipped.values())
        if n_blank:
            say_once(f"data.path: {n_blank:,} of {n:,} documents are null or blank, and left out ({self._shown()}).")
        texts = [file for file in self.files if format_of(file) == ".txt"]
        if texts and self.document_separator and all(self.n_documents[str(file)] == 1 for file in texts):
            say_once(f"{self._never()} Each .txt file is one document ({self._shown()}).")

    def _documents(self, file: Path) -> Iterator[Document]:
        if _state(file) != self._known[file]:
            raise UserError(f"data.path: {file} has changed since the run began. Start the run again.")
        if format_of(file) == ".txt":
            for where, text in read_txt(file, self.document_separator):
                if text.strip() or not self.document_separator:  # nothing between two separators is no document
                    yield Document.of(text, where=where)
        else:
            for where, record in self._records(file):
                yield self._document(where, record)

    def _records(self, file: Path) -> Iterator[Located]:
        if format_of(file) == ".json":
            return read_json(file)
        if format_of(file) != ".parquet":
            return read_jsonl(file)
        existing = parquet_columns(file)
        fields = (("data.text_field", self.text_field), ("data.tag_field", self.tag_field))
        columns = {self._column(field, setting, str(file), existing) for setting, field in fields if field}
        return read_parquet(file, sorted(columns))

    def _document(self, where: str, record: Mapping[str, Any]) -> Document:
        try:
            text = field_of(record, self.text_field, "data.text_field", where)
            tag = field_of(record, self.tag_field, "data.tag_field", where) if self.tag_field else None
        except UserError as error:
            raise self._with_advice(error) from error.__cause__
        if not isinstance(text, str | None):
            raise UserError(f"data.text_field: {self.text_field!r} of {where} is {type(text).__name__}, not text.")
        return Document.of(text or "", "" if tag is None else str(tag), where)

    def _column(self, field: str, setting: str, where: str, existing: list[str]) -> str:
        """The column that holds the field: the field itself, or the first part of its path."""
        column = field if field in existing else field.split(".")[0]
        if column not in existing:
            raise self._with_advice(missing_field(field, setting, where, existing))
        return column

    def _with_advice(self, error: UserError) -> UserError:
        """A folder may hold files that are no texts, such as descriptions of a data set."""
        if len(self.files) == 1:
            return error
        return UserError(f"{error} To read some of the files only, give a pattern: data.path='<folder>/**/*.parquet'.")


def unescaped(separator: str) -> str:
    """With the newlines and tabs that `\\n` and `\\t` stand for, as a command line writes them."""
    text = re.sub(r"\\[ntr\\]", lambda escape: ESCAPES[escape.group()], separator)
    return text.replace("\r\n", "\n")


def _state(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"data.path: {file} cannot be read: {error.strerror or error}.") from error
    return stat.st_size, stat.st_mtime_ns
