"""A run that is killed and started again ends with the same dictionaries as one that is not: equal bit for bit.

Each attempt is a process of its own. A fork server imports the libraries once, so that starting one costs little.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load

from core import artifacts, fleet
from core import training as core_training
from core.artifacts import Store
from core.fleet import KIND, Request, train_together
from core.interrupts import Interrupted, handled_by, stop_at_once
from core.methods.base import DictionaryMethod
from core.runtime import Runtime
from core.streams.module import StreamData
from experiments.common import request as request_of
from tests.composing import CONF, composed

METHODS = sorted(  # loaded dictionaries are never trained, and crosscoders need two models
    path.stem for path in (CONF / "method").glob("*.yaml") if not path.stem.startswith(("pretrained", "crosscoder"))
)
TRAININGS = {**{name: [name] for name in METHODS}, "pair": ["batchtopk", "relu_l1"], "fleet": METHODS}
SETTINGS = ["method.dict_size=64", "method.dead_after_tokens=256", "method.warmup_steps=8", "method.decay_fraction=0.5"]
STREAM = [
    "stream.n_tokens=2048", "stream.n_ctx=16", "stream.batch_size=64", "stream.buffer_tokens=512",
    "stream.rows_per_forward=8", "stream.batches_per_chunk=2", "stream.calibration_batches=3",
    "trainer.checkpoint_every_seconds=1e-9", "trainer.accelerator=cpu",
]  # fmt: skip

ERROR = 3
# Exit codes: once its handlers are installed, a process ends as run.py does; before, as Python does.
KILLED = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2, 1)}

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.fork_server"])

Kill = Callable[[BaseProcess], None]


class Training:
    """Dictionaries that are trained together, in a store of their own; each attempt is a process."""

    def __init__(self, folder: Path, run: Runtime, requests: Sequence[Request]) -> None:
        self.folder, self.requests, self.log = folder, list(requests), folder / "log"
        self.failures = folder / "failures.json"
        self.run = replace(run, artifacts_dir=str(folder / "store"), output_dir=str(folder))
        self.store = Store(folder / "store")
        folder.mkdir(parents=True, exist_ok=True)

    def attempt(self, crash: str | None = None, kill: Kill | None = None) -> int:
        """Train until the process ends; returns its exit code."""
        process = server.Process(target=_attempt, args=(self.requests, self.run, self.folder, crash))
        process.start()
        if kill is not None:
            kill(process)
        process.join(60)
        assert process.exitcode is not None, f"the process hangs:\n{self.log.read_text()}"
        return process.exitcode

    def finish(self) -> None:
        assert self.attempt() == 0, self.log.read_text()
        assert json.loads(self.failures.read_text()) == {}

    def result(self) -> dict[str, tuple[bytes, dict[str, Any]]]:
        """For every dictionary: the bytes of its weights, and its manifest's record of the training without times."""
        results = {}
        for request in self.requests:
            assert self.store.has(KIND, request.spec)
            folder = self.store.path(KIND, request.spec)
            manifest = json.loads((folder / "manifest.json").read_text())["training"]
            record = {key: value for key, value in manifest.items() if not key.endswith("together")}
            results[request.key] = (folder / "weights.safetensors").read_bytes(), record
        return results

    def is_clean(self) -> bool:
        """Whether no checkpoint and no temporary file or folder remains."""
        remains = [p.name for p in self.store.root.rglob("*") if p.suffix in (".part", ".ckpt")]
        remains += [p.name for p in self.store.root.rglob(".*")]
        return not remains


def _attempt(requests: list[Request], run: Runtime, folder: Path, crash: str | None) -> None:
    with (folder / "log").open("a") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if crash is not None:
        CRASHES[crash]()
    try:
        with handled_by(stop_at_once):
            failed = train_together(requests, run)
        (folder / "failures.json").write_text(json.dumps({key: str(error) for key, error in failed.items()}))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(ERROR)


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, owner: Any, name: str, then: Callable[..., Any] = die) -> None:
    """Die instead of making the `number`-th call of `owner.name` in this process."""
    original, calls = getattr(owner, name), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return (then if len(calls) == number else original)(*arguments, **named)

    setattr(owner, name, counted)


def half_a_checkpoint(checkpoint: dict[str, Any], file: Any) -> None:
    file.write(b"PK" * 1000)
    file.flush()
    die()


def half_a_removal(folder: Path, **_: Any) -> None:
    (folder / core_training.Checkpoints.MEMBERS).unlink()
    die()


CRASHES: dict[str, Callable[[], None]] = {
    "in a checkpoint": lambda: at_call(3, core_training.torch, "save", half_a_checkpoint),
    "between a checkpoint's hash and its name": lambda: at_call(3, core_training, "sync"),
    "between two checkpoints kept": lambda: at_call(2, core_training, "digest_file", die),
    "after the last chunk": lambda: at_call(1, core_training.Checkpoints, "on_train_end"),
    "in the calibration": lambda: at_call(1, DictionaryMethod, "finish"),
    "while storing": lambda: at_call(1, artifacts, "_synced_files"),
    "between two dictionaries": lambda: at_call(2, fleet, "save_dictionary"),
    "before the checkpoints are removed": lambda: at_call(1, fleet, "discard_finished"),
    "while the checkpoints are removed": lambda: at_call(1, core_training.shutil, "rmtree", half_a_removal),
}


@pytest.fixture(scope="module")
def shared(on_tiny_model: list[str]) -> list[str]:
    """Command-line settings of every run: the tiny model, a local text, a short stream."""
    return ["experiment=leask_batchtopk", "scale=smoke", "logging=none", *on_tiny_model, *STREAM]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, shared: list[str]) -> Any:
    """Makes a training of the dictionaries in `TRAININGS[name]`, in a folder called `place`."""
    root = tmp_path_factory.mktemp("kills")

    def cfg(method: str) -> DictConfig:
        few = ["method.k=4", "method.k_aux=16"] if method in ("topk", "batchtopk") else []
        return composed(*shared, f"method={method}", *SETTINGS, *few)

    configurations = {method: cfg(method) for method in METHODS}

    def training(name: str, place: str) -> Training:
        chosen = [configurations[method] for method in TRAININGS[name]]
        return Training(root / place.replace(" ", "_"), Runtime.of(chosen[0]), [request_of(one) for one in chosen])

    return training


@pytest.fixture(scope="module")
def uninterrupted(make: Any) -> Any:
    """By the name of a training: its result without a kill, and the seconds that it takes."""
    make("batchtopk", "warm-up").finish()  # starts the fork server

    @cache
    def result(name: str) -> tuple[dict[str, Any], float]:
        training = make(name, f"uninterrupted-{name}")
        started = time.monotonic()
        training.finish()
        seconds = time.monotonic() - started
        assert training.is_clean()
        return training.result(), seconds

    return result


def test_a_dictionary_is_the_same_alone_and_in_a_fleet_from_its_configuration(uninterrupted: Any):
    together, _ = uninterrupted("pair")
    [(key, alone)] = uninterrupted("batchtopk")[0].items()
    assert together[key] == alone


@pytest.mark.parametrize("crash", CRASHES)
def test_a_fleet_killed_at_an_awkward_moment_ends_with_the_same_bits(make: Any, uninterrupted: Any, crash: str):
    training = make("pair", crash)
    assert training.attempt(crash) == -signal.SIGKILL
    training.finish()
    assert training.result() == uninterrupted("pair")[0]
    assert training.is_clean()


def chunks_trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that receives the number of every chunk on which a fleet in this process trains."""
    seen: list[int] = []
    original = fleet.Fleet.training_step

    def noted(self: fleet.Fleet, chunk: Any, batch_idx: int) -> None:
        seen.append(batch_idx)
        original(self, chunk, batch_idx)

    monkeypatch.setattr(fleet.Fleet, "training_step", noted)
    return seen


def test_what_a_killed_fleet_has_not_stored_is_resumed_from_its_checkpoint(make: Any, uninterrupted: Any, monkeypatch):
    training = make("pair", "parts")
    assert training.attempt("between two dictionaries") == -signal.SIGKILL
    stored = [training.store.has(KIND, request.spec) for request in training.requests]
    assert sorted(stored) == [False, True]
    trained = chunks_trained(monkeypatch)
    assert train_together([training.requests[stored.index(False)]], training.run) == {}
    assert trained == []
    assert training.result() == uninterrupted("pair")[0] and training.is_clean()


def test_one_dictionary_is_resumed_alone_where_its_fleet_was_killed(make: Any, uninterrupted: Any, monkeypatch):
    training = make("pair", "narrowed")
    assert training.attempt("in a checkpoint") == -signal.SIGKILL
    trained = chunks_trained(monkeypatch)
    for request in training.requests:
        assert train_together([request], training.run) == {}
    assert trained == 2 * list(range(2, 16))
    assert training.result() == uninterrupted("pair")[0] and training.is_clean()


def test_a_dictionary_that_had_diverged_before_the_kill_has_still_diverged(make: Any):
    def with_a_wild_one(place: str) -> Training:
        calm = make("batchtopk", place)
        wild = replace(calm.requests[0], method={**calm.requests[0].method, "lr": 1e30, "decoder_norm": "none"})
        return Training(calm.folder, calm.run, [wild, *calm.requests])

    untouched, killed = with_a_wild_one("wild"), with_a_wild_one("wild killed")
    assert untouched.attempt() == 0
    assert killed.attempt("while storing") == -signal.SIGKILL and killed.attempt() == 0
    failures = [json.loads(training.failures.read_text()) for training in (untouched, killed)]
    assert failures[0] == failures[1] and list(failures[0]) == [killed.requests[0].key]
    calm = [Training(training.folder, training.run, training.requests[1:]) for training in (untouched, killed)]
    assert calm[0].result() == calm[1].result()


def test_training_neither_uses_nor_changes_the_global_generator(make: Any, uninterrupted: Any):
    training = make("pair", "random")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train_together(training.requests, training.run)
    assert torch.equal(torch.get_rng_state(), before) and training.result() == uninterrupted("pair")[0]


def test_a_method_resumes_exactly_with_lightnings_trainer_and_without_a_fleet(
    make: Any, uninterrupted: Any, tmp_path: Path
):
    training = make("batchtopk", "plain")
    [request] = training.requests

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 5:
                raise RuntimeError("the power fails")

    def fit(*callbacks: pl.Callback) -> DictionaryMethod:
        method, source = request.build(), request.source
        data = StreamData(source.open(training.run), source.n_batches, source.batches_per_chunk)
        work = core_training.Work("plain", data.n_chunks, 1, "chunks")
        core_training.fit(training.run, method, data, data.n_chunks, "plain", work, tmp_path, callbacks=callbacks)
        method.finish([next(data.stream) for _ in range(source.calibration_batches)])
        return method

    with pytest.raises(RuntimeError, match="power"):
        fit(Stop())
    resumed = fit()
    [(weights, _)] = uninterrupted("batchtopk")[0].values()
    assert resumed.n_updates == request.source.n_batches
    for name, tensor in load(weights).items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_disk_that_is_full_when_a_dictionary_is_stored_keeps_the_checkpoint(
    make: Any, uninterrupted: Any, monkeypatch
):
    training = make("batchtopk", "full")
    torch.set_num_threads(1)

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("core.methods.saved.save_file", full)
        train_together(training.requests, training.run)
    assert list(training.store.root.rglob("*.ckpt")) and not list((training.store.root / KIND).glob(".*"))
    trained = chunks_trained(monkeypatch)
    assert train_together(training.requests, training.run) == {} and trained == []
    assert training.result() == uninterrupted("batchtopk")[0] and training.is_clean()


def kill_and_finish(training: Training, number: signal.Signals, n_kills: int, seconds: float, seed: str) -> list[float]:
    """Kill and start again `n_kills` times, at moments uniform over `seconds`, then finish. Returns the moments. Stops
    early if the training ends before it is killed."""
    rng, moments = random.Random(seed), []
    while len(moments) < n_kills:
        moment = rng.uniform(0, seconds)

        def kill(process: BaseProcess, moment: float = moment) -> None:
            process.join(moment)
            if process.is_alive():
                os.kill(process.pid or 0, number)

        code = training.attempt(kill=kill)
        assert code in (0, *KILLED[number]), f"{code} after {moments}, {moment}:\n{training.log.read_text()}"
        if code == 0:
            return moments
        moments.append(moment)
    training.finish()
    return moments


def check_kills(make: Any, uninterrupted: Any, name: str, number: signal.Signals, n_kills: int) -> None:
    expected, seconds = uninterrupted(name)
    kills, trainings = 0, 0
    while kills < n_kills:
        trainings += 1
        place = f"{name}-{number.name}-{trainings}"
        training = make(name, place)
        moments = kill_and_finish(training, number, n_kills - kills, seconds, place)
        kills += len(moments)
        assert training.result() == expected, f"seed {place}, killed after {moments} s of {seconds:.2f}"
        assert training.is_clean(), place


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_dictionary_whose_training_is_killed_twice_comes_out_the_same(
    make: Any, uninterrupted: Any, number: signal.Signals
):
    check_kills(make, uninterrupted, "batchtopk", number, 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("name", TRAININGS)
def test_dictionaries_killed_at_twenty_random_moments_come_out_the_same(
    make: Any, uninterrupted: Any, name: str, number: signal.Signals
):
    check_kills(make, uninterrupted, name, number, 20)


class CommandLine:
    """`python run.py` in processes of their own, on one folder of artifacts."""

    def __init__(self, shared: list[str], folder: Path) -> None:
        self.fixed = [*shared, "evaluation.compat_tokens=256", f"artifacts_dir={folder / 'artifacts'}"]
        self.folder = folder

    def start(self, log: str, outputs: str, *arguments: str) -> BaseProcess:
        line = ["run.py", *self.fixed, f"output_dir={self.folder / outputs}", *arguments]
        process = server.Process(target=_run, args=(line, self.folder / log))
        process.start()
        return process

    def finish(self, process: BaseProcess, log: str) -> tuple[int | None, str]:
        """Exit code and standard error of a run."""
        process.join(120)
        return process.exitcode, (self.folder / log).read_text()

    def signal_at(self, process: BaseProcess, log: str, line: str, number: signal.Signals) -> tuple[int | None, str]:
        """Send a signal once a line has appeared; returns what `finish` does."""
        while process.is_alive() and not ((self.folder / log).exists() and line in (self.folder / log).read_text()):
            time.sleep(0.01)
        os.kill(process.pid or 0, number)
        return self.finish(process, log)

    def results(self, outputs: str) -> dict[str, dict[str, float]]:
        paths = (self.folder / outputs).rglob("results.json")
        return {path.parent.name: json.loads(path.read_text())["metrics"] for path in paths}


def _run(arguments: list[str], log: Path) -> None:
    import run

    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = arguments
    sys.exit(run.main())


@pytest.fixture
def command_line(shared: list[str], tmp_path: Path) -> CommandLine:
    return CommandLine(shared, tmp_path)


@pytest.mark.slow
def test_a_sweep_stops_on_a_signal_and_the_same_command_finishes_it(command_line: CommandLine, tmp_path: Path):
    code, err = command_line.signal_at(command_line.start("1", "a"), "1", "shuffle buffer", signal.SIGTERM)
    assert code == 143 and "run the same command again" in err and "Traceback" not in err
    assert command_line.results("a") == {}
    code, err = command_line.signal_at(command_line.start("2", "a"), "2", "finished: ", signal.SIGINT)
    assert code == 130 and "run the same command again" in err and "Traceback" not in err
    kept = command_line.results("a")
    assert 1 <= len(kept) < 3
    code, err = command_line.finish(command_line.start("3", "a"), "3")
    assert code == 0 and err.count("already finished, skipped") == len(kept)
    assert len(command_line.results("a")) == 3 and command_line.results("a").items() >= kept.items()
    assert not list(tmp_path.rglob("failed.json"))


@pytest.mark.slow
def test_two_runs_at_once_train_each_dictionary_once_and_agree(command_line: CommandLine, tmp_path: Path):
    first = command_line.start("1", "a", "method=topk,batchtopk")
    second = command_line.start("2", "b", "method=batchtopk,jumprelu_short")
    for process, log in ((first, "1"), (second, "2")):
        code, err = command_line.finish(process, log)
        assert code == 0, err
    a, b = command_line.results("a"), command_line.results("b")
    assert len(a) == len(b) == 2 and len(a.keys() | b.keys()) == 3
    [shared] = a.keys() & b.keys()
    assert a[shared] == b[shared]
    names = [path.name for path in (tmp_path / "artifacts/dictionary").iterdir() if path.is_dir()]
    assert len(names) == 3 and not any("damaged" in name for name in names)
