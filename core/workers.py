"""Tasks in separate processes: fresh interpreters, each with its own devices, threads and process group.

A worker is `python -m core.workers`. It receives tasks on standard input, one after another, and ends when its parent
closes that or dies. Its lines appear on the parent's standard error, after the label of the task. When the parent gets
SIGINT or SIGTERM, it sends SIGTERM to the workers and waits until they have saved their work.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from core.errors import NonFiniteLoss, UserError, lack_of_memory
from core.interrupts import Interrupted, handled_by, note_signal, raise_if_interrupted, stop_at_once

ROOT = Path(__file__).parents[1]
NEEDS_NO_TRACEBACK = (UserError, NonFiniteLoss, FloatingPointError, OSError)
POLL_SECONDS = 0.05
SETTLE_SECONDS = 3.0  # after one task of a group has failed: time for the others to report their errors
GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL
END_OF_TASK = b"\0end of task\0\n"  # what a worker writes after the last line of a task
LENGTH_BYTES = 8  # the length of a pickled task is sent before the task


@dataclass(frozen=True)
class Task:
    """A call of `function` (`module:name`) with picklable `arguments`. `label` is printed before each of its lines."""

    label: str
    function: str
    arguments: tuple[Any, ...]


class WorkerDiedError(RuntimeError):
    """A worker ended without reporting an error."""


@dataclass
class Worker:
    """A process and its current task."""

    environment: dict[str, str]
    folder: Path
    task: Task = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    reader: threading.Thread = field(init=False)
    has_ended_task: threading.Event = field(init=False, default_factory=threading.Event)

    def __post_init__(self) -> None:
        paths = [str(ROOT), *(path for path in sys.path if path)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "core.workers", str(self.outcome_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **self.environment},
            start_new_session=True,  # Ctrl-C in a terminal reaches only the parent, which passes it on once
        )
        self.reader = threading.Thread(target=self._repeat_lines, daemon=True)

    @property
    def outcome_file(self) -> Path:
        return self.folder / f"{id(self)}.pickle"

    def begin(self, task: Task) -> None:
        """Send a task. The previous one must have ended."""
        self.task = task
        self.has_ended_task.clear()
        self.outcome_file.unlink(missing_ok=True)
        if not self.reader.is_alive():
            self.reader.start()
        data = pickle.dumps(task)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; its exit code tells
            self.process.stdin.write(len(data).to_bytes(LENGTH_BYTES) + data)
            self.process.stdin.flush()

    def _repeat_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text, end, _ = line.partition(END_OF_TASK)
            for part in text.decode(errors="replace").replace("\r", "\n").splitlines():
                print(f"[{self.task.label}] {part}", file=sys.stderr, flush=True)
            if end:
                self.has_ended_task.set()

    def is_busy(self) -> bool:
        return not self.has_ended_task.is_set() and self.process.poll() is None

    def outcome(self) -> Any:
        """What the task returned, or the exception that ended it. Call it when the worker is not busy."""
        if self.process.poll() is not None:
            self.close()
        try:
            return pickle.loads(self.outcome_file.read_bytes())
        except (FileNotFoundError, EOFError, pickle.UnpicklingError):
            self.close()
            return WorkerDiedError(f"The worker [{self.task.label}] {_end_of(self.process.returncode)}.")

    def close(self) -> None:
        """Send no more tasks, and wait until the process ends."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.reader.join()


def run_tasks(
    tasks: Sequence[Task],
    slots: Sequence[dict[str, str]],
    all_or_none: bool = False,
    on_end: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """What every task returned, or the exception that ended it.

    slots        the environment variables of one worker each. As many tasks run at once as there are slots; a worker
                 takes one task after another, in order
    all_or_none  the tasks depend on each other: they start together, and when one fails the others are stopped. The
                 error closest to the cause is raised: one that a user can fix, else a dead worker, else any other
    on_end       called in this process with the index and the outcome of each task as soon as it ends

    Raises `Interrupted` after SIGINT or SIGTERM, when the workers have ended.
    """
    if all_or_none and len(slots) < len(tasks):
        raise ValueError(f"{len(tasks)} tasks that depend on each other do not fit into {len(slots)} slots.")
    waiting, free = deque(enumerate(tasks)), deque(slots)
    running: dict[int, Worker] = {}
    outcomes: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder, _workers_end_with(running) as asked_to_stop:
        while running or (waiting and not asked_to_stop):
            while waiting and free and not asked_to_stop:
                _begin_next(waiting, Worker(free.popleft(), Path(folder)), running, asked_to_stop)
            for index, worker in [(i, w) for i, w in running.items() if not w.is_busy()]:
                outcomes[index] = worker.outcome()
                del running[index]
                if on_end is not None and not asked_to_stop:
                    on_end(index, outcomes[index])
                if waiting and not asked_to_stop and worker.process.poll() is None:
                    _begin_next(waiting, worker, running, asked_to_stop)
                else:
                    worker.close()
                    free.append(worker.environment)
            failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
            if all_or_none and failures and not asked_to_stop:
                failures += _failures_of(running)
                raise min(failures, key=_distance_from_cause)
            time.sleep(POLL_SECONDS)
    return [outcomes[index] for index in range(len(tasks))]


def _begin_next(
    waiting: deque[tuple[int, Task]], worker: Worker, running: dict[int, Worker], asked_to_stop: Sequence[int]
) -> None:
    index, task = waiting.popleft()
    running[index] = worker
    worker.begin(task)
    if asked_to_stop:  # the signal came before this worker was in `running`
        worker.process.send_signal(signal.SIGTERM)


@contextmanager
def _workers_end_with(running: dict[int, Worker]) -> Iterator[list[int]]:
    """Yields the signals received so far. Workers get the first SIGINT or SIGTERM as SIGTERM, the second as SIGKILL.
    In this process the signal takes effect at the end of the block."""
    received: list[int] = []

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        note_signal(signum)
        received.append(signum)
        for worker in list(running.values()):
            worker.process.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    with handled_by(pass_on):
        try:
            yield received
        finally:
            _end(running)
    if received:
        raise Interrupted(received[0])


def _end(running: dict[int, Worker]) -> None:
    """Send SIGTERM to the running workers, and after a while SIGKILL; wait until all have ended."""
    for worker in running.values():
        worker.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in running.values():
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def _failures_of(running: dict[int, Worker]) -> list[Exception]:
    """The errors that the other workers of a group report within `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while running and time.monotonic() < deadline and any(w.is_busy() for w in running.values()):
        time.sleep(POLL_SECONDS)
    ended = [worker.outcome() for worker in running.values() if not worker.is_busy()]
    return [outcome for outcome in ended if isinstance(outcome, Exception)]


def _distance_from_cause(error: Exception) -> int:
    if isinstance(error, NEEDS_NO_TRACEBACK):
        return 0
    return 1 if isinstance(error, WorkerDiedError) else 2


def _end_of(code: int) -> str:
    if code == -signal.SIGKILL:
        hint = "perhaps it ran out of memory; lower trainer.processes or trainer.cell_processes"
        return f"was killed (SIGKILL): {hint}"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}; see its output above"


# ---- in the worker


def main() -> int:
    """Run the tasks from standard input. The outcome of each is written to the file given as the only argument."""
    tasks: SimpleQueue[bytes | None] = SimpleQueue()
    busy = threading.Event()
    try:
        with handled_by(stop_at_once):
            threading.Thread(target=_receive, args=(tasks, busy), daemon=True).start()
            while (data := tasks.get()) is not None:
                _write(pickle.dumps(_outcome(pickle.loads(data))), Path(sys.argv[1]))
                busy.clear()
                os.write(1, END_OF_TASK)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    return 0


def _receive(tasks: SimpleQueue[bytes | None], busy: threading.Event) -> None:
    """Queue the parent's tasks until the pipe closes. If it closes during a task, the parent has died."""
    while length := _read(LENGTH_BYTES):
        data = _read(int.from_bytes(length))
        busy.set()
        tasks.put(data)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
    tasks.put(None)


def _read(n_bytes: int) -> bytes:
    """Read `n_bytes` from standard input, or fewer at its end. `sys.stdin` would hold a lock when the process exits."""
    parts = bytearray()
    while len(parts) < n_bytes and (part := os.read(0, n_bytes - len(parts))):
        parts += part
    return bytes(parts)


def _write(content: bytes, file: Path) -> None:
    file.with_suffix(".part").write_bytes(content)
    file.with_suffix(".part").replace(file)


def _outcome(task: Task) -> Any:
    module, name = task.function.split(":")
    try:
        return getattr(import_module(module), name)(*task.arguments)
    except Exception as error:
        raise_if_interrupted(error)
        error = lack_of_memory(error) or error
        if not isinstance(error, NEEDS_NO_TRACEBACK):
            traceback.print_exc()
        return portable(error)


def portable(error: Exception) -> Exception:
    """The exception itself if it can be pickled, else a RuntimeError with its type, its message and why pickling
    failed."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as reason:
        text = f"{type(error).__name__}: {error}"
        return RuntimeError(f"{text} (sent as text, since pickling it failed: {type(reason).__name__}: {reason})")
    return error


if __name__ == "__main__":
    sys.exit(main())
