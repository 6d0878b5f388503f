"""What a source's stream yields: a batch of activations, and where they came from.

Shapes: B rows in a batch, d = width of the site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


class Norm(Protocol):
    """Normalises a batch: a call with `x` returns the normalised `x` first. Norms with the same `shared_as` give the
    same result; None: the result is not shared."""

    @property
    def shared_as(self) -> str | None: ...
    def __call__(self, x: Tensor) -> tuple[Tensor, Any]: ...


@dataclass(slots=True)
class Batch:
    """Activations and where they came from.

    x          `[B, d]`; `[B, n_models, d]` for several models on the same tokens; `[B, tau + 1, d]` for ordered windows
    tokens     `[B]` ids of the tokens at which they were taken, where there are tokens
    positions  `[B]` their positions in their rows
    truth      ground truth of a synthetic source, by name, first axis B
    """

    x: Tensor
    tokens: Tensor | None = None
    positions: Tensor | None = None
    truth: dict[str, Tensor] = field(default_factory=dict)
    _normalised: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def normalised(self, norm: Norm) -> Tensor:
        """`x` after `norm`; a result that depends on `x` alone is computed once for all dictionaries of this batch."""
        if norm.shared_as is None:
            return norm(self.x)[0]
        if norm.shared_as not in self._normalised:
            self._normalised[norm.shared_as] = norm(self.x)[0]
        return self._normalised[norm.shared_as]
