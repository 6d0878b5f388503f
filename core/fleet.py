"""Dictionaries on demand: ask for one with `load_or_train`, or for many at once with `prefetch`.

A `Request` says everything that decides a dictionary: the method's settings and the stream of activations. Requests on
the same stream are trained together, in one Lightning run on one pass of the language model; each dictionary comes out
as it would have alone, since the batches are the same and nothing else is shared. Finished ones lie in the artifact
store under the key of their request.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from core.artifacts import Store, content_key
from core.data.activations import ActivationStream, Stream
from core.data.cache import CachedStream, Shards, fill_spec
from core.data.module import ActivationData
from core.data.rows import RowStream
from core.errors import UserError
from core.methods.base import DictionaryMethod
from core.methods.saved import load_dictionary, save_dictionary
from core.methods.together import Fleet
from core.models.identity import model_identity
from core.models.language_model import load_language_model
from core.models.loading import chosen_device
from core.training import Checkpoints, TokenProgress, discard_finished, make_trainer

KIND = "dictionary"
_failed_here: dict[tuple[str, str], Exception] = {}  # by store and key: what this process need not try again


@dataclass(frozen=True, eq=False)
class Request:
    """One dictionary: plain, resolved configurations of the method, the stream, the language model and the text."""

    method: dict[str, Any]
    stream: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    precision: str
    seed: int

    @cached_property
    def stream_spec(self) -> dict[str, Any]:
        """What decides the batches: requests with equal ones train together."""
        return {
            "stream": self.stream,
            "model": model_identity(DictConfig(self.model)),
            "data": instantiate(self.data).spec,
            "precision": self.precision,
            "seed": self.seed,
        }

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What decides the dictionary."""
        return {"method": self.method, **self.stream_spec}

    @cached_property
    def key(self) -> str:
        return content_key(self.spec)

    @property
    def n_batches(self) -> int:
        return -(-self.stream["n_tokens"] // self.stream["batch_size"])


def load_or_train(request: Request, cfg: DictConfig) -> DictionaryMethod:
    """The dictionary from the store; trained first, alone, if it is not there. Raises what stopped its training."""
    store = Store(cfg.artifacts_dir)
    if not store.has(KIND, request.spec):
        failed = _failed_here.get((cfg.artifacts_dir, request.key)) or train_together([request], cfg).get(request.key)
        if failed:
            raise failed
    return load_dictionary(store.path(KIND, request.spec))


def prefetch(requests: Sequence[Request], cfg: DictConfig) -> None:
    """Train what is missing of many requests, stream by stream. What fails here is said, and left to its cell."""
    store = Store(cfg.artifacts_dir)
    _discard_checkpoints(store)
    groups: dict[str, dict[str, Request]] = defaultdict(dict)
    for request in requests:
        if not store.has(KIND, request.spec):
            groups[content_key(request.stream_spec)][request.key] = request
    for number, group in enumerate(groups.values(), 1):
        print(f"stream {number} of {len(groups)}: {len(group)} dictionaries to train", file=sys.stderr)
        try:
            failed: dict[str, Exception] = train_together(list(group.values()), cfg)
        except (UserError, FloatingPointError) as error:  # not OSError: on a full disk every cell would train in vain
            failed = dict.fromkeys(group, error)
        for message in sorted({str(error) for error in failed.values()}):
            print(f"not trained together: {message}", file=sys.stderr)


def train_together(requests: Sequence[Request], cfg: DictConfig) -> dict[str, Exception]:
    """Train requests that share a stream and store each dictionary. Returns what stopped any of them, by key."""
    store = Store(cfg.artifacts_dir)
    ordered = sorted(requests, key=lambda request: request.key)
    with ExitStack() as locks:
        for request in ordered:  # in one order everywhere: two fleets cannot wait for each other
            locks.enter_context(store.lock(KIND, request.spec))
        missing = [request for request in ordered if not store.has(KIND, request.spec)]
        methods, failed = _build(missing)
        if methods:
            failed |= _train([r for r in missing if r.key in methods], methods, store, cfg)
        _discard_checkpoints(store)
    _failed_here.update({(cfg.artifacts_dir, key): error for key, error in failed.items()})
    return failed


def open_stream(request: Request) -> ActivationStream:
    """The stream of training activations that a request asks for."""
    s = request.stream
    lm = load_language_model(DictConfig(request.model))
    rows = RowStream(
        instantiate(request.data),
        lm.tokenizer,
        "train",
        request.seed,
        s["n_ctx"],
        s["packing"],
        s["max_document_tokens"],
    )
    return ActivationStream(
        lm,
        s["site"],
        rows,
        s["batch_size"],
        s["buffer_tokens"],
        s["rows_per_forward"],
        request.seed,
        getattr(torch, s["buffer_dtype"]),
    )


def training_stream(request: Request, cfg: DictConfig) -> Stream:
    """The stream of a request; with `cache.dir`, read from disk as far as it is there, and written where it is not."""
    cache, s = cfg.get("cache"), request.stream
    if cache is None or cache.dir is None:
        return open_stream(request)
    return CachedStream(
        Shards(cache.dir, fill_spec(request.stream_spec), cache.max_gb, cache.keep_free_gb),
        partial(open_stream, request),
        s,
        request.n_batches + s["calibration_batches"],
        chosen_device(request.model["device"]),
    )


def _discard_checkpoints(store: Store) -> None:
    """Remove those of trainings all of whose dictionaries are stored, also what a killed process left of them."""
    discard_finished(store.root / "training", lambda key: (store.root / KIND / key).is_dir())


def _build(requests: Sequence[Request]) -> tuple[dict[str, DictionaryMethod], dict[str, Exception]]:
    """The methods that can be built, and what was wrong with the others, by key."""
    methods: dict[str, DictionaryMethod] = {}
    failed: dict[str, Exception] = {}
    for request in requests:
        try:
            methods[request.key] = instantiate(request.method)
            methods[request.key].n_steps = request.n_batches
        except Exception as error:
            failed[request.key] = error.__cause__ if isinstance(error.__cause__, UserError) else error
    return methods, failed


def _train(
    requests: Sequence[Request], methods: dict[str, DictionaryMethod], store: Store, cfg: DictConfig
) -> dict[str, Exception]:
    """The Lightning run over one stream, then calibration and storing. The requests are missing, and locked."""
    started, settings, n_batches = time.time(), requests[0].stream, requests[0].n_batches
    stream = training_stream(requests[0], cfg)
    data = ActivationData(stream, n_batches, settings["batches_per_chunk"])
    keys = [request.key for request in requests]
    fleet = Fleet([methods[request.key] for request in requests], data, cfg.logging.log_every_steps, keys)
    run_key = content_key({"requests": keys})
    folder = store.root / "training" / content_key(requests[0].stream_spec) / run_key
    checkpoints = Checkpoints(folder, cfg.trainer.checkpoint_every_seconds, keys)
    progress = TokenProgress(
        f"{len(requests)} dictionaries" if len(requests) > 1 else type(fleet.methods[0]).__name__,
        n_batches * settings["batch_size"],
        settings["batches_per_chunk"] * settings["batch_size"],
        cfg.logging.quiet_seconds,
    )
    name = f"{cfg.name}-{run_key}"
    trainer = make_trainer(cfg, Path(cfg.output_dir) / "logs", name, data.n_chunks, [progress, checkpoints])
    checkpoints.fit(trainer, fleet, data)
    calibration = [next(stream) for _ in range(settings["calibration_batches"])]
    for index, request in enumerate(requests):
        if index not in fleet.stopped:
            method = methods[request.key].to(stream.device)
            method.finish(calibration)
            training = {**fleet.last(index), "seconds_together": time.time() - started, "together": len(requests)}
            store.put(KIND, request.spec, partial(save_dictionary, method, training))
    if fleet.stopped and (kept := checkpoints.newest()):
        print(f"the last checkpoint is kept: {kept}", file=sys.stderr)
    return {requests[index].key: error for index, error in fleet.stopped.items()}
