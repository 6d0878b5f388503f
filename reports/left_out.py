"""What a report leaves out: files that cannot be read, numbers that are none, figures that cannot be drawn.

Each is named on standard error as it is met, and in the report's section "Left out". The rest is reported.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from reports.safe_text import plain

REPORTS = Path(__file__).parent


class Omission(NamedTuple):
    what: str
    why: str


class Omissions(list[Omission]):
    """Each omission once, in the order in which they were met."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[Omission] = set()

    def is_new(self, omission: Omission) -> bool:
        """Whether it was not there yet; it is from now on."""
        if omission in self._seen:
            return False
        self._seen.add(omission)
        self.append(omission)
        return True


_noted: ContextVar[Omissions | None] = ContextVar("_noted", default=None)


@contextmanager
def noting() -> Iterator[list[Omission]]:
    """The list to which `note` adds inside."""
    omissions = Omissions()
    token = _noted.set(omissions)
    try:
        yield omissions
    finally:
        _noted.reset(token)


@contextmanager
def nothing_left_out() -> Iterator[None]:
    """Raises UserError at the end if something was left out inside: for pages that are written whole or not at all."""
    with noting() as omissions:
        yield
    if omissions:
        names = "; ".join(f"{omission.what} ({omission.why})" for omission in omissions[:3])
        more = f", and {len(omissions) - 3} more" if len(omissions) > 3 else ""
        raise UserError(f"Not written, since it would lack {names}{more}. Mend these, or take them away.")


def note(what: object, why: object) -> None:
    """Say what is left out and why; once for each inside `noting`."""
    omission = Omission(plain(what), plain(why))
    noted = _noted.get()
    if noted is None or noted.is_new(omission):
        print(f"left out: {omission.what}: {omission.why}", file=sys.stderr)


def described(error: BaseException) -> str:
    """The message of a UserError; the kind, message and place in our code of any other error."""
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(REPORTS) and Path(f.filename).name != "culprits.py"]
    place = f", {Path(own[-1].filename).relative_to(REPORTS.parent)}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {plain(error, 300)}{place}"
