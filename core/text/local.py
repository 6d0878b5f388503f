"""`data=local`: the user's own text files (.txt, .jsonl, .json and .parquet)."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import UserError
from core.seeding import derived_seed
from core.text.documents import CountedDocuments, Document, Split, field_of, missing_field, shuffled_blocks

ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
Located = tuple[str, Mapping[str, Any]]  # the place of a record, for messages, and the record


class LocalText:
    """Documents from a file, a folder (searched recursively) or a glob pattern.

    path                the file, folder or pattern
    text_field          column or key that holds the text in .jsonl, .json and .parquet; dots lead into nested fields
    tag_field           column or key that holds the tag; None for no tags
    document_separator  text between the documents of a .txt file; None if each file is one document
    shuffle_buffer      number of documents that are shuffled together; the files are shuffled as well

    Null or blank texts are skipped. `n_skipped` has their number per file, for files that were read to the end.
    """

    name = "local"

    def __init__(
        self,
        path: str | Path,
        text_field: str = "text",
        tag_field: str | None = None,
        document_separator: str | None = None,
        shuffle_buffer: int = 10_000,
    ) -> None:
        if shuffle_buffer < 1:
            raise UserError(f"data.shuffle_buffer must be at least 1, not {shuffle_buffer}.")
        if document_separator == "":
            raise UserError("data.document_separator is empty. Set it to null to read each .txt file as one document.")
        self.path, self.text_field, self.tag_field = str(path), text_field, tag_field
        self.document_separator, self.shuffle_buffer = document_separator, shuffle_buffer
        self.files = find_files(self.path)
        self.n_skipped: dict[str, int] = {}

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Decided by the files' content, not by their names or dates. Reads every file once."""
        names = ("text_field", "tag_field", "document_separator", "shuffle_buffer")
        digests = []
        for path in self.files:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "blake2b").hexdigest()[:32])
        return {"local": digests, "endings": [f.suffix for f in self.files], **{n: getattr(self, n) for n in names}}

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> CountedDocuments:
        """All documents of a split, once. Raises UserError for a file whose content does not fit its ending."""
        blocks = shuffled_blocks(self._all(seed), split, seed, self.shuffle_buffer)
        return CountedDocuments((document for block in blocks for document in block), state)

    def _all(self, seed: int) -> Iterator[Document]:
        files = list(self.files)
        random.Random(derived_seed(seed, "files")).shuffle(files)
        for path in files:
            n_skipped = 0
            for where, record in self._records(path):
                document = self._document(where, record)
                n_skipped += not document.text.strip()
                yield document
            self.n_skipped[str(path)] = n_skipped

    def _document(self, where: str, record: Mapping[str, Any]) -> Document:
        text = field_of(record, self.text_field, "data.text_field", where)
        if not isinstance(text, str | None):
            raise UserError(f"data.text_field: {self.text_field!r} of {where} is {type(text).__name__}, not text.")
        tag = field_of(record, self.tag_field, "data.tag_field", where) if self.tag_field else None
        return Document(text or "", "" if tag is None else str(tag))

    def _records(self, path: Path) -> Iterator[Located]:
        if path.suffix == ".parquet":
            return self._read_parquet(path)
        if path.suffix == ".jsonl":
            return read_jsonl(path)
        return read_json(path) if path.suffix == ".json" else self._read_txt(path)

    def _read_txt(self, path: Path) -> Iterator[Located]:
        content = decode(path.read_bytes(), path)
        parts = content.split(self.document_separator) if self.document_separator else [content]
        names = [self.text_field, *([self.tag_field] if self.tag_field else [])]
        for part in parts:
            yield str(path), {**dict.fromkeys(names), self.text_field: part}

    def _read_parquet(self, path: Path) -> Iterator[Located]:
        try:
            with pq.ParquetFile(path) as file:
                columns = {
                    setting: self._column(field, setting, str(path), file.schema_arrow.names)
                    for setting, field in (("data.text_field", self.text_field), ("data.tag_field", self.tag_field))
                    if field
                }
                n_rows = 0
                for batch in file.iter_batches(batch_size=1024, columns=sorted(set(columns.values()))):
                    for record in batch.to_pylist():
                        n_rows += 1
                        yield f"{path}, row {n_rows}", record
        except pa.ArrowInvalid as error:
            raise UserError(f"data.path: {path} cannot be read as Parquet: {error}") from error

    @staticmethod
    def _column(field: str, setting: str, where: str, existing: list[str]) -> str:
        """The column that holds the field: the field itself, or the first part of its path."""
        column = field if field in existing else field.split(".")[0]
        if column not in existing:
            raise missing_field(field, setting, where, existing)
        return column


def find_files(path: str) -> list[Path]:
    """The files that `data.path` names, sorted. Raises UserError if there is no file, or one that cannot be read."""
    root = Path(path).expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        visible = (file for file in root.rglob("*") if not any(p.startswith(".") for p in file.relative_to(root).parts))
        files = [file for file in visible if file.suffix in ENDINGS and file.is_file()]
    else:
        files = [file for file in Path(root.anchor).glob(str(root.relative_to(root.anchor))) if file.is_file()]
    if not files:
        known = ", ".join(ENDINGS)
        what = f"the folder {path} has no file that ends in {known}" if root.is_dir() else f"there is no file {path}"
        raise UserError(f"data.path: {what} (seen from {Path.cwd()}). Or choose data=bundled, which needs no file.")
    for file in files:
        if file.suffix not in ENDINGS:
            raise UserError(f"data.path: {file} ends in {file.suffix or 'nothing'}, not in {', '.join(ENDINGS)}.")
        if file.stat().st_size == 0:
            raise UserError(f"data.path: {file} is empty. Remove it, or name another file.")
    return sorted(files)


def decode(content: bytes, path: Path, offset: int = 0) -> str:
    """UTF-8 (with or without a byte-order mark) -> text. `offset` is the position of the bytes in the file."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path: {path} is not UTF-8: byte {offset + error.start} (0x{content[error.start]:02x}) cannot be "
            f"decoded. Convert it, for instance with: iconv -f <its encoding> -t utf-8 {path.name}"
        ) from error


def read_jsonl(path: Path) -> Iterator[Located]:
    """The objects of a file with one JSON object per line; blank lines are skipped."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decode(line, path, offset)
            offset += len(line)
            if text.strip():
                yield _object(parse_json(text, path, number), f"{path}, line {number}")


def read_json(path: Path) -> Iterator[Located]:
    """The objects of a file that is a JSON list of objects, or a single object."""
    content = parse_json(decode(path.read_bytes(), path), path, 1)
    for index, item in enumerate(content if isinstance(content, list) else [content]):
        yield _object(item, f"{path}, item {index}")


def parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"data.path: {path}, line {line}, column {error.colno}: not JSON ({error.msg}). "
            "A .jsonl file must have one JSON object per line, a .json file must be a list of objects."
        ) from error


def _object(item: Any, where: str) -> Located:
    if not isinstance(item, Mapping):
        raise UserError(f"data.path: {where} is {type(item).__name__}, not a JSON object that contains a text.")
    return where, item
