"""Datasets from a small Hub on this machine, over HTTP: streaming, resuming, error messages."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from core.text.documents import TextSource, split_of
from core.text.hub import HubText

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = (COMMIT, "main", "refs/convert/parquet")
TEXTS = [f"Document number {i}: {'word ' * (i % 7)}end." for i in range(400)]
REPOSITORY = Path(__file__).parents[2]


def parquet(rows: list[dict], row_group_size: int = 50) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=row_group_size)
    return sink.getvalue()


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of_parquet() -> list[dict]:
    return [{"text": text, "meta": {"set": f"set {i % 3}"}, "unused": i} for i, text in enumerate(TEXTS)]


def conversations() -> list[dict]:
    return [
        {"conversation": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yes?"}]}
        for i in range(40)
    ]


def damaged(content: bytes) -> bytes:
    """With a page that cannot be unpacked."""
    return content[:40] + b"\xff" * 60 + content[100:]


DATASETS: dict[str, dict[str, bytes]] = {
    "tiny/damaged": {
        "data/0.parquet": parquet(rows_of_parquet()),
        "data/1.parquet": damaged(parquet(rows_of_parquet())),
    },
    "tiny/broken": {"a.jsonl": jsonl([{"text": t} for t in TEXTS[:50]]) + b'{"text": "half'},
    "tiny/parquet": {
        "README.md": b"---\nconfigs:\n- config_name: some\n  data_files: data/*.parquet\n---\n",
        **{f"data/{n}.parquet": parquet(rows_of_parquet()[n * 100 : n * 100 + 100]) for n in range(4)},
    },
    "tiny/scripted": {"scripted.py": b"raise SystemExit", "data/0.parquet": parquet(rows_of_parquet())},
    "tiny/jsonl": {"a.jsonl": jsonl([{"body": t} for t in TEXTS[:200]]), "b.jsonl": jsonl([{"body": None}])},
    "tiny/chat": {"train.parquet": parquet(conversations())},
    "tiny/gated": {"train.parquet": parquet(conversations())},
}


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that is needed to read a dataset."""

    protocol_version = "HTTP/1.1"
    log: ClassVar[list[str]] = []
    gone: ClassVar[bool] = False

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.log.append(f"{self.command} {self.path}")
        if self.gone:
            self.close_connection = True
            return None
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            repository, action, rest = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "", parts[5:]
        elif parts[0] == "datasets":
            repository, action, rest = "/".join(parts[1:3]), parts[3], parts[4:]
        else:
            return self.refuse(404, "EntryNotFound")
        if repository not in DATASETS:
            return self.refuse(401, "RepoNotFound")
        files = DATASETS[repository]
        gated = repository == "tiny/gated"
        if rest and rest[0] not in REVISIONS:
            return self.refuse(404, "RevisionNotFound")
        path = "/".join(rest[1:])
        if action in ("revision", ""):
            siblings = [{"rfilename": name} for name in files]
            info = {"_id": "1", "id": repository, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            return self.reply_json({**info, "gated": "auto" if gated else False, "disabled": False, "downloads": 0})
        if gated:
            return self.refuse(403, "GatedRepo")
        if action == "tree":
            return self.reply_json(tree(files, path, parse_qs(url.query).get("recursive") == ["true"]))
        if action == "paths-info":
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self.reply_json([entry for entry in tree(files, "", True) if entry["path"] in wanted])
        if action == "resolve" and path in files:
            return self.reply_file(files[path])
        return self.refuse(404, "EntryNotFound")

    do_HEAD = do_POST = do_GET  # noqa: N815

    def reply_file(self, content: bytes) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(part[1]) if part else 0
        last = min(int(part[2]) if part and part[2] else len(content) - 1, len(content) - 1)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if part:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.reply(206 if part else 200, content[first : last + 1], headers)

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    below = {name: content for name, content in files.items() if name.startswith(prefix)}
    entries: dict[str, dict[str, Any]] = {}
    for name, content in below.items():
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            path = prefix + "/".join(parts[:depth])
            entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            entries[name] = {"type": "file", "path": name, "oid": oid, "size": len(content)}
    return list(entries.values())


WORKER = """
import json, sys, time
import datasets
from core.text.hub import HubText
from core.text.rows import RowStream
from core.errors import UserError

pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.01))  # retries do not wait here
datasets.config.STREAMING_READ_MAX_RETRIES = 2

streams = {}
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    try:
        if job["stream"] not in streams:
            source = HubText(**job["settings"])
            streams[job["stream"]] = source.documents(job["split"], job["seed"], job["state"])
        stream, documents = streams[job["stream"]], []
        for document in stream:
            documents.append([document.text, document.tag])
            if len(documents) == job["n"]:
                break
        answer = {"documents": documents, "state": stream.state_dict()}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Reader:
    """A process that reads from the small Hub. It is separate since huggingface_hub reads HF_ENDPOINT on import."""

    def __init__(self, port: int, home: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=REPOSITORY,
            env={**environment, "HF_HUB_DISABLE_TELEMETRY": "1"},
        )
        self.n_streams = 0
        assert self.process.stdout.readline() == "ready\n"

    def open(self, **settings: Any) -> int:
        self.n_streams += 1
        self.settings = {"path": "tiny/parquet", "revision": "main", "shuffle_buffer": 30, **settings}
        return self.n_streams

    def read(
        self, stream: int, n: int | None = None, split: str = "train", seed: int = 0, state: Any = None
    ) -> dict[str, Any]:
        job = {"stream": stream, "settings": self.settings, "split": split, "seed": seed, "state": state, "n": n}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def texts(self, split: str = "train", seed: int = 0, **settings: Any) -> list[str]:
        return [text for text, _ in self.read(self.open(**settings), split=split, seed=seed)["documents"]]

    def error(self, **settings: Any) -> str:
        started = time.monotonic()
        answer = self.read(self.open(**settings), n=1)
        assert time.monotonic() - started < 10
        return answer["error"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reader = Reader(server.server_address[1], tmp_path_factory.mktemp("hf_home"))
    yield reader
    reader.process.stdin.close()
    reader.process.wait(timeout=60)
    server.shutdown()
    server.server_close()


def test_every_document_is_streamed_once_and_the_splits_are_disjoint(reader):
    train, heldout = reader.texts(), reader.texts("heldout")
    assert sorted(train + heldout) == sorted(TEXTS)
    assert heldout and all(split_of(text) == "heldout" for text in heldout)
    assert all(split_of(text) == "train" for text in train)


def test_the_order_depends_only_on_the_seed(reader):
    assert reader.texts(seed=1) == reader.texts(seed=1)
    assert reader.texts(seed=1) != reader.texts(seed=2)


def test_files_may_be_named_instead_of_a_configuration(reader):
    assert reader.texts(revision="refs/convert/parquet", data_files=["dat*/*.parquet"]) == reader.texts(
        config_name="some"
    )


@pytest.mark.parametrize("path", ["tiny/parquet", "tiny/jsonl"])
@pytest.mark.parametrize("n_before", [1, 29, 150])
def test_a_stream_continues_exactly_from_a_saved_position(reader, path, n_before):
    settings = {"path": path, "text_field": "text" if path == "tiny/parquet" else "body"}
    whole = reader.texts(seed=5, **settings)
    stream = reader.open(**settings)
    part = reader.read(stream, n=n_before, seed=5)
    head = [text for text, _ in part["documents"]]
    resumed = reader.read(reader.open(**settings), seed=5, state=json.loads(json.dumps(part["state"])))
    assert head + [text for text, _ in resumed["documents"]] == whole


def test_resuming_does_not_read_files_before_the_position(reader):
    part = reader.read(reader.open(), n=320)
    Hub.log.clear()
    reader.read(reader.open(), state=part["state"])
    fetched = {name.split("/")[-1] for name in Hub.log if "/resolve/" in name and name.endswith(".parquet")}
    assert "1.parquet" not in fetched and len(fetched) <= 2  # the first file's columns, the last file's rows


def test_tags_and_conversations_are_read_and_null_texts_are_skipped(reader):
    documents = reader.read(reader.open(tag_field="meta.set"))["documents"]
    assert {(text, tag) for text, tag in documents} <= {(text, f"set {i % 3}") for i, text in enumerate(TEXTS)}
    chat = reader.texts(path="tiny/chat", text_field=None, conversation_field="conversation")
    assert set(chat) <= {f"user: Hi {i}\n\nassistant: Yes?" for i in range(40)} and len(chat) > 30
    assert "not a list of {role, content} but: 'Doc" in reader.error(text_field=None, conversation_field="text")
    assert sorted(reader.texts(path="tiny/jsonl", text_field="body")) == sorted(
        text for text in TEXTS[:200] if split_of(text) == "train"
    )


def test_the_error_for_a_missing_column_names_the_setting_and_lists_the_columns(reader):
    wanted = "data.text_field: the dataset tiny/parquet has no field 'body'; the fields here are: text, meta, unused."
    assert reader.error(text_field="body") == wanted
    assert "data.tag_field" in reader.error(tag_field="lang")
    assert "no field 'meta.nope'; the fields here are: set" in reader.error(tag_field="meta.nope")
    assert reader.error(path="tiny/jsonl").endswith("has no field 'text'; the fields here are: body.")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"path": "tiny/none"}, "no such dataset (data.path)"),
        ({"revision": "v9"}, "no such revision (data.revision)"),
        ({"path": "tiny/gated"}, "Accept its licence at https://huggingface.co/datasets/tiny/gated"),
        ({"path": "tiny/scripted"}, "found scripted.py (name its Parquet files in data.data_files"),
        ({"hf_split": "valid"}, "Available splits: ['train'] (data.hf_split)"),
        ({"config_name": "other"}, "Available: ['some'] (data.config_name)"),
    ],
)
def test_the_error_for_a_dataset_that_cannot_be_read_has_the_reason_and_a_way_out(reader, settings, reason):
    message = reader.error(**settings)
    path, revision = settings.get("path", "tiny/parquet"), settings.get("revision", "main")
    assert f"the dataset {path} (revision {revision})" in message and reason in message
    assert "data=bundled" in message and "data=local" in message


def test_patterns_that_match_no_file_are_named_in_the_error(reader):
    assert "data.data_files: no file of tiny/parquet" in reader.error(data_files=["x/*.parquet"])


def test_a_script_in_the_repository_is_ignored_if_data_files_are_named(reader):
    assert len(reader.texts(path="tiny/scripted", data_files=["data/*.parquet"])) > 350


def test_a_hub_that_stops_answering_is_reported_before_and_while_reading(reader):
    stream = reader.open()
    assert len(reader.read(stream, n=10)["documents"]) == 10
    Hub.gone = True
    try:
        assert "cannot be read: the Hub does not answer" in reader.error()
        assert "cannot be read: the Hub does not answer" in reader.read(stream)["error"]
    finally:
        Hub.gone = False


@pytest.mark.parametrize("name", ["openwebtext", "pile", "redpajama", "fineweb", "lmsys"])
def test_every_configured_dataset_is_a_text_source_with_a_plain_spec(name):
    source = instantiate(OmegaConf.load(REPOSITORY / "conf" / "data" / f"{name}.yaml"))
    assert isinstance(source, HubText)
    if len(source.revision) == 40:  # of a branch, the hub says what it is
        assert isinstance(source, TextSource) and json.loads(json.dumps(source.spec)) == source.spec


@pytest.mark.parametrize(
    ("path", "pattern", "message"),
    [
        ("tiny/damaged", "data/*.parquet", r"in \S+/data/1\.parquet: it is damaged"),
        ("tiny/broken", "*.jsonl", "a.jsonl"),
    ],
)
def test_a_damaged_file_is_named_and_the_hub_is_not_blamed(reader, path, pattern, message):
    error = reader.read(reader.open(path=path, data_files=[pattern]))["error"]
    assert re.search(message, error) and "does not answer" not in error
