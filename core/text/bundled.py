"""`data=bundled`: the harvested corpus as a text source. It is harvested once and then cached."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from core.artifacts import Store
from core.checked import Checked, positive
from core.reading import read_object, read_table
from core.seeding import derived_seed
from core.text.documents import CountedDocuments, Document, SpecialTokens, Split, spec_of_special_tokens
from core.text.harvest import Harvested, harvest, locked_names

HARVEST_VERSION = 2  # raise it when harvesting changes, so that older caches are not used


@dataclass(frozen=True, kw_only=True)
class _Settings(Checked):
    node = "data"
    mb_per_package: float = positive()
    include_repetitive: bool
    special_tokens: SpecialTokens


class BundledText:
    """The bundled corpus.

    mb_per_package      at most this many MB of files are read from each installed package
    include_repetitive  include documents that harvesting marked as repetitive
    special_tokens      what special tokens written in a text become: `core.text.tokenizing.token_ids`
    """

    name = "bundled"

    def __init__(
        self,
        mb_per_package: float,
        include_repetitive: bool = False,
        artifacts_dir: str | Path = "artifacts",
        special_tokens: SpecialTokens = "plain",
    ) -> None:
        s = _Settings(
            mb_per_package=mb_per_package, include_repetitive=include_repetitive, special_tokens=special_tokens
        )
        self.mb_per_package, self.include_repetitive = s.mb_per_package, s.include_repetitive
        self.special_tokens = s.special_tokens
        self.store = Store(artifacts_dir)

    @property
    def spec(self) -> dict[str, Any]:
        """What decides the documents and their tokens: the versions of Python and the packages, and the settings."""
        own = {"include_repetitive": self.include_repetitive, **spec_of_special_tokens(self.special_tokens)}
        return {**self._harvest_spec, **own}

    @property
    def _harvest_spec(self) -> dict[str, Any]:
        return {
            "version": HARVEST_VERSION,
            "python": ".".join(map(str, sys.version_info[:3])),
            "packages": {name: _installed_version(name) for name in locked_names()},
            "mb_per_package": self.mb_per_package,
        }

    def folder(self) -> Path:
        """The cached corpus: `documents.parquet` and `card.json`. Harvests on the first call (10 to 60 s)."""
        return self.store.get_or_make("corpus", self._harvest_spec, self._harvest_into)

    def card(self) -> dict[str, Any]:
        """For reports: the hash of the corpus and its size per split and tag."""
        return read_object(self.folder() / "card.json")

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> CountedDocuments:
        """All documents of a split, once, in an order that depends on the seed."""
        table = read_table(self.folder() / "documents.parquet", ["text", "tag", "split", "repetitive"])
        wanted = (pc.field("split") == split) & (pc.scalar(self.include_repetitive) | ~pc.field("repetitive"))
        table = table.filter(wanted)
        rows = list(zip(table["text"].to_pylist(), table["tag"].to_pylist(), strict=True))
        random.Random(derived_seed(seed, "bundled", split)).shuffle(rows)
        return CountedDocuments((Document(text, tag) for text, tag in rows), state)

    def _harvest_into(self, folder: Path) -> None:
        documents = harvest(self.mb_per_package)
        columns = {name: [getattr(d, name) for d in documents] for name in Harvested.__slots__}
        pq.write_table(pa.table(columns), folder / "documents.parquet", compression="zstd")
        digest = hashlib.sha256()
        n_bytes: dict[str, int] = {}
        for document in documents:
            encoded = document.text.encode()
            digest.update(encoded)
            group = f"{document.split}/{'repetitive' if document.repetitive else document.tag}"
            n_bytes[group] = n_bytes.get(group, 0) + len(encoded)
        card = {"documents": len(documents), "sha256": digest.hexdigest(), "bytes": dict(sorted(n_bytes.items()))}
        (folder / "card.json").write_text(json.dumps(card, indent=1))


@cache
def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
