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


@dataclass(frozen=True, kw_only=True)
class Scaling(Checked):
    """The node `scaling`.

    n_tokens     of the training that latents are scaled on
    effective    the compared latents: `class`, those with Delta_norm >= 0.9; `top`, those with the highest
    n_effective  how many `top` takes; null: the paper's share of the dictionary, 50 or more
    """

    node: ClassVar[str] = "scaling"
    n_tokens: int = at_least(1)
    effective: Literal["class", "top"]
    n_effective: int | None = at_least(1)


@dataclass(frozen=True, kw_only=True)
class ScalingSettings(CrosscoderSettings):
    """Of minder_latent_scaling."""

    scaling: Scaling


@dataclass(frozen=True, kw_only=True)
class Causality(Checked):
    """The node `causality`.

    n_dialogues     held-out ones
    answers         `given`: as they are; `greedy`: the first question, and the chat model's own answer
    max_new_tokens  of such an answer
    random_halves   how many
    rows_per_batch  dialogues in one pass
    """

    node: ClassVar[str] = "causality"
    n_dialogues: int = at_least(1)
    answers: Literal["given", "greedy"]
    max_new_tokens: int = at_least(1)
    random_halves: int = at_least(1)
    rows_per_batch: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class Steering(Checked):
    """The node `steering`: the most specific latents, pushed by alpha times their largest activation."""

    node: ClassVar[str] = "steering"
    n_latents: int = at_least(0)
    n_prompts: int = at_least(0)
    alphas: tuple[float, ...]
    max_new_tokens: int = at_least(1)
    prompt_only: bool


@dataclass(frozen=True, kw_only=True)
class CausalitySettings(ScalingSettings):
    """Of minder_causality."""

    causality: Causality
    steering: Steering


@dataclass(frozen=True, kw_only=True)
class Templates(Checked):
    """The node `templates`.

    n_probed    dialogues with planted behaviours that latents are probes of; 0: none
    n_contexts  latents whose contexts are written for a judge; 0: none
    window      tokens of a context
    n_quantiles, n_each, n_negative  contexts of each latent: n_each of every quantile of strength, and n_negative in
                which it is off
    """

    node: ClassVar[str] = "templates"
    n_probed: int = at_least(0)
    n_contexts: int = at_least(0)
    window: int = at_least(2)
    n_quantiles: int = at_least(1)
    n_each: int = at_least(1)
    n_negative: int = at_least(0)


@dataclass(frozen=True, kw_only=True)
class TemplateSettings(ScalingSettings):
    """Of minder_templates."""

    templates: Templates


@dataclass(frozen=True, kw_only=True)
class Page(Checked):
    """The node `page`: latents in the list (0: no page), contexts of each, and tokens of a context."""

    node: ClassVar[str] = "page"
    n_latents: int = at_least(0)
    n_contexts: int = at_least(1)
    window: int = at_least(2)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ScalingSettings):
    """Of minder_crosscoder, which ends in a page."""

    causality: Causality
    page: Page
