"""Dictionaries on demand: ask for one with `load_or_train`, for several with `load_or_train_all`, or `prefetch` them.

A `Request` holds everything that decides a dictionary: the method's settings and the source of its batches. Requests
for the same source are trained together, in one Lightning run on one stream (for activations: on one pass of the
language model). Each dictionary comes out as if trained alone: the batches are the same, and nothing else is shared.
Finished dictionaries lie in the artifact store under the key of their request.

There are two ways to use more devices. `trainer.processes` divides the dictionaries of a group among processes, each
with its own stream; the dictionaries are the same. `trainer.devices` divides every batch (`core.distributed`), for a
dictionary that takes too long on one device; its batches, and so its numbers, depend on the number of devices.

The process that trains takes the locks, in the order of their keys, before it waits for anything else; the parent of
worker processes holds none. So every chain of waiting processes ends at one that waits for no lock, and simultaneous
runs cannot block each other. When ranks train, their parent holds the locks and the ranks take none.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from core import distributed
from core.artifacts import Store, content_key
from core.building import build
from core.counts import count
from core.digest import digest
from core.errors import UserError
from core.inputs import note_version
from core.interrupts import raise_if_interrupted
from core.methods.base import DictionaryMethod
from core.methods.dictionary import Dictionary
from core.methods.saved import MANIFEST, load_dictionary, save_dictionary
from core.methods.settings import Settings, method_class, settings_of
from core.notices import say_once
from core.reading import read_object
from core.runtime import Runtime
from core.shares import gpus, number_of_processes, slots, split
from core.streams.module import StreamData
from core.streams.source import Source
from core.together import Fleet
from core.training import Checkpoints, Work, discard_finished, fit, members_of
from core.workers import Task, portable, run_tasks

KIND = "dictionary"
_known_failures: dict[tuple[str, str], Exception] = {}  # by store and key; not tried again by this process


@dataclass(frozen=True, eq=False)
class Start:
    """A dictionary whose parameters a training starts from. The parameters named in `fixed` are not trained."""

    dictionary: DictionaryMethod
    fixed: tuple[str, ...] = ()

    @cached_property
    def spec(self) -> dict[str, Any]:
        return {"parameters": digest(*self.dictionary.parameters()), "fixed": list(self.fixed)}

    def apply(self, method: DictionaryMethod) -> None:
        """Copy the parameters into a new dictionary of the same shape."""
        initial = {name: parameter.detach().cpu() for name, parameter in self.dictionary.named_parameters()}
        method.load_state_dict(method.state_dict() | initial)
        method.has_start = True
        for name in self.fixed:
            method.get_parameter(name).requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Request:
    """One dictionary: the plain, resolved configuration of its method, and the source of its batches.

    precision  of the training: `32-true` or `bf16-mixed`
    start      parameters to start from, if not the method's own
    ready      called before a training; raises UserError if its dictionary would be of no use
    """

    method: dict[str, Any]
    source: Source
    precision: str = "32-true"
    start: Start | None = None
    ready: Callable[[], None] | None = None

    @cached_property
    def group_spec(self) -> dict[str, Any]:
        """What decides the batches, and the precision: requests with equal group specs are trained together."""
        return {"source": self.source.spec, "precision": self.precision}

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What decides the dictionary."""
        name = self.method["_target_"]
        method = {"class": name, "version": method_class(name).version, **self.settings.plain()}
        start = {} if self.start is None else {"start": self.start.spec}
        return {"method": method, **start, **self.group_spec}

    @cached_property
    def settings(self) -> Settings:
        """The method's settings, checked. Raises UserError for invalid values."""
        return settings_of(self.method)

    @cached_property
    def key(self) -> str:
        return content_key(self.spec)

    @property
    def cost(self) -> float:
        """Cost of one step, relative to other requests."""
        return float(self.source.batch_size * self.settings.cost_per_row)

    def build(self) -> DictionaryMethod:
        """The dictionary before training. Raises UserError for settings that do not fit together."""
        method: DictionaryMethod = build(self.method)
        if self.source.row_width not in (None, method.d_model):
            raise UserError(
                f"method.d_model is {method.d_model}, but the rows of {self.source.node} have {self.source.row_width} "
                f"numbers. Set method.d_model={self.source.row_width}."
            )
        method.n_steps = self.source.n_batches
        if self.start is not None:
            self.start.apply(method)
        return method


def load_or_train(request: Request, run: Runtime) -> Dictionary:
    """The stored dictionary, trained first if it is missing. Raises the error that stopped its training."""
    return load_or_train_all([request], run)[0]


def load_or_train_all(requests: Sequence[Request], run: Runtime) -> list[Dictionary]:
    """The stored dictionaries, in evaluation mode. Missing ones are trained first, those of one source together.

    Raises the first error that stopped a training.
    """
    store = Store(run.artifacts_dir)
    for group in _missing(requests, store).values():
        for request in group.values():
            if request.ready is not None:
                request.ready()
        places = [(run.artifacts_dir, key) for key in group]
        failures = [_known_failures[place] for place in places if place in _known_failures]
        for error in failures or train_together(list(group.values()), run).values():
            raise error
    for request in requests:
        note_version(method_class(request.method["_target_"]))
        note_version(type(request.source))
        _count_read(store.path(KIND, request.spec))
        request.source.note()
    return [load_dictionary(store.path(KIND, request.spec)) for request in requests]


def _count_read(folder: Path) -> None:
    """Count for the running cell what the training of a stored dictionary read; older ones do not say."""
    training = read_object(folder / MANIFEST).get("training") or {}
    count(training.get("read") or {})


def prefetch(requests: Iterable[Request], run: Runtime) -> None:
    """Train the missing dictionaries, source by source. Failures are printed; the cells try those again."""
    store = Store(run.artifacts_dir)
    _discard_checkpoints(store)
    missing = _missing(filter(_is_sound, requests), store).values()
    ready = ({key: request for key, request in group.items() if _is_ready(request)} for group in missing)
    groups = [group for group in ready if group]
    for number, group in enumerate(groups, 1):
        print(f"stream {number} of {len(groups)}: {len(group)} dictionaries to train", file=sys.stderr)
        failures = _train_shares(_shares(group, store, run), run)
        for message in sorted({str(error) for error in failures.values()}):
            print(f"not trained together: {message}", file=sys.stderr)


def prefetch_rounds(rounds: Sequence[Iterator[Iterable[Request]]], run: Runtime) -> None:
    """`prefetch` for many cells whose later requests depend on earlier dictionaries: first the first requests of all
    cells, then the second, and so on. If a cell's next requests cannot be built, the error is printed and the cell
    drops out; it will raise the same error when it runs."""
    remaining = list(rounds)
    while remaining:
        requests: list[Request] = []
        continuing = []
        for cell in remaining:
            try:
                requests += next(cell)
            except StopIteration:
                continue
            except (UserError, FloatingPointError, RuntimeError) as error:
                print(f"not trained together: {error}", file=sys.stderr)
                continue
            continuing.append(cell)
        prefetch(requests, run)
        remaining = continuing


def _is_sound(request: Request) -> bool:
    """Whether the method's settings fit together; prints the reason if they do not."""
    try:
        return bool(request.settings)
    except UserError as error:
        print(f"not trained together: {error}", file=sys.stderr)
        return False


def _is_ready(request: Request) -> bool:
    """Whether the dictionary would be of use; says the reason if it would not."""
    try:
        if request.ready is not None:
            request.ready()
        return True
    except UserError as error:
        say_once(f"not trained together: {error}")
        return False


def _missing(requests: Iterable[Request], store: Store) -> dict[str, dict[str, Request]]:
    """The requests without a stored dictionary, by group and key."""
    groups: dict[str, dict[str, Request]] = defaultdict(dict)
    for request in requests:
        if not store.has(KIND, request.spec):
            groups[content_key(request.group_spec)][request.key] = request
    return groups


def _n_processes(request: Request, run: Runtime) -> int:
    """Number of processes that train a group at the same time; ranks that share a training count as one."""
    return number_of_processes(run.processes, run.accelerator) if request.source.devices == 1 else 1


def _shares(group: Mapping[str, Request], store: Store, run: Runtime) -> list[list[Request]]:
    """The group in shares, one for each process. Dictionaries of different checkpoints are never in one share."""
    any_request = next(iter(group.values()))
    n = _n_processes(any_request, run)
    if n > len(group) and run.processes != "auto":
        print(f"trainer.processes={n}: only {len(group)} are used, one for each dictionary", file=sys.stderr)
    training = _checkpoint_folder(any_request, store)
    begun = [members_of(path.parent) for path in sorted(training.glob(f"[!.]*/{Checkpoints.MEMBERS}"))]
    costs = {key: request.cost for key, request in group.items()}
    shares = [[group[key] for key in share] for share in split(costs, n, begun)]
    if len(shares) > n:
        print(f"{len(shares)} trainings started separately and continue separately, {n} at a time", file=sys.stderr)
    return shares


def _train_shares(shares: Sequence[Sequence[Request]], run: Runtime) -> dict[str, Exception]:
    """Train each share, here or in up to `trainer.processes` processes. Returns the errors of failed trainings, by key.

    Raises OSError when all shares have ended: on a full disk every cell would train in vain.
    """
    n = min(_n_processes(shares[0][0], run), len(shares))
    if n == 1:
        outcomes = [_attempt(share, run) for share in shares]
    else:
        tasks = [Task(str(i), "core.fleet:train_share", (share, run)) for i, share in enumerate(shares)]
        outcomes = run_tasks(tasks, slots(n, run.accelerator))
    failures: dict[str, Exception] = {}
    for share, outcome in zip(shares, outcomes, strict=True):
        if isinstance(outcome, OSError):
            raise outcome
        if isinstance(outcome, Exception):
            failures |= dict.fromkeys((request.key for request in share), outcome)
        else:
            failures |= outcome
            _known_failures.update({(run.artifacts_dir, key): error for key, error in outcome.items()})
    return failures


def _attempt(share: Sequence[Request], run: Runtime) -> dict[str, Exception] | Exception:
    try:
        return train_together(share, run)
    except (UserError, FloatingPointError) as error:
        return error


def train_share(share: Sequence[Request], run: Runtime) -> dict[str, Exception]:
    """`train_together`, as a worker's task."""
    return {key: portable(error) for key, error in train_together(share, run).items()}


def train_together(requests: Sequence[Request], run: Runtime) -> dict[str, Exception]:
    """Train requests with equal sources and store the dictionaries. Returns the errors of failed trainings, by key."""
    store = Store(run.artifacts_dir)
    ordered = sorted(requests, key=lambda request: request.key)
    with ExitStack() as locks:
        for request in ordered:  # the same order everywhere: two fleets cannot wait for each other
            locks.enter_context(store.lock(KIND, request.spec))
        missing = [request for request in ordered if not store.has(KIND, request.spec)]
        methods, failures = _build(missing)
        sound = [request for request in missing if request.key in methods]
        if sound and sound[0].source.devices > 1:
            failures |= _train_on_devices(sound, run)
        elif sound:
            failures |= _train(sound, methods, store, run)
        _discard_checkpoints(store)
    _known_failures.update({(run.artifacts_dir, key): error for key, error in failures.items()})
    return failures


def _train_on_devices(requests: Sequence[Request], run: Runtime) -> dict[str, Exception]:
    """Train missing, locked requests with one process for each device. Raises the error that stopped a process."""
    n, accelerator = requests[0].source.devices, run.accelerator
    n_gpus = len(gpus(accelerator))
    if n_gpus and n > n_gpus:
        raise UserError(f"trainer.devices={n}: there are {n_gpus} GPUs here.")
    if run.processes not in ("auto", 1):
        raise UserError(
            f"trainer.processes={run.processes} divides dictionaries among processes, trainer.devices={n} "
            "divides every batch among devices: one of the two must be 1."
        )
    if run.cache is not None:
        raise UserError(f"cache.dir: the cache serves one device, not trainer.devices={n}. Add cache=none.")
    requests[0].source.check_devices()
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            Task(f"rank {rank}", "core.fleet:train_rank", (rank, f"{folder}/ranks", n_gpus > 0, requests, run))
            for rank in range(n)
        ]
        # Lightning reads these; every rank sees one device, as if it were a node of its own.
        places = [{"RANK": str(rank), "NODE_RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(n)]
        environments = [{**slot, **place} for slot, place in zip(slots(n, accelerator), places, strict=True)]
        return run_tasks(tasks, environments, all_or_none=True)[0]


def train_rank(
    rank: int, meeting_point: str, on_gpu: bool, requests: Sequence[Request], run: Runtime
) -> dict[str, Exception]:
    """One rank's part of `_train_on_devices`, as a worker's task."""
    with distributed.group(rank, requests[0].source.devices, Path(meeting_point), on_gpu):
        methods, failures = _build(requests)
        failures |= _train(requests, methods, Store(run.artifacts_dir), run)
    return {key: portable(error) for key, error in failures.items()}


def _checkpoint_folder(request: Request, store: Store) -> Path:
    """The folder with the checkpoints of all trainings on the request's source."""
    return store.root / "training" / content_key(request.group_spec)


def _discard_checkpoints(store: Store) -> None:
    """Remove the checkpoints of trainings whose dictionaries are all stored, finish interrupted removals, and remove
    what killed processes left unfinished."""
    store.remove_leftovers()
    discard_finished(store.root / "training", lambda key: (store.root / KIND / key).is_dir())


def _build(requests: Sequence[Request]) -> tuple[dict[str, DictionaryMethod], dict[str, Exception]]:
    """The methods that can be built, and the errors of the others, by key."""
    methods: dict[str, DictionaryMethod] = {}
    failures: dict[str, Exception] = {}
    for request in requests:
        try:
            methods[request.key] = request.build()
        except Exception as error:
            raise_if_interrupted(error)
            failures[request.key] = error
    return methods, failures


def _train(
    requests: Sequence[Request], methods: dict[str, DictionaryMethod], store: Store, run: Runtime
) -> dict[str, Exception]:
    """The Lightning run over one stream, then calibration and storing. The requests are missing and locked."""
    started, source = time.monotonic(), requests[0].source
    run = replace(run, precision=requests[0].precision)
    stream = source.open(run)
    data = StreamData(stream, source.n_batches, source.batches_per_chunk)
    keys = [request.key for request in requests]
    fleet = Fleet([methods[request.key] for request in requests], data, run.log_every_steps, keys)
    run_key = content_key({"requests": keys})
    folder = _checkpoint_folder(requests[0], store) / run_key
    title = f"{len(requests)} dictionaries" if len(requests) > 1 else type(fleet.methods[0]).__name__
    sizes = (source.n_batches * source.batch_size, source.batches_per_chunk * source.batch_size)
    work = Work(title, *sizes, source.unit)
    name, commits = f"{run.name}-{run_key}", source.commits
    earlier_seconds = fit(run, fleet, data, data.n_chunks, name, work, folder, keys, commits=commits)
    calibration = [next(stream) for _ in range(source.calibration_batches)]
    read = source.report(stream)
    for index, request in enumerate(requests):
        if index not in fleet.stopped:
            method = methods[request.key].to(stream.device)
            method.finish(calibration)
            seconds = earlier_seconds + time.monotonic() - started
            times: dict[str, Any] = {"seconds_together": seconds, "together": len(requests)}
            training = {**fleet.last(index), **times, "read": read, **({"commits": commits} if commits else {})}
            distributed.check_equal(method.state_dict().values())
            if distributed.rank() == 0:
                store.put(KIND, request.spec, partial(save_dictionary, method, training))
    if distributed.rank() == 0 and fleet.stopped and (kept := Checkpoints(folder, 0, keys).newest()):
        print(f"the last checkpoint is kept: {kept}", file=sys.stderr)
    return {requests[index].key: error for index, error in fleet.stopped.items()}
