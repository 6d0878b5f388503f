"""Text streamed from the Hugging Face Hub: Parquet and JSON datasets at a pinned revision."""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from core import hub
from core.checked import Checked, at_least
from core.errors import UserError
from core.inputs import note_commit
from core.seeding import derived_seed
from core.text.documents import (
    Document,
    SpecialTokens,
    Split,
    field_of,
    missing_field,
    shuffled_blocks,
    spec_of_special_tokens,
)
from core.text.unpacking import FAILURES

SCRIPT_HINT = "name its Parquet files in data.data_files, or try data.revision=refs/convert/parquet"
HINTS = {"BuilderConfig": "data.config_name", "Bad split": "data.hf_split", "scripts are no longer": SCRIPT_HINT}
FROM_FILES = (
    *FAILURES, httpx.HTTPError, datasets.exceptions.DatasetsError, ValueError, RuntimeError, TypeError, LookupError,
    AttributeError, ArithmeticError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Settings(Checked):
    node = "data"
    shuffle_buffer: int = at_least(1)
    special_tokens: SpecialTokens


class HubText:
    """A dataset on the Hub.

    path                `owner/name`
    revision            commit, tag or branch. A branch is the commit that this process found first (`core.hub`)
    config_name         the dataset's configuration, if it has several
    data_files          glob patterns within the repository, used instead of the configuration and its script
    hf_split            the dataset's own split; both train and held-out documents come from it, by content
    text_field          column that holds the text; dots lead into nested fields
    conversation_field  instead of text_field: column with a list of {role, content}, joined as "role: content"
                        paragraphs
    tag_field           column that holds the tag; None for no tags
    shuffle_buffer      number of documents that are read and shuffled together; the files are shuffled as well
    special_tokens      what special tokens written in a text become: `core.text.tokenizing.token_ids`

    Order and split depend only on (split, seed). A resumed stream reads one buffer again, from the row group (Parquet)
    or the file (JSON) in which the buffer starts.
    """

    def __init__(
        self,
        path: str,
        revision: str,
        text_field: str | None = "text",
        conversation_field: str | None = None,
        tag_field: str | None = None,
        config_name: str | None = None,
        data_files: str | list[str] | None = None,
        hf_split: str = "train",
        shuffle_buffer: int = 10_000,
        special_tokens: SpecialTokens = "plain",
    ) -> None:
        if (text_field is None) == (conversation_field is None):
            raise UserError("data: set one of data.text_field and data.conversation_field, and the other to null.")
        s = _Settings(shuffle_buffer=shuffle_buffer, special_tokens=special_tokens)
        self.path, self.revision, self.config_name, self.hf_split = path, revision, config_name, hf_split
        self.data_files = [data_files] if isinstance(data_files, str) else list(data_files) if data_files else None
        self.text_field, self.conversation_field, self.tag_field = text_field, conversation_field, tag_field
        self.shuffle_buffer, self.special_tokens = s.shuffle_buffer, s.special_tokens
        self._dataset: datasets.IterableDataset | None = None
        self.files: list[str] = []  # their addresses, in the order of the dataset's shards; known once it is open

    @property
    def name(self) -> str:
        return self.path

    @property
    def commit(self) -> str:
        """The commit of `revision`. Noted as an input of the running cell. Raises UserError if it cannot be known."""
        with self.reporting():
            commit = hub.commit_of(self.path, self.revision, "dataset")
        note_commit(self.path, self.revision, commit, "dataset")
        return commit

    @property
    def commits(self) -> dict[str, str]:
        """The commit by the name of the data set, for what is made from the text."""
        return {hub.name_of(self.path, self.revision, "dataset"): self.commit}

    @property
    def spec(self) -> dict[str, Any]:
        """What decides the documents; of a branch its commit."""
        fields = ("path", "revision", "config_name", "data_files", "hf_split")
        columns = ("text_field", "conversation_field", "tag_field", "shuffle_buffer")
        named = {**{name: getattr(self, name) for name in (*fields, *columns)}, "revision": self.commit}
        return {**named, **spec_of_special_tokens(self.special_tokens)}

    def documents(self, split: Split, seed: int, state: Mapping[str, Any] | None = None) -> HubDocuments:
        """The documents of one pass. Raises UserError with the reason if the dataset cannot be read."""
        return HubDocuments(self, split, seed, state)

    def dataset(self) -> datasets.IterableDataset:
        """The unshuffled stream of the needed columns; opened on the first call."""
        if self._dataset is None:
            with self.reporting():
                self._dataset = self._open()
        return self._dataset

    def document(self, record: Mapping[str, Any]) -> Document:
        where = f"the dataset {self.path}"
        if self.conversation_field:
            turns = field_of(record, self.conversation_field, "data.conversation_field", where) or []
            try:
                text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            except (KeyError, TypeError) as error:
                setting = f"data.conversation_field: {self.conversation_field!r} of {where}"
                raise UserError(f"{setting} is not a list of {{role, content}} but: {turns!r:.100}") from error
        else:
            text = field_of(record, str(self.text_field), "data.text_field", where)
        if not isinstance(text, str | None):
            raise UserError(f"data.text_field: {self.text_field!r} of {where} is {type(text).__name__}, not text.")
        tag = field_of(record, self.tag_field, "data.tag_field", where) if self.tag_field else None
        return Document.of(text or "", "" if tag is None else str(tag), where)

    @contextmanager
    def reporting(self, file: str = "") -> Iterator[None]:
        """Turn errors of reading the data, or one of its files, into a UserError with a way out."""
        try:
            yield
        except UserError:
            raise
        except FROM_FILES as error:
            place = f" in {file}" if file and _is_damage(error) else ""
            raise UserError(
                f"data: the dataset {self.path} (revision {self.revision}) cannot be read{place}: "
                f"{_reason(error, self.path)} "
                "Or choose data=bundled, which needs no network, or data=local data.path=<your text files>."
            ) from error

    def _open(self) -> datasets.IterableDataset:
        commit = self.commit
        hub.tip(self.path, commit, "dataset")  # fails at once, where loading would try again for minutes
        if self.data_files:
            urls = [f"hf://datasets/{self.path}@{commit}/{pattern}" for pattern in self.data_files]
            form = "parquet" if all(pattern.endswith(".parquet") for pattern in self.data_files) else "json"
            if any(pattern.endswith(".zst") for pattern in self.data_files) and not importlib.util.find_spec(
                "zstandard"
            ):
                raise UserError("data.data_files: .zst files need the package zstandard: pip install zstandard")
            builder = datasets.load_dataset_builder(form, data_files={self.hf_split: urls})
            if not any(builder.config.data_files.values()):
                raise UserError(f"data.data_files: no file of {self.path} at {commit} matches {self.data_files}.")
        else:
            builder = datasets.load_dataset_builder(self.path, self.config_name, revision=commit)
        self.files = [str(file) for file in (builder.config.data_files or {}).get(self.hf_split, ())]
        dataset = builder.as_streaming_dataset(split=self.hf_split)
        columns = self._columns(dataset.column_names)
        if columns and hasattr(builder.config, "columns"):  # Parquet: do not download other columns
            builder.config.columns = columns
            dataset = builder.as_streaming_dataset(split=self.hf_split)
        return dataset

    def _columns(self, existing: list[str] | None) -> list[str]:
        """The columns of the configured fields. Formats without a schema (JSON) are checked record by record."""
        wanted = set()
        for setting in ("text_field", "conversation_field", "tag_field"):
            field = getattr(self, setting)
            if existing is not None and field:
                column = field if field in existing else field.split(".")[0]
                if column not in existing:
                    raise missing_field(field, f"data.{setting}", f"the dataset {self.path}", existing)
                wanted.add(column)
        return sorted(wanted)


class HubDocuments:
    """The documents of one pass over a HubText.

    A position consists of the start of the current block of `shuffle_buffer` records (the file, and the dataset's own
    position in it), the block's number, and how many of its documents have been yielded.
    """

    def __init__(self, source: HubText, split: Split, seed: int, state: Mapping[str, Any] | None) -> None:
        self._source, self._split, self._seed = source, split, seed
        start: Mapping[str, Any] = state or {"file": 0, "within": None, "block": 0, "yielded": 0}
        self._file: int = start["file"]
        self._within: dict[str, Any] | None = start["within"]
        self._block: int = start["block"]
        self._yielded: int = start["yielded"]
        self._reading: Callable[[], tuple[int, dict[str, Any] | None]] = lambda: (self._file, self._within)
        self._documents = self._run()

    def __iter__(self) -> HubDocuments:
        return self

    def __next__(self) -> Document:
        return next(self._documents)

    def explain(self) -> str:
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"file": self._file, "within": self._within, "block": self._block, "yielded": self._yielded}

    def _run(self) -> Iterator[Document]:
        records = self._records(self._file, self._within)
        source = self._source
        for block in shuffled_blocks(records, self._split, self._seed, source.shuffle_buffer, self._block):
            for document in itertools.islice(block, self._yielded, None):
                self._yielded += 1
                yield document
            self._file, self._within = self._reading()
            self._block += 1
            self._yielded = 0

    def _records(self, first_file: int, within: Any) -> Iterator[Document]:
        """All records from a position on, file by file. `self._reading()` returns the position reached."""
        dataset = self._source.dataset()
        order = list(range(dataset.num_shards))
        random.Random(derived_seed(self._seed, "files")).shuffle(order)
        files = self._source.files if len(self._source.files) == len(order) else [""] * len(order)
        for position in range(first_file, len(order)):
            with self._source.reporting(files[order[position]]):
                file = dataset.shard(dataset.num_shards, order[position]).reshard()  # Parquet: one shard per row group
                if within is not None:
                    file.load_state_dict(within)
                    within = None
                self._reading = partial(_position, position, file)
                yield from map(self._source.document, file)


def _position(file_number: int, file: datasets.IterableDataset) -> tuple[int, dict[str, Any] | None]:
    return file_number, file.state_dict()


def _reason(error: BaseException, path: str) -> str:
    """The cause of the error, in words for the user who set `data`."""
    if isinstance(error, GatedRepoError):
        return (
            f"it is gated. Accept its licence at https://huggingface.co/datasets/{path} with your account, then set "
            "the environment variable HF_TOKEN to a token of that account."
        )
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision (data.revision)."
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such dataset (data.path), or it is private and HF_TOKEN gives no access."
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE=1)."
    if isinstance(error, EntryNotFoundError | FileNotFoundError):
        return f"no file matches data.data_files ({_first_line(error)})."
    if _is_damage(error):
        return f"it is damaged, or no text ({type(error).__name__}: {_first_line(error)})."
    if isinstance(error, HfHubHTTPError) or not isinstance(error, OSError | httpx.HTTPError):
        hints = [hint for phrase, hint in HINTS.items() if phrase in str(error)]
        return f"{_first_line(error)}{f' ({hints[0]})' if hints else ''}."
    return f"the Hub does not answer ({type(error).__name__}: {_first_line(error)})."


def _is_damage(error: BaseException) -> bool:
    """Whether the content of a file is to blame, and not the way to it: errors of the network are OSErrors that have a
    number, or of the classes below."""
    if isinstance(error, HfHubHTTPError | httpx.HTTPError | ConnectionError | TimeoutError | FileNotFoundError):
        return False
    if isinstance(error, UnicodeDecodeError | MemoryError | RecursionError):
        return True
    return isinstance(error, FAILURES) and not (isinstance(error, OSError) and error.errno is not None)


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return "".join(character if character.isprintable() else "?" for character in line)
