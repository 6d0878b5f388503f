"""The settings that the experiments of Minder et al. 2025 add to the shared ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from core.checked import Checked, at_least, positive, rule


@dataclass(frozen=True, kw_only=True)
class PairEvaluation(Checked):
    """The node `evaluation`: held-out dialogues, n_rows / 2 of them, and text with as many tokens."""

    node: ClassVar[str] = "evaluation"
    seed: int
    n_rows: int = at_least(2)
    rows_per_batch: int = at_least(1)
    keep_activations: bool


@dataclass(frozen=True, kw_only=True)
class Matching(Checked):
    """The node `matching`: an L1 crosscoder is trained with other coefficients until it has as many active latents.

    l0         wanted, per held-out token
    tolerance  how far off it may be, as a share
    rounds     trainings at most; the closest is used
    """

    node: ClassVar[str] = "matching"
    l0: float = positive()
    tolerance: float = rule(lambda share: 0 < share < 1, "lie between 0 and 1")
    rounds: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class CrosscoderSettings(Checked):
    """What every experiment on a pair of models has."""

    node: ClassVar[str] = ""
    evaluation: PairEvaluation
    matching: Matching


@dataclass(frozen=True, kw_only=True)
class PlantedSettings(Checked):
    """Rows that a crosscoder is measured on."""

    node: ClassVar[str] = ""
    n_heldout: int = at_least(2)


@dataclass(frozen=True, kw_only=True)
class Named(Checked):
    """`name`: what reports call the tool, if not by its method's class."""

    node: ClassVar[str] = "coder"
    name: str | None


@dataclass(frozen=True, kw_only=True)
class ToolsSettings(Checked):
    """
    tool       `crosscoder` or a variant of it; `difference`: a dictionary of chat minus base; `principal` components of
               the difference; its `mean`
    case       the pair, a name in `cases`, which hold its concepts
    n_heldout  rows that the tool is measured on, and that the untrained tools read
    """

    node: ClassVar[str] = ""
    tool: Literal["crosscoder", "difference", "principal", "mean"]
    coder: Named
    case: str
    cases: dict[str, Any]
    n_heldout: int = at_least(2)
