"""A language model's activations at one site as a source: text, tokens, forward passes, shuffling, and a disk cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from core import distributed
from core.building import build
from core.checked import at_least, not_empty, positive
from core.errors import UserError
from core.models.identity import commits_of, model_identity, note_model, pinned_model
from core.models.language_model import load_language_model
from core.models.loading import chosen_device, site_width
from core.models.sites import check_site
from core.runtime import Runtime
from core.seeding import derived_seed
from core.streams.activations import ActivationStream, check_sizes
from core.streams.cache import CachedStream, Shards, fill_spec
from core.streams.source import Source, Stream
from core.text.rows import Packing, RowStream

BufferDtype = Literal["float32", "bfloat16", "float16"]
HUB_TEXTS = ("core.text.hub.HubText", "core.text.dialogue_sources.HubDialogues")
BESIDE_THE_STREAM = ("seed", "model", "data", "devices")  # settings with a place of their own in the spec


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationSource(Source):
    """Activations of `model` on the text of `data`; `batch_size` counts tokens.

    site                 for example `resid_pre.8` (`core.models.sites`)
    n_tokens             to train on, rounded up to whole batches
    n_ctx, packing, max_document_tokens  how text is cut into rows (`core.text.rows`)
    buffer_tokens, buffer_dtype          the shuffle buffer (`core.streams.activations`)
    rows_per_forward     rows in one forward pass
    seed                 which text is drawn, and how it is shuffled
    model, data          plain configurations of the groups of these names
    """

    unit = "tokens"
    groups = ("model", "data")
    can_share = True

    site: str = not_empty()
    n_tokens: int = positive()
    n_ctx: int = at_least(2)
    packing: Packing
    max_document_tokens: int | None = at_least(2)
    buffer_tokens: int = positive()
    buffer_dtype: BufferDtype
    rows_per_forward: int = positive()
    seed: int
    model: dict[str, Any]
    data: dict[str, Any]

    def check(self) -> None:
        check_site(self.site)
        check_sizes(self.batch_size, self.buffer_tokens, self.n_ctx)

    @property
    def n_batches(self) -> int:
        return -(-self.n_tokens // self.batch_size)

    @cached_property
    def row_width(self) -> int:
        return site_width(self.model, self.site)

    @cached_property
    def pinned(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`model` and `data` with commits in the place of branches. They go to other processes with the source, so all
        of them read the same."""
        return pinned_model(self.model), pinned_text(self.data)

    @cached_property
    def commits(self) -> dict[str, str]:
        return {**commits_of(self.model), **getattr(build(self.data), "commits", {})}

    def note(self) -> None:
        note_model(self.model)
        assert build(self.data).spec  # it notes what it reads

    @cached_property
    def batches_spec(self) -> dict[str, Any]:
        model, data = self.pinned
        return {
            "stream": {name: value for name, value in self.plain().items() if name not in BESIDE_THE_STREAM},
            "model": model_identity(model),
            "data": build(data).spec,
            "seed": self.seed,
            **({"devices": self.devices} if self.devices > 1 else {}),
        }

    def open(self, run: Runtime) -> Stream:
        """The stream from the language model. With a cache, shards on disk are read, and missing ones are written."""
        if run.cache is None or run.cache.dir is None:
            return self.live()
        fill = fill_spec({"version": self.version, **self.batches_spec})
        shards = Shards(run.cache.dir, fill, run.cache.max_gb, run.cache.keep_free_gb)
        sizes = {name: getattr(self, name) for name in ("batch_size", "buffer_tokens", "n_ctx", "buffer_dtype")}
        n_batches = self.n_batches + self.calibration_batches
        return CachedStream(shards, self.live, sizes, n_batches, chosen_device(self.model["device"]))

    def live(self, rank: int | None = None) -> ActivationStream:
        """The stream from the language model; with several devices, the part of `rank` (None: this process's rank).

        Of every `devices` blocks of `rows_per_forward` rows each rank takes one.
        """
        rank, n = distributed.rank() if rank is None else rank, self.devices
        seed = self.seed if n == 1 else derived_seed(self.seed, "rank", rank)
        model, data = self.pinned
        lm = load_language_model(DictConfig(model))
        rows = RowStream(
            build(data),
            lm.tokenizer,
            "train",
            self.seed,
            self.n_ctx,
            self.packing,
            self.max_document_tokens,
            rank,
            n,
        )
        return ActivationStream(
            lm,
            self.site,
            rows,
            distributed.share("stream.batch_size", self.batch_size, n),
            distributed.share("stream.buffer_tokens", self.buffer_tokens, n),
            self.rows_per_forward,
            seed,
            getattr(torch, self.buffer_dtype),
        )

    def report(self, stream: Stream) -> dict[str, float]:
        """How often the text was read, and what was replaced in it (`core.text.rows.counts_of`)."""
        return stream.report() if isinstance(stream, ActivationStream | CachedStream) else {}

    def check_devices(self) -> None:
        super().check_devices()
        n = self.devices
        if self.buffer_tokens % (n * self.n_ctx):
            raise UserError(
                f"stream.buffer_tokens ({self.buffer_tokens:,}) must be a multiple of stream.n_ctx ({self.n_ctx}) "
                f"times trainer.devices ({n}): each device gets whole rows."
            )


def pinned_text(node: Any) -> Any:
    """A plain `data` node in which every data set of the hub, also one within another text, is named by its commit."""
    if isinstance(node, Mapping):
        inner = {key: pinned_text(value) for key, value in node.items()}
        return {**inner, "revision": build(inner).commit} if inner.get("_target_") in HUB_TEXTS else inner
    return [pinned_text(value) for value in node] if isinstance(node, list) else node
