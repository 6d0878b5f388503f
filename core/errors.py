"""Errors that a user can cause and fix."""

from __future__ import annotations

import re

OF_MEMORY = re.compile(
    "allocate memory|out of memory|start new thread|failed to map segment|bad_alloc|cannot allocate|"
    "Error 12\\b|Errno 12\\b|unable to mmap|malloc of size",
    re.IGNORECASE,
)


class UserError(ValueError):
    """A wrong setting or input. The message names the setting and a way out; run.py prints it without a traceback."""


def lack_of_memory(error: BaseException) -> UserError | None:
    """The message for an error that comes from a lack of memory, however a library words it; None for any other."""
    for link in chain_of(error):
        words = f"{type(link).__name__}: {str(link).strip().partition(chr(10))[0]}".rstrip(": ")
        if isinstance(link, MemoryError) or (not isinstance(link, UserError) and OF_MEMORY.search(words)):
            return UserError(
                f"There is not enough memory ({words:.200}). Raise the limit (`ulimit -v` shows it), close other "
                "programs, or lower what takes most: stream.buffer_tokens, method.dict_size, trainer.processes, "
                "trainer.cell_processes."
            )
    return None


def chain_of(error: BaseException | None) -> list[BaseException]:
    """The error, what caused it, and so on. Chains can be circles: an error may be raised again from its own cause."""
    chain: list[BaseException] = []
    while error is not None and not any(error is link for link in chain):
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


class NonFiniteLoss(RuntimeError):  # noqa: N818  (it names an event, not a mistake)
    """Training met a NaN or an infinity. The parameters are those after the last finite step."""

    def __init__(self, step: int, name: str) -> None:
        super().__init__(
            f"{name}: the loss or its gradient is not finite at optimiser step {step} (counted from 0). "
            "Look for NaN in the activations, or lower method.lr."
        )
        self.step, self.name = step, name

    def __reduce__(self) -> tuple[type[NonFiniteLoss], tuple[int, str]]:
        return type(self), (self.step, self.name)  # so that it can be pickled


def shown(name: object) -> str:
    """A name that a file holds, fit for a message: short, on one line, without control characters."""
    text = str(name)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")[1:-1]
