"""One interface for all text: a source yields documents, split by their content.

A source is anything with `name`, `spec` and `documents(split, seed)`. The split of a document depends only on its
content (`split_of`). So the same text is never on both sides, whatever the source, its order or its revision.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from core.errors import UserError
from core.seeding import derived_seed

Split = Literal["train", "heldout"]
SpecialTokens = Literal["parse", "plain"]  # what special tokens written in a text become, see `core.text.tokenizing`
HELDOUT_FRACTION = 0.05
MAX_BLOCK_CHARS = 2**28  # of text that is shuffled together; ordinary blocks have fewer
MAX_NAMES = 20  # of fields in a message
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which no encoding can hold
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    tag         names its subset (`prose`, `code`, a subset of the Pile, ...), or is empty
    where       its place, for messages
    n_replaced  characters that are no whole ones (lone surrogates) and were replaced by U+FFFD
    """

    text: str
    tag: str = ""
    where: str = field(default="", compare=False)
    n_replaced: int = field(default=0, compare=False)

    @classmethod
    def of(cls, text: str, tag: str = "", where: str = "") -> Document:
        """With lone surrogates replaced, which JSON can hold and no tokenizer takes."""
        if text.isascii() or not LONE_SURROGATE.search(text):
            return cls(text, tag, where)
        whole, n_replaced = LONE_SURROGATE.subn(REPLACEMENT, text)
        return cls(whole, tag, where, n_replaced)


class DocumentIterator(Iterator[Document], Protocol):
    """Documents in a fixed order. `state_dict` holds the position after the last document yielded. `explain` says, in
    whole sentences, why there may be few documents, or nothing."""

    def state_dict(self) -> dict[str, Any]: ...
    def explain(self) -> str: ...


@runtime_checkable
class TextSource(Protocol):
    """Where documents come from.

    `spec` is plain data that decides the content; it is part of the key of everything made from the text.
    `special_tokens` says what special tokens written in the text become.
    `documents` is deterministic in (split, seed): the same arguments give the same documents in the same order.
    It may be short (a file) or very long (a streamed corpus); to read more, start the next epoch with seed + 1.
    Given the `state_dict` of an earlier iteration with the same arguments, it continues from there.
    """

    name: str
    special_tokens: SpecialTokens

    @property
    def spec(self) -> dict[str, Any]: ...

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> DocumentIterator: ...


class CountedDocuments:
    """Documents that are cheap to read again: resuming skips as many as were yielded before."""

    def __init__(
        self,
        documents: Iterator[Document],
        state: Mapping[str, Any] | None = None,
        explain: Callable[[], str] = str,
    ) -> None:
        self._documents, self.explain = documents, explain
        self._n_yielded = state["documents"] if state else 0
        for _ in itertools.islice(documents, self._n_yielded):
            pass

    def __iter__(self) -> CountedDocuments:
        return self

    def __next__(self) -> Document:
        document = next(self._documents)
        self._n_yielded += 1
        return document

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self._n_yielded}


class Distinct:
    """The documents of a source without copies: each text once.

    n_documents, n_copies  documents yielded, and copies left out
    """

    def __init__(self, source: TextSource) -> None:
        self.source, self.name, self.special_tokens = source, source.name, source.special_tokens
        self.n_documents = self.n_copies = 0

    @property
    def spec(self) -> dict[str, Any]:
        return {"distinct": self.source.spec}

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> CountedDocuments:
        documents = self.source.documents(split, seed)
        return CountedDocuments(self._once(documents), state, documents.explain)

    def _once(self, documents: Iterable[Document]) -> Iterator[Document]:
        seen: set[bytes] = set()
        for document in documents:
            key = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if key in seen:
                self.n_copies += 1
            else:
                seen.add(key)
                self.n_documents += 1
                yield document


def spec_of_special_tokens(special_tokens: SpecialTokens) -> dict[str, Any]:
    """What they add to a source's spec: nothing for `parse`, which was the only rule before there was another."""
    return {} if special_tokens == "parse" else {"special_tokens": special_tokens}


def split_of(content: str, heldout_fraction: float = HELDOUT_FRACTION) -> Split:
    """`heldout` for a pseudo-random `heldout_fraction` of all contents, always the same ones; `train` for the rest."""
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout_fraction * 2**64 else "train"


def shuffled_blocks(
    documents: Iterator[Document], split: Split, seed: int, block_size: int, first_block: int = 0
) -> Iterator[list[Document]]:
    """Reads `block_size` documents at a time, or fewer very long ones, and yields those of the split, in an order that
    depends on the seed.

    Documents without text are dropped. When a block is yielded, exactly the documents up to its end have been read, and
    no block depends on an earlier one. So a stream resumes exactly by reading one block again, which a rolling shuffle
    buffer could not do.
    """
    for index in itertools.count(first_block):
        block = _block(documents, block_size)
        if not block:
            return
        kept = [document for document in block if document.text.strip() and split_of(document.text) == split]
        random.Random(derived_seed(seed, "block", index)).shuffle(kept)
        yield kept


def _block(documents: Iterator[Document], size: int) -> list[Document]:
    block, n_chars = [], 0
    for document in itertools.islice(documents, size):
        block.append(document)
        n_chars += len(document.text)
        if n_chars >= MAX_BLOCK_CHARS:
            break
    return block


def field_of(record: Mapping[str, Any], path: str, setting: str, where: str) -> Any:
    """The value at `path` in a record; dots lead into nested fields (`meta.pile_set_name`).

    None if a field on the way is null. If one does not exist, raises a UserError with the setting and the known fields.
    """
    value: Any = record
    for name in (path,) if path in record else path.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            raise missing_field(path, setting, where, value if isinstance(value, Mapping) else ())
        value = value[name]
    return value


def missing_field(path: str, setting: str, where: str, existing: Collection[Any]) -> UserError:
    """The error for a column or field that does not exist; `existing` are the names of those that do."""
    shown = map(str, itertools.islice(existing, MAX_NAMES))
    names = ", ".join(f"{name if name.isprintable() else ascii(name):.60}" for name in shown) or "none"
    more = f" and {len(existing) - MAX_NAMES:,} more" if len(existing) > MAX_NAMES else ""
    return UserError(f"{setting}: {where} has no field {path!r}; the fields here are: {names}{more}.")
