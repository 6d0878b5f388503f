"""Lines on standard error that a user should read, each at most once in a process."""

from __future__ import annotations

import sys
from functools import cache


@cache
def say_once(message: str) -> None:
    print(message, file=sys.stderr)
