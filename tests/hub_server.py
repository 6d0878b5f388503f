"""A Hugging Face hub on this machine: models and data sets with branches that move, and requests that fail as asked.

    with hub_server() as hub:
        hub.add("lab/tiny", files_of(folder))            # a commit on `main`; again: `main` moves to it
        hub.fail("model.safetensors", 500)               # every request for it; or "short", "drop"; times=1: only one
        endpoint(hub.url)                                # in this process; in another one HF_ENDPOINT=hub.url

`hub.log` has every request. Files are large (LFS) from `LFS_BYTES` on, as on the hub; then their ETag is their SHA-256.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 1024


@dataclass
class Failure:
    """What happens to requests whose path matches: a status, `short` (half of the body), `drop` (no answer), or seconds
    that the answer takes."""

    pattern: str
    how: int | str | float
    method: str = ""  # GET, HEAD; empty: both
    times: int = -1  # -1: always


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class HubServer:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.failures: list[Failure] = []
        self.log: list[str] = []
        self.url = ""

    def add(self, name: str, files: Mapping[str, bytes], branch: str = "main", gated: bool = False) -> str:
        """Add a commit to a model (`owner/name`) or data set (`datasets/owner/name`), and move the branch to it."""
        repository = self.repositories.setdefault(name, Repository())
        commit = hashlib.sha1(repr((name, len(repository.commits), sorted(files))).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        repository.gated = gated
        return commit

    def fail(self, pattern: str, how: int | str | float, method: str = "", times: int = -1) -> None:
        """Let requests whose path matches fail (see `Failure`)."""
        self.failures.append(Failure(pattern, how, method, times))

    def heal(self) -> None:
        self.failures.clear()

    def asked_for(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]

    def failure(self, method: str, path: str) -> int | str | float | None:
        for failure in self.failures:
            if failure.times and failure.method in ("", method) and re.search(failure.pattern, path):
                failure.times -= 1
                return failure.how
        return None


def files_of(folder: Path, changed: Mapping[str, bytes | None] | None = None) -> dict[str, bytes]:
    """The files of a folder by name; `changed` replaces some, adds some, or leaves them out (None)."""
    files: dict[str, bytes | None] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files.update(changed or {})
    return {name: content for name, content in files.items() if content is not None}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    handler = type("Served", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self.hub.log.append(f"{self.command} {self.path}")
        how = self.hub.failure(self.command, self.path)
        if how == "drop":
            self.close_connection = True
            return None
        if isinstance(how, float):
            time.sleep(how)
        elif isinstance(how, int):
            return self.refuse(how, "")
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        if api and parts[0] == "models":
            parts = parts[1:]
        n = 3 if parts[0] == "datasets" else 2
        name, rest = "/".join(parts[:n]), parts[n:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
        action, revision = (rest[0] if rest else "revision"), (rest[1] if len(rest) > 1 else "main")
        commit = repository.branches.get(revision, revision)
        if action in ("revision", "tree", "resolve", "paths-info") and commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        files, path = repository.commits.get(commit, {}), "/".join(rest[2:])
        if action == "revision":
            return self.reply_json(_info(name, commit, files, repository.gated))
        if repository.gated:
            return self.refuse(403, "GatedRepo")
        if action == "tree":
            return self.reply_json(_tree(files, path, parse_qs(url.query).get("recursive", [""])[0].lower() == "true"))
        if action == "paths-info":
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self.reply_json([entry for entry in _tree(files, "", True) if entry["path"] in wanted])
        if action == "resolve" and path in files:
            return self.reply_file(files[path], commit, short=how == "short")
        return self.refuse(404, "EntryNotFound")

    do_HEAD = do_POST = do_GET  # noqa: N815

    def reply_file(self, content: bytes, commit: str, short: bool) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(part[1]) if part else 0
        last = min(int(part[2]) if part and part[2] else len(content) - 1, len(content) - 1)
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if part:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.reply(206 if part else 200, content[first : last + 1], headers, short)

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def reply(self, status: int, body: bytes, headers: dict[str, str], short: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if short else body)
            self.close_connection = self.close_connection or short

    def log_message(self, format: str, *args: object) -> None:
        pass


def _info(name: str, commit: str, files: Mapping[str, bytes], gated: bool) -> dict[str, Any]:
    siblings = [{"rfilename": file} for file in files]
    info = {"_id": "1", "id": name.removeprefix("datasets/"), "sha": commit, "private": False, "siblings": siblings}
    return {**info, "tags": [], "gated": "auto" if gated else False, "disabled": False, "downloads": 0}


def _etag(content: bytes) -> str:
    """The SHA-256 of a large file, the hash of git of a small one."""
    if len(content) >= LFS_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            path = prefix + "/".join(parts[:depth])
            entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            entry: dict[str, Any] = {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest()}
            entry["size"] = len(content)
            if len(content) >= LFS_BYTES:
                entry["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 134}
            entries[name] = entry
    return list(entries.values())
