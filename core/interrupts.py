"""SIGINT and SIGTERM as an exception that ends a run, at once or at the next safe point.

A handler notes the signal before it does anything else. The exception that it raises can get lost: Python drops what is
raised in a finaliser, and a library may catch everything, or clear the error and raise its own. So from the first
signal on, a timer looks ten times a second whether the run is still ending, and raises again if it is not. And whatever
ends the outermost `handled_by`, an error of another kind or nothing at all, leaves it as `Interrupted`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TYPE_CHECKING = False  # `typing` takes as long to import as all the rest here, and the handlers should stand soon
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_SECONDS = 0.1  # between two looks of the timer

Handler = Callable[[int, FrameType | None], None]


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


class _State:
    """What this process has received. Only the main thread changes it, as only that thread runs handlers."""

    received: int | None = None  # the first signal since the outermost `handled_by` began
    depth = 0  # of nested `handled_by`


def received() -> int | None:
    """The signal that asked this run to stop, if one has come."""
    return _State.received


def note_signal(signum: int) -> None:
    """Note that a signal has come. Every handler does this first."""
    if _State.received is None and _State.depth:
        _State.received = signum


def raise_if_interrupted(error: BaseException) -> None:
    """Raise Interrupted if a signal caused an error, or has come before it.

    A library can fail while it cleans up after an Interrupted; then only that second error arrives here.
    """
    if stop := _cause(error):
        raise stop
    if _State.received is not None:
        raise Interrupted(_State.received) from error


def _cause(error: BaseException | None) -> Interrupted | None:
    """The Interrupted among an exception and those before it."""
    chain: list[BaseException | None] = [error]
    for link in chain:
        if isinstance(link, Interrupted):
            return link
        if link is not None:
            chain += [other for other in (link.__cause__, link.__context__) if other not in chain]
    return None


def stop_at_once(signum: int, frame: FrameType | None) -> None:
    """The handler for work that can stop anywhere without leaving anything half-written."""
    note_signal(signum)
    _start_looking()
    raise Interrupted(signum)


class Deferred:
    """The handler for work that can stop only at certain points. It prints the first signal and keeps it in `signum`;
    the second one stops the run at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        note_signal(signum)
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: stopping after the current chunk, with a checkpoint; repeat to stop at once\n".encode())


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Inside the block, `handler` receives SIGINT and SIGTERM, and an error caused by an Interrupted is replaced by it.

    If a signal has come, the outermost block always ends in Interrupted. A block inside it that only took note of the
    signal hands it on when it ends. A signal that was ignored (`nohup`, `&`) stays ignored. Outside the main thread
    nothing changes, since only that thread can set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outermost = _State.depth == 0
    before = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook
    if outermost:
        _State.received = None
    _State.depth += 1
    try:
        for number, previous in before.items():
            if previous is not signal.SIG_IGN:
                signal.signal(number, handler)
        if outermost:
            sys.unraisablehook = _without_our_own(hook)
        yield
    except Exception as error:
        raise_if_interrupted(error)
        raise
    finally:
        _State.depth -= 1
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        if outermost:
            _stop_looking()
            sys.unraisablehook = hook
        _raise_what_was_lost(outermost)


def _raise_what_was_lost(outermost: bool) -> None:
    """At the end of a block: raise for a signal that has come, unless that is being done."""
    signum = _State.received
    if outermost:
        _State.received = None
    if signum is not None and _cause(sys.exception()) is None:
        if outermost:
            raise Interrupted(signum)
        if signal.getsignal(signum) is stop_at_once:
            stop_at_once(signum, None)


def _start_looking() -> None:
    """Let the timer run while the process is in a block of `handled_by`."""
    if _State.depth and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, _look)
        signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)


def _stop_looking() -> None:
    if signal.getsignal(signal.SIGALRM) is _look:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _look(_signum: int, _frame: FrameType | None) -> None:
    """Raise again if the Interrupted got lost: no exception is being handled that came from it. A block that defers
    signals is left alone."""
    signum = _State.received
    if signum is None or _cause(sys.exception()) is not None or signal.getsignal(signum) is not stop_at_once:
        return
    raise Interrupted(signum)


def _without_our_own(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for exceptions in finalisers that says nothing about an Interrupted, which is raised again."""

    def report(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)

    return report


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
    import shutil  # not needed at the start of a run, when the handlers should stand soon

    with held_back():
        shutil.rmtree(folder, ignore_errors=True)
