"""The settings that the tools add to the shared ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from core.checked import Checked, at_least, between, not_empty, positive, require


@dataclass(frozen=True, kw_only=True)
class Export(Checked):
    """Where to write a dictionary, and whether for a model with centred writing weights."""

    node: ClassVar[str] = "export"
    folder: str | None = not_empty()
    centred_model: bool


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Checked):
    """The node `export`."""

    node: ClassVar[str] = ""
    export: Export


@dataclass(frozen=True, kw_only=True)
class Architecture(Checked):
    """A GPT2Config."""

    node: ClassVar[str] = "lm.architecture"
    vocab_size: int = between(260, 2**16)  # 256 bytes and 4 special tokens; ids of 16 bits
    n_positions: int = at_least(2)
    n_embd: int = at_least(1)
    n_layer: int = at_least(1)
    n_head: int = at_least(1)
    resid_pdrop: float = between(0, 1)
    embd_pdrop: float = between(0, 1)
    attn_pdrop: float = between(0, 1)

    def check(self) -> None:
        words = f"be a multiple of {self.named('n_head')} = {self.n_head}"
        require(self.n_embd % self.n_head == 0, self.named("n_embd"), self.n_embd, words)


@dataclass(frozen=True, kw_only=True)
class Optimiser(Checked):
    """Of the language model."""

    node: ClassVar[str] = "lm.optimiser"
    lr_muon: float = positive()
    lr_adam: float = positive()
    weight_decay: float = at_least(0)
    warmup_steps: int = at_least(0)
    decay_fraction: float = between(0, 1)


@dataclass(frozen=True, kw_only=True)
class LanguageModelTraining(Checked):
    """The node `lm`."""

    node: ClassVar[str] = "lm"
    export_dir: str | None = not_empty()
    tokenizer_documents: int = at_least(1)
    rows_per_step: int = at_least(1)
    compile: bool
    n_tokens: int = at_least(1)
    heldout_documents: int | None = at_least(1)
    stride: int = at_least(1)
    architecture: Architecture
    optimiser: Optimiser

    def check(self) -> None:
        n = self.architecture.n_positions
        step, words = self.rows_per_step * n, f"the tokens of a step of lm.rows_per_step x {self.named('architecture')}"
        require(self.n_tokens >= step, self.named("n_tokens"), self.n_tokens, f"be {step} or more, {words}.n_positions")
        require(self.stride <= n, self.named("stride"), self.stride, f"be at most n_positions = {n}")


@dataclass(frozen=True, kw_only=True)
class BundledLMSettings(Checked):
    """The node `lm`."""

    node: ClassVar[str] = ""
    lm: LanguageModelTraining


@dataclass(frozen=True, kw_only=True)
class TuningOptimiser(Checked):
    """Of the tuning."""

    node: ClassVar[str] = "tuning.optimiser"
    lr: float = positive()
    warmup_steps: int = at_least(0)
    decay_fraction: float = between(0, 1)


@dataclass(frozen=True, kw_only=True)
class Tuning(Checked):
    """The node `tuning`; the YAML says what each setting is."""

    node: ClassVar[str] = "tuning"
    export_dir: str | None = not_empty()
    n_tokens: int = at_least(1)
    n_ctx: int = at_least(8)
    rows_per_step: int = at_least(1)
    text_share: float = between(0, 1)
    n_dialogues: int = at_least(1)
    heldout_documents: int | None = at_least(1)
    heldout_seed: int
    max_new_tokens: int = at_least(1)
    optimiser: TuningOptimiser

    def check(self) -> None:
        one = self.n_ctx * self.rows_per_step
        words = f"be {one} or more, the tokens of a step of {self.named('rows_per_step')} x {self.named('n_ctx')}"
        require(self.n_tokens >= one, self.named("n_tokens"), self.n_tokens, words)


@dataclass(frozen=True, kw_only=True)
class BundledPairSettings(Checked):
    """The node `tuning`."""

    node: ClassVar[str] = ""
    tuning: Tuning
