"""SIGINT and SIGTERM as an exception that ends a run: at once, or when the work at hand can be left."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The run was told to stop. No `Exception`: a sweep goes on after a cell that fails, and not after this."""

    def __init__(self, signum: int) -> None:
        self.signum = signal.Signals(signum)
        super().__init__(
            f"stopped by {self.signum.name}: finished cells, dictionaries and checkpoints are kept; "
            "the same command goes on from there"
        )

    @property
    def exit_code(self) -> int:
        """What a shell expects: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


def raise_if_interrupted(error: BaseException) -> None:
    """Raise the Interrupted that an error came from: cleaning up after one, a library can fail in its turn, and what is
    heard is the second error alone."""
    seen: list[BaseException | None] = [error]
    for one in seen:
        if isinstance(one, Interrupted):
            raise one
        if one is not None:
            seen += [other for other in (one.__cause__, one.__context__) if other not in seen]


def stop_at_once(signum: int, frame: FrameType | None) -> None:
    """The handler for work that leaves nothing half-written wherever it stops."""
    raise Interrupted(signum)


class Deferred:
    """The handler for work that ends well only at certain points: notes the first signal in `signum`, and says so.
    The next one stops at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: stopping after the current chunk, with a checkpoint; again: at once\n".encode())


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` within, and an error that comes of an Interrupted leaves as that one. A signal
    that is ignored (`nohup`, `&`) stays so; outside the main thread, which alone can set handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, previous in before.items():
            if previous is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    except Exception as error:
        raise_if_interrupted(error)
        raise
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextmanager
def held_back() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block: for short work that does not bear an exception just anywhere,
    as `shutil.rmtree`, which closes a file twice."""
    held: list[int] = []
    try:
        with handled_by(lambda signum, _: held.append(signum)):
            yield
    finally:
        if held:
            signal.raise_signal(held[0])


def remove_folder(folder: Path) -> None:
    """Remove a folder and what is in it, as far as that can be done, however often the process is told to stop."""
    with held_back():
        shutil.rmtree(folder, ignore_errors=True)
