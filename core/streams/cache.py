"""An activation stream kept on disk: computed by the language model once, read by every later run.

Shapes: N tokens in a shard, d = width of the site.

A shard is one fill of the stream's buffer in the order in which it is served, as a safetensors file: x `[N, d]` in the
buffer's dtype, tokens and positions `[N]` int32. So the batches equal those of the stream, bit for bit and in the same
order; the batch size may differ from the one used when the shards were written. A shard also records the text's
position before and after the fill: a run reads the shards that exist, and where one is missing or damaged, the language
model continues from that position. The bits depend on the machine that computed them.

The folder is `<cache.dir>/<key>/`; the key covers everything that decides a fill. A shard gets its final name when it
is complete. The SHA-256 of its content is checked whenever it is opened. Only one process writes at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.artifacts import content_key
from core.atomic import atomically, write_atomically
from core.batch import Batch
from core.errors import UserError
from core.streams.activations import BufferedStream, check_sizes, reported

MANIFEST = "cache.json"
NOT_IN_THE_KEY = ("n_tokens", "batch_size", "batches_per_chunk", "calibration_batches")  # settings of `stream`
TOKEN_BYTES = 8  # per token, for its id and position, besides x
ADVICE = "Ask for fewer stream.n_tokens, delete folders of other streams there, or use no cache: cache=none."


def fill_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the fills of the buffer: a part of an `ActivationSource`'s `spec`."""
    stream = {key: value for key, value in spec["stream"].items() if key not in NOT_IN_THE_KEY}
    return {**spec, "stream": stream}


@dataclass(frozen=True)
class Shard:
    """One fill: x `[N, ...]`, tokens and positions `[N]`; the text's position before (`rows`) and after it; and what a
    batch has as truth, `[N]` each."""

    x: Tensor
    tokens: Tensor
    positions: Tensor
    rows: dict[str, Any]
    rows_after: dict[str, Any]
    truth: dict[str, Tensor] = field(default_factory=dict)

    def batches(self, batch_size: int, first: int, device: torch.device) -> Iterator[Batch]:
        """Batches from number `first` on, as copies on the device."""
        for begin in range(first * batch_size, len(self.x), batch_size):
            part = slice(begin, begin + batch_size)
            yield Batch(
                self.x[part].to(device, torch.float32, copy=True),
                self.tokens[part].to(device, torch.long),
                self.positions[part].to(device, torch.long),
                {name: _whole(values[part].to(device)) for name, values in self.truth.items()},
            )


class Shards:
    """The shards of one stream below `root`. Raises UserError if the folder belongs to another configuration.

    max_gb        limit for the shards of all streams below `root`
    keep_free_gb  space to leave free on the disk
    """

    def __init__(self, root: str | Path, spec: Mapping[str, Any], max_gb: float, keep_free_gb: float) -> None:
        self.max_gb, self.keep_free_gb = max_gb, keep_free_gb
        self.root, self.spec, self.key = Path(root), json.loads(json.dumps(spec)), content_key(spec)
        self.folder = self.root / self.key
        self.writable = True  # until a write fails
        self._damaged: set[int] = set()
        self._reported_writer = False  # that another process is writing
        self._check()

    def path(self, fill: int) -> Path:
        return self.folder / f"{fill:06d}.safetensors"

    def width(self) -> int | None:
        """d of the shards; None if there are none yet."""
        return self._manifest["d"] if self._manifest else None

    def read(self, fill: int) -> Shard | None:
        """The shard, mapped into memory; None if it is missing or damaged (reported on standard error)."""
        path = self.path(fill)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
                metadata = file.metadata() or {}
            if metadata.get("sha256") != _digest(tensors, metadata.get("about", "")):
                raise SafetensorError("its SHA-256 differs from the recorded one")
            about = json.loads(metadata["about"])
            if (about["cache"], about["fill"]) != (self.key, fill):
                raise SafetensorError(f"it is shard {about['fill']} of cache {about['cache']}")
        except (SafetensorError, OSError) as error:
            self._damaged.add(fill)
            print(f"activation cache: {path} is damaged and will be computed again: {error}", file=sys.stderr)
            return None
        rows, after = ({**about[place], **_below(place, tensors)} for place in ("rows", "rows_after"))
        truth = _below("truth", tensors)
        return Shard(**tensors, rows=rows, rows_after=after, truth=truth)

    def write(self, fill: int, shard: Shard) -> None:
        """Store a shard, replacing a damaged one, unless another process is writing or has written it.

        A failed write is reported on standard error and leaves no file; no further shard is written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "write.lock", timeout=0):
                for leftover in self.folder.glob(".*"):  # from a killed process
                    leftover.unlink()
                if self.path(fill).is_file() and fill not in self._damaged:  # written by another run meanwhile
                    return
                if self._manifest is None:
                    manifest = {"spec": self.spec, "d": shard.x[0].numel()}
                    write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
                self._save(fill, shard)
        except Timeout:
            if not self._reported_writer:
                print(f"activation cache: another run is writing to {self.folder}, this one will not", file=sys.stderr)
            self._reported_writer = True
        except (SafetensorError, OSError) as error:
            self.writable = False
            print(
                f"activation cache: shard {fill} could not be written to {self.folder}, the run continues without "
                f"writing: {error}",
                file=sys.stderr,
            )

    def announce(self, n_fills: int, fill_bytes: int) -> None:
        """Print the disk space of `n_fills` shards. Raises UserError if the limits or the disk do not allow it.

        The text's positions are not counted: 8 bytes per token read ahead, at most 64 documents (`RowStream`).
        """
        n_missing = sum(not self.path(fill).is_file() for fill in range(n_fills))
        print(
            f"activation cache {self.folder}: {n_fills} shards of {fill_bytes / 1e6:,.1f} MB = "
            f"{n_fills * fill_bytes / 1e9:,.3f} GB, {n_fills - n_missing} of them exist; at most 2 in memory",
            file=sys.stderr,
        )
        if not n_missing:
            return
        missing = n_missing * fill_bytes / 1e9
        used = sum(path.stat().st_size for path in self.root.rglob("*.safetensors")) / 1e9
        if used + missing > self.max_gb:
            raise UserError(
                f"cache.max_gb={self.max_gb:g}: {missing:,.3f} GB of activations are to be written to {self.root}, "
                f"which holds {used:,.3f} GB already. Raise cache.max_gb. {ADVICE}"
            )
        existing = next(folder for folder in (self.root.absolute(), *self.root.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if missing > free - self.keep_free_gb:
            raise UserError(
                f"cache.dir={self.root}: {missing:,.3f} GB of activations are to be written, the disk has {free:,.3f} "
                f"GB free, and cache.keep_free_gb={self.keep_free_gb:g} must stay free. Choose a larger disk. {ADVICE}"
            )

    def _check(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"cache.dir={self.root} is not a folder. Choose another one.")
        if (self.root / MANIFEST).exists():
            raise UserError(f"cache.dir={self.root} is itself the cache of one stream. Choose the folder above it.")
        manifest = self._manifest
        shards = next(self.folder.glob("*.safetensors"), None)
        if manifest is None and shards is not None:
            raise UserError(f"{self.folder} has shards but no readable {MANIFEST}: delete or move the folder.")
        if manifest is not None and manifest["spec"] != self.spec:
            wrong = ", ".join(_differences(manifest["spec"], self.spec))
            raise UserError(
                f"{self.folder} holds activations of another configuration (it differs in {wrong}): folders below "
                "cache.dir must keep their names. Move it, or choose another cache.dir."
            )

    @property
    def _manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text())
            return {"spec": manifest["spec"], "d": int(manifest["d"])}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def _save(self, fill: int, shard: Shard) -> None:
        places = {"rows": shard.rows, "rows_after": shard.rows_after}
        tensors = {"x": shard.x, "tokens": shard.tokens.int(), "positions": shard.positions.int()}
        for name, values in {**places, "truth": shard.truth}.items():
            tensors |= {f"{name}.{key}": _short(v) for key, v in values.items() if isinstance(v, Tensor)}
        plain = {name: {k: v for k, v in rows.items() if not isinstance(v, Tensor)} for name, rows in places.items()}
        about = json.dumps({"cache": self.key, "fill": fill, **plain})
        with atomically(self.path(fill)) as temporary:
            save_file(tensors, temporary, metadata={"about": about, "sha256": _digest(tensors, about)})


class CachedStream:
    """The stream that `live` opens: shards that exist are read, missing ones are computed and written.

    `live` is called, and the language model loaded, at the first missing shard. States of this stream and of that of
    `live` are interchangeable. `stream` holds the settings of that name. Batches after the first
    `n_batches` are served but not written. In memory are the shard being served and the one being written or read
    ahead. `token_bytes`: those of a token besides x. Raises UserError if the sizes do not fit together, or the disk is
    too small.
    """

    def __init__(
        self,
        shards: Shards,
        live: Callable[[], BufferedStream],
        stream: Mapping[str, Any],
        n_batches: int,
        device: torch.device,
        token_bytes: int = TOKEN_BYTES,
    ) -> None:
        batch_size, buffer_tokens = stream["batch_size"], stream["buffer_tokens"]
        check_sizes(batch_size, buffer_tokens, stream.get("n_ctx", 1))
        self.shards, self.batch_size, self.device, self._open_live = shards, batch_size, device, live
        self.batches_per_fill = buffer_tokens // batch_size
        self.n_fills = -(-n_batches // self.batches_per_fill)
        width, dtype = shards.width() or math.prod(self._live.row_shape), getattr(torch, stream["buffer_dtype"])
        shards.announce(self.n_fills, buffer_tokens * (width * dtype.itemsize + token_bytes))
        self._worker = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._source: Iterator[Batch] | None = None  # batches of the current fill, once it is opened
        self.fill, self.served = 0, 0
        self._ahead: tuple[int, Future[Shard | None]] | None = (0, self._worker.submit(self.shards.read, 0))
        first = self._ahead[1].result()
        self._rows = first.rows if first else self._live.state_dict()["rows"]  # the text's position before the fill
        self._rows_after = self._rows  # and after it

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.served == self.batches_per_fill:
            self.fill, self.served, self._rows, self._source = self.fill + 1, 0, self._rows_after, None
        if self._source is None:
            self._source = self._open()
        self.served += 1
        return next(self._source)

    def state_dict(self) -> dict[str, Any]:
        """As `BufferedStream.state_dict`."""
        used_up = self.served == self.batches_per_fill
        return {
            "fill": self.fill + used_up,
            "served": 0 if used_up else self.served,
            "rows": self._rows_after if used_up else self._rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state belongs to other text or other settings."""
        if state["rows"]["stream"] != self._rows["stream"]:
            raise ValueError("This position belongs to other text, or to text packed differently. Start anew.")
        self.fill, self.served, self._rows = state["fill"], state["served"], state["rows"]
        self._source = None

    def rows_read(self) -> dict[str, Any]:
        """As `BufferedStream.rows_read`."""
        return self._rows if self._source is None else self._rows_after

    def report(self) -> dict[str, float]:
        """As `ActivationStream.report`."""
        return reported(self.rows_read())

    @cached_property
    def _live(self) -> BufferedStream:
        return self._open_live()

    def _open(self) -> Iterator[Batch]:
        """The rest of the current fill: from its shard, or computed and written."""
        shard = self._read(self.fill)
        if shard is None:
            self._compute()
        else:
            self._rows_after = shard.rows_after
        if self.shards.path(self.fill + 1).is_file():
            self._ahead = self.fill + 1, self._worker.submit(self.shards.read, self.fill + 1)
        return self._live if shard is None else shard.batches(self.batch_size, self.served, self.device)

    def _read(self, fill: int) -> Shard | None:
        """The shard, from what was read ahead or from the disk."""
        ahead, self._ahead = self._ahead, None
        return ahead[1].result() if ahead and ahead[0] == fill else self.shards.read(fill)

    def _compute(self) -> None:
        state, live = self.state_dict(), self._live
        live_state = live.state_dict()
        if (live_state["fill"], live_state["served"]) != (state["fill"], state["served"]):
            live.load_state_dict(state)
        live.prepare()
        self._rows_after = live.rows.state_dict()
        if self._writing is not None:
            self._writing.result()
        if self.shards.writable and self.fill < self.n_fills:
            x, tokens, positions, truth = live.in_order()
            shard = Shard(x, tokens, positions, self._rows, self._rows_after, truth)
            self._writing = self._worker.submit(self.shards.write, self.fill, shard)
            if self.fill + 1 == self.n_fills:
                self._writing.result()


def _below(place: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that belong to a place, taken out of it, as they were before `_short`."""
    names = [name for name in tensors if name.startswith(f"{place}.")]
    return {name.removeprefix(f"{place}."): _whole(tensors.pop(name)) for name in names}


def _short(values: Tensor) -> Tensor:
    """As a file has it: whole numbers in 32 bits."""
    return values if values.dtype == torch.bool else values.int()


def _whole(values: Tensor) -> Tensor:
    return values if values.dtype == torch.bool else values.long()


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    """SHA-256 of a shard's content."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    """The dotted names under which two specifications differ."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return [name] if a != b else []
    names = sorted(a.keys() | b.keys())
    return [d for key in names for d in _differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))]
