"""The settings that the experiments of Leask et al. 2025 add to the shared ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from core.analysis.editing import Preset, Splice
from core.checked import Checked, at_least, between, not_empty, positive, require, rule
from core.settings import Evaluation
from core.streams.decoder_rows import Sampling


@dataclass(frozen=True, kw_only=True)
class CompatEvaluation(Evaluation):
    """Held-out text, and tokens for the figures in the authors' way."""

    compat_tokens: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class BatchTopKSettings(Checked):
    """The node `evaluation`, with the authors' figures."""

    node: ClassVar[str] = ""
    evaluation: CompatEvaluation


Member = dict[str, Any]  # of a family or a pair: what replaces the settings of `method`, by whose rules it is checked


@dataclass(frozen=True, kw_only=True)
class Meta(Checked):
    """The group `meta`: a dictionary of decoder rows (conf/meta/common.yaml)."""

    node: ClassVar[str] = "meta"
    preset: str = not_empty()
    sampling: Sampling
    min_firing_rate: float | None = rule(lambda rate: 0 <= rate < 1, "lie in [0, 1)")
    calibration_batches: int = at_least(0)
    batches_per_chunk: int = at_least(1)
    batch_size: int = at_least(1)
    n_steps: int = at_least(1)
    finetune_steps: int = at_least(1)
    seed: int
    method: dict[str, Any]
    batch_sizes: dict[str, Any] | None = None  # tables by scale, which the settings above refer to
    steps: dict[str, Any] | None = None
    finetune: dict[str, Any] | None = None
    dead_after: dict[str, Any] | None = None

    def check(self) -> None:
        kind = str(self.method.get("_target_")).rpartition(".")[2]
        require(kind == "BatchTopK", self.named("method._target_"), self.method.get("_target_"), "be a BatchTopK")


@dataclass(frozen=True, kw_only=True)
class Optimiser(Checked):
    """Of the planting."""

    node: ClassVar[str] = "planting.optimiser"
    lr: float = positive()
    warmup_steps: int = at_least(0)
    decay_fraction: float = between(0, 1)


@dataclass(frozen=True, kw_only=True)
class Planting(Checked):
    """The node `planting`: how the model first learns facts."""

    node: ClassVar[str] = "planting"
    seed: int
    n_tokens: int = at_least(1)
    n_ctx: int = at_least(2)
    rows_per_step: int = at_least(1)
    optimiser: Optimiser

    def check(self) -> None:
        one = self.n_ctx * self.rows_per_step
        words = f"be {one} or more, the tokens of a step of {self.named('rows_per_step')} x {self.named('n_ctx')}"
        require(self.n_tokens >= one, self.named("n_tokens"), self.n_tokens, words)


@dataclass(frozen=True, kw_only=True)
class Editing(Checked):
    """The node `editing`; the YAML says what each setting is."""

    node: ClassVar[str] = "editing"
    preset: Preset
    splice: Splice
    min_coverage: float = between(0, 1)
    min_specificity: float = between(0, 1)
    meta_latents_per_row: int | None = at_least(1)
    max_edits: int = at_least(1)
    only_known: bool
    pairs: tuple[tuple[str, str], ...] | None = not_empty()
    n_pairs: int | None = at_least(1)
    pair_seed: int
    prompts_per_attribute: int | None = at_least(1)
    rows_per_forward: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class EditingSettings(Checked):
    """Facts that are planted, edits, and the dictionary of decoder rows."""

    node: ClassVar[str] = ""
    planting: Planting
    meta: Meta
    editing: Editing


@dataclass(frozen=True, kw_only=True)
class Examples(Checked):
    """The node `examples`: the strongest activations of latents."""

    node: ClassVar[str] = "examples"
    n_strongest: int = at_least(1)
    n_tokens: int = at_least(1)
    set_size: int = at_least(2)
    n_random_sets: int = at_least(1)
    n_shown: int = at_least(0)
    before: int = at_least(0)
    after: int = at_least(0)
    max_latents: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class MetaSaeSettings(Checked):
    """A family, places in it, and the dictionary of decoder rows."""

    node: ClassVar[str] = ""
    rows: Literal["base", "family"]
    detail: bool
    base: int = at_least(0)
    small: int = at_least(0)
    n_replacing: int = at_least(1)
    family: tuple[Member, ...] = not_empty()
    meta: Meta
    examples: Examples


@dataclass(frozen=True, kw_only=True)
class Stitch(Checked):
    """The node `stitch`; the YAML says what each setting is."""

    node: ClassVar[str] = "stitch"
    rows_per_block: int = at_least(1)
    n_blocks: int = at_least(2)
    confidence: float = rule(lambda share: 0 < share < 1, "lie between 0 and 1")
    n_resamples: int = at_least(1)
    insertion_steps: int = at_least(1)
    steps_per_phase: int = at_least(1)
    frankenstein_below: float | None = between(-1, 1)


@dataclass(frozen=True, kw_only=True)
class StitchingSettings(Checked):
    """A pair of dictionaries, or a family."""

    node: ClassVar[str] = ""
    part: Literal["pair", "frankenstein"]
    small: Member
    large: Member
    family: tuple[Member, ...] = not_empty()
    family_size: int | None = at_least(1)
    stitch: Stitch
