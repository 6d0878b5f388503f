"""Dictionaries on demand: ask for one with `load_or_train`, or for many at once with `prefetch`.

A `Request` says everything that decides a dictionary: the method's settings and the stream of activations. Requests on
the same stream are trained together, in one Lightning run on one pass of the language model; each dictionary comes out
as it would have alone, since the batches are the same and nothing else is shared. Finished ones lie in the artifact
store under the key of their request.

More devices serve in two ways. `trainer.processes` splits a group over processes, each with a language model and some
of the dictionaries, which come out the same. `trainer.devices` splits every batch (`core.distributed`), for a
dictionary that takes too long on one device; its batches, and so its numbers, depend on how many there are.

Locks are taken by the process that trains, in the order of their keys, before it waits for anything else; the parent of
such workers holds none. So a chain of waiting processes ends at one that waits for no lock, and runs at the same time
cannot block each other. Of ranks the parent holds the locks, and the ranks ask for none.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from core import distributed
from core.artifacts import Store, content_key
from core.errors import UserError
from core.interrupts import raise_if_interrupted
from core.methods.base import DictionaryMethod
from core.methods.saved import load_dictionary, save_dictionary
from core.methods.together import Fleet
from core.models.identity import model_identity
from core.models.language_model import load_language_model
from core.models.loading import chosen_device
from core.seeding import derived_seed
from core.shares import gpus, number_of_processes, slots, split
from core.streams.activations import ActivationStream, Stream
from core.streams.cache import CachedStream, Shards, fill_spec
from core.streams.module import ActivationData
from core.text.rows import RowStream
from core.training import Checkpoints, TokenProgress, discard_finished, make_trainer, members_of
from core.workers import Task, portable, run_tasks

KIND = "dictionary"
_failed_here: dict[tuple[str, str], Exception] = {}  # by store and key: what this process need not try again


@dataclass(frozen=True, eq=False)
class Request:
    """One dictionary: plain, resolved configurations of the method, the stream, the language model and the text. `seed`
    is that of the stream: which text it draws, and how it shuffles."""

    method: dict[str, Any]
    stream: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    precision: str
    seed: int
    devices: int = 1  # that share every batch

    @cached_property
    def stream_spec(self) -> dict[str, Any]:
        """What decides the batches: requests with equal ones train together."""
        return {
            "stream": self.stream,
            "model": model_identity(DictConfig(self.model)),
            "data": instantiate(self.data).spec,
            "precision": self.precision,
            "seed": self.seed,
            **({"devices": self.devices} if self.devices > 1 else {}),
        }

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What decides the dictionary."""
        return {"method": self.method, **self.stream_spec}

    @cached_property
    def key(self) -> str:
        return content_key(self.spec)

    @property
    def cost(self) -> float:
        """Of a step, against other requests': B d m."""
        return float(self.stream["batch_size"] * self.method["d_model"] * self.method["dict_size"])

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
        failed = _train_shares(_shares(group, store, cfg), cfg)
        for message in sorted({str(error) for error in failed.values()}):
            print(f"not trained together: {message}", file=sys.stderr)


def _n_processes(request: Request, cfg: DictConfig) -> int:
    """That train a group at a time; ranks that share a training count as one."""
    return number_of_processes(cfg.trainer.processes, cfg.trainer.accelerator) if request.devices == 1 else 1


def _shares(group: Mapping[str, Request], store: Store, cfg: DictConfig) -> list[list[Request]]:
    """The group in shares that train apart from each other: one for every process, along checkpoints that are there."""
    any_request = next(iter(group.values()))
    n = _n_processes(any_request, cfg)
    if n > len(group) and cfg.trainer.processes != "auto":
        print(f"trainer.processes={n}: {len(group)} serve, one for each dictionary", file=sys.stderr)
    training = _checkpoint_folder(any_request, store)
    begun = [members_of(path.parent) for path in sorted(training.glob(f"[!.]*/{Checkpoints.MEMBERS}"))]
    costs = {key: request.cost for key, request in group.items()}
    shares = [[group[key] for key in share] for share in split(costs, n, begun)]
    if len(shares) > n:
        print(f"{len(shares)} trainings were begun apart and go on apart, {n} at a time", file=sys.stderr)
    return shares


def _train_shares(shares: Sequence[Sequence[Request]], cfg: DictConfig) -> dict[str, Exception]:
    """Train each share, here or in processes as many as `trainer.processes` says. Returns what stopped any, by key.

    Raises OSError, after the others have ended: on a full disk every cell would train in vain.
    """
    n = min(_n_processes(shares[0][0], cfg), len(shares))
    if n == 1:
        outcomes = [_attempt(share, cfg) for share in shares]
    else:
        plain = OmegaConf.to_container(cfg, resolve=True)
        tasks = [Task(str(i), "core.fleet:train_share", (share, plain)) for i, share in enumerate(shares)]
        outcomes = run_tasks(tasks, slots(n, cfg.trainer.accelerator))
    failed: dict[str, Exception] = {}
    for share, outcome in zip(shares, outcomes, strict=True):
        if isinstance(outcome, OSError):
            raise outcome
        if isinstance(outcome, Exception):
            failed |= dict.fromkeys((request.key for request in share), outcome)
        else:
            failed |= outcome
            _failed_here.update({(cfg.artifacts_dir, key): error for key, error in outcome.items()})
    return failed


def _attempt(share: Sequence[Request], cfg: DictConfig) -> dict[str, Exception] | Exception:
    try:
        return train_together(share, cfg)
    except (UserError, FloatingPointError) as error:
        return error


def train_share(share: Sequence[Request], plain: dict[str, Any]) -> dict[str, Exception]:
    """`train_together` as the task of a worker."""
    return {key: portable(error) for key, error in train_together(share, DictConfig(plain)).items()}


def train_together(requests: Sequence[Request], cfg: DictConfig) -> dict[str, Exception]:
    """Train requests that share a stream and store each dictionary. Returns what stopped any of them, by key."""
    store = Store(cfg.artifacts_dir)
    ordered = sorted(requests, key=lambda request: request.key)
    with ExitStack() as locks:
        for request in ordered:  # in one order everywhere: two fleets cannot wait for each other
            locks.enter_context(store.lock(KIND, request.spec))
        missing = [request for request in ordered if not store.has(KIND, request.spec)]
        methods, failed = _build(missing)
        sound = [request for request in missing if request.key in methods]
        if sound and sound[0].devices > 1:
            failed |= _train_on_devices(sound, cfg)
        elif sound:
            failed |= _train(sound, methods, store, cfg)
        _discard_checkpoints(store)
    _failed_here.update({(cfg.artifacts_dir, key): error for key, error in failed.items()})
    return failed


def _train_on_devices(requests: Sequence[Request], cfg: DictConfig) -> dict[str, Exception]:
    """Train requests that are missing, and locked, in as many processes as each asks for. Raises what stopped these."""
    n, accelerator, s = requests[0].devices, cfg.trainer.accelerator, requests[0].stream
    n_gpus = len(gpus(accelerator))
    if n_gpus and n > n_gpus:
        raise UserError(f"trainer.devices={n}: there are {n_gpus} GPUs here.")
    if cfg.trainer.processes not in ("auto", 1):
        raise UserError(
            f"trainer.processes={cfg.trainer.processes} splits dictionaries over processes, trainer.devices={n} splits "
            "each of them: one of the two must be 1."
        )
    if cfg.get("cache") is not None and cfg.cache.dir is not None:
        raise UserError(f"cache.dir: the cache holds streams for one device, not for trainer.devices={n}; cache=none.")
    distributed.share("stream.batch_size", s["batch_size"], n)
    if s["buffer_tokens"] % (n * s["n_ctx"]):
        raise UserError(
            f"stream.buffer_tokens ({s['buffer_tokens']:,}) must be a multiple of stream.n_ctx ({s['n_ctx']}) times "
            f"trainer.devices ({n}): each has whole rows."
        )
    plain = OmegaConf.to_container(cfg, resolve=True)
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            Task(f"rank {rank}", "core.fleet:train_rank", (rank, f"{folder}/ranks", n_gpus > 0, requests, plain))
            for rank in range(n)
        ]
        # Lightning reads these; every rank sees one device, as if it were a node of its own.
        places = [{"RANK": str(rank), "NODE_RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(n)]
        environments = [{**slot, **place} for slot, place in zip(slots(n, accelerator), places, strict=True)]
        return run_tasks(tasks, environments, all_or_none=True)[0]


def train_rank(
    rank: int, meeting_point: str, on_gpu: bool, requests: Sequence[Request], plain: dict[str, Any]
) -> dict[str, Exception]:
    """The part of one rank in `_train_on_devices`, as the task of a worker."""
    cfg = DictConfig(plain)
    with distributed.group(rank, requests[0].devices, Path(meeting_point), on_gpu):
        methods, failed = _build(requests)
        failed |= _train(requests, methods, Store(cfg.artifacts_dir), cfg)
    return {key: portable(error) for key, error in failed.items()}


def open_stream(request: Request, rank: int | None = None) -> ActivationStream:
    """The stream of training activations that a request asks for; with several devices, the part of one rank, which is
    this process's own, if None. Of every W blocks of `rows_per_forward` rows each rank takes one."""
    s, seed, n = request.stream, request.seed, request.devices
    rank = distributed.rank() if rank is None else rank
    if n > 1:
        s = {**s, **{name: distributed.share(f"stream.{name}", s[name], n) for name in ("batch_size", "buffer_tokens")}}
        seed = derived_seed(seed, "rank", rank)
    lm = load_language_model(DictConfig(request.model))
    rows = RowStream(
        instantiate(request.data),
        lm.tokenizer,
        "train",
        request.seed,
        s["n_ctx"],
        s["packing"],
        s["max_document_tokens"],
        rank,
        n,
    )
    return ActivationStream(
        lm,
        s["site"],
        rows,
        s["batch_size"],
        s["buffer_tokens"],
        s["rows_per_forward"],
        seed,
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


def _checkpoint_folder(request: Request, store: Store) -> Path:
    """Where the checkpoints of all trainings on the request's stream lie."""
    return store.root / "training" / content_key(request.stream_spec)


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
            raise_if_interrupted(error)
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
    checkpoints = Checkpoints(
        _checkpoint_folder(requests[0], store) / run_key, cfg.trainer.checkpoint_every_seconds, keys
    )
    progress = TokenProgress(
        f"{len(requests)} dictionaries" if len(requests) > 1 else type(fleet.methods[0]).__name__,
        n_batches * settings["batch_size"],
        settings["batches_per_chunk"] * settings["batch_size"],
        cfg.logging.quiet_seconds,
    )
    callbacks: list[Callback] = [progress, checkpoints] if distributed.rank() == 0 else [checkpoints]
    name = f"{cfg.name}-{run_key}"
    trainer = make_trainer(cfg, Path(cfg.output_dir) / "logs", name, data.n_chunks, callbacks)
    checkpoints.fit(trainer, fleet, data)
    calibration = [next(stream) for _ in range(settings["calibration_batches"])]
    for index, request in enumerate(requests):
        if index not in fleet.stopped:
            method = methods[request.key].to(stream.device)
            method.finish(calibration)
            seconds = checkpoints.earlier_seconds + time.time() - started
            training = {**fleet.last(index), "seconds_together": seconds, "together": len(requests)}
            distributed.check_equal(method.state_dict().values())
            if distributed.rank() == 0:
                store.put(KIND, request.spec, partial(save_dictionary, method, training))
    if distributed.rank() == 0 and fleet.stopped and (kept := checkpoints.newest()):
        print(f"the last checkpoint is kept: {kept}", file=sys.stderr)
    return {requests[index].key: error for index, error in fleet.stopped.items()}
