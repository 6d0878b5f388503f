"""Errors that a user can cause and fix."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong setting or input. The message names the setting and a way out; run.py prints it without a traceback."""


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
