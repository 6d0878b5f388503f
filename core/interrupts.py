"""SIGINT and SIGTERM as an exception that ends a run, at once or at the next safe point."""

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
    """A signal asked the run to stop. Not an `Exception`: a sweep continues after a failed cell, but not after this."""

    def __init__(self, signum: int) -> None:
        self.signum = signal.Signals(signum)
        super().__init__(
            f"stopped by {self.signum.name}: finished cells, dictionaries and checkpoints are kept; "
            "run the same command again to continue"
        )

    @property
    def exit_code(self) -> int:
        """As shells expect: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


def raise_if_interrupted(error: BaseException) -> None:
    """Raise the Interrupted that caused an error, if there is one.

    A library can fail while it cleans up after an Interrupted; then only that second error arrives here.
    """
    chain: list[BaseException | None] = [error]
    for link in chain:
        if isinstance(link, Interrupted):
            raise link
        if link is not None:
            chain += [other for other in (link.__cause__, link.__context__) if other not in chain]


def stop_at_once(signum: int, frame: FrameType | None) -> None:
    """The handler for work that can stop anywhere without leaving anything half-written."""
    raise Interrupted(signum)


class Deferred:
    """The handler for work that can stop only at certain points. It prints the first signal and keeps it in `signum`;
    the second one stops the run at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: stopping after the current chunk, with a checkpoint; repeat to stop at once\n".encode())


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside the block, `handler` receives SIGINT and SIGTERM, and an error caused by an Interrupted is replaced by it.

    A signal that was ignored (`nohup`, `&`) stays ignored. Outside the main thread nothing changes, since only that
    thread can set handlers.
    """
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
    """Delay SIGINT and SIGTERM until the block ends. For short work that an exception would break at some points, such
    as `shutil.rmtree`, which would close a file twice."""
    held: list[int] = []
    try:
        with handled_by(lambda signum, _: held.append(signum)):
            yield
    finally:
        if held:
            signal.raise_signal(held[0])


def remove_folder(folder: Path) -> None:
    """Remove a folder and its contents as far as possible, even if signals arrive meanwhile."""
    with held_back():
        shutil.rmtree(folder, ignore_errors=True)
