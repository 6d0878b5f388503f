"""The settings that the experiments of O'Neill et al. 2025 add to the shared ones (conf/stack, conf/coder)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from core.checked import Checked, at_least, between, each_at_least, not_empty, positive, require, rule
from core.stacked import l0

EVERY_AT_LEAST_0 = (lambda items: all(item >= 0 for item in items), "be a list of numbers of 0 or more")
EVERY_AT_LEAST_1 = (lambda items: all(item >= 1 for item in items), "be a list of numbers of 1 or more")
MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class Codes(Checked):
    """The node `source`: the law of the data, and how many samples there are."""

    node: ClassVar[str] = "source"
    N: int = at_least(1)
    M: int = at_least(1)
    K: int = at_least(1)
    zipf_alpha: float | None = positive()
    n_train: int = at_least(1)
    n_test: int = at_least(2)  # a correlation needs two
    seed: int

    def check(self) -> None:
        words = f"be at most {self.named('N')} = {self.N}, the number of codes: lower K or raise N"
        require(self.K <= self.N, self.named("K"), self.K, words)


@dataclass(frozen=True, kw_only=True)
class CodesOfRuns(Codes):
    """`per_run`: data are drawn anew for every run."""

    per_run: bool


@dataclass(frozen=True, kw_only=True)
class Solver(Checked):
    """The node `coder.solver`: iterations of FISTA, or the start of log-codes of ITO."""

    node: ClassVar[str] = "coder.solver"
    kind: Literal["ito", "fista", "nnls", "l0_oracle"]
    iterations: int | None = at_least(1, default=None)
    init: float | None = None

    def check(self) -> None:
        for kind, name in (("fista", "iterations"), ("ito", "init")):
            given = self.kind != kind or getattr(self, name) is not None
            require(given, self.named(name), None, f"be given for {kind}")


@dataclass(frozen=True, kw_only=True)
class CoderSettings(Checked):
    """The group `coder`: an encoder, free codes, or a solver."""

    node: ClassVar[str] = "coder"
    name: str = not_empty()
    kind: Literal["sae", "mlp", "sc", "sc_relu", "solver"]
    bias: bool
    width: int | None = at_least(1)
    N: int | None = at_least(1)
    l1: tuple[float, ...] = each_at_least(0)
    k: tuple[int, ...] | None = each_at_least(1)
    solver: Solver | None
    encoder: dict[str, Any] | None
    init: float | None = None

    def check(self) -> None:
        is_solver = self.kind == "solver"
        for name, value, needed in (("solver", self.solver, is_solver), ("encoder", self.encoder, not is_solver)):
            words = f"{'be given' if needed else 'be null'} for the kind {self.kind}"
            require((value is not None) == needed, self.named(name), self.plain()[name], words)


@dataclass(frozen=True, kw_only=True)
class OfTestCodes(Checked):
    """The node `inference`: Adam on the log-codes of test samples."""

    node: ClassVar[str] = "inference"
    iterations: int = at_least(1)
    lr: float = positive()
    l1: float | None = at_least(0)
    init: float


@dataclass(frozen=True, kw_only=True)
class StackSettings(Checked):
    """A stack of runs (conf/stack/oneill.yaml)."""

    node: ClassVar[str] = ""
    task: Literal["known_codes", "known_dictionary", "unknown"]
    threads: int | None = between(1, MAX_THREADS)
    seeds: tuple[int, ...] = not_empty()
    source: CodesOfRuns
    coder: CoderSettings
    steps: int = at_least(1)
    log_every: int = at_least(1)
    lr: float = positive()
    objective: Literal["cosine", "mse"]
    normalise: bool
    inference: OfTestCodes
    ito_of: tuple[str, ...]
    warm_ito_of: tuple[str, ...]
    truncate_to: tuple[int, ...] = rule(*EVERY_AT_LEAST_1)
    read_at: tuple[int, ...] = rule(*EVERY_AT_LEAST_0)
    keep_atoms: bool

    solver_tasks: ClassVar[tuple[str, ...]] = ("known_dictionary",)  # tasks that a solver can do

    def check(self) -> None:
        c, n_units = self.coder, self.coder.N or self.source.N
        for name, k in (("coder.k", c.k or ()), ("truncate_to", self.truncate_to)):
            require(max(k, default=0) <= n_units, name, list(k), f"be at most {n_units}, the number of codes")
        kinds = ("sae", "mlp", *(("sc", "sc_relu") if self.task == "unknown" else ()))
        kinds = (*kinds, *(("solver",) if self.task in self.solver_tasks else ()))
        require(c.kind in kinds, "coder.kind", c.kind, f"be one of {', '.join(kinds)} for task={self.task}")
        words = f"be null for task={self.task}, where there are as many codes as true ones"
        require(c.N is None or self.task == "unknown", "coder.N", c.N, words)
        if c.solver is not None and c.solver.kind == "l0_oracle":
            s = self.source
            l0.check_sizes(s.N, s.M, s.K, s.n_test * len(self.seeds) * len(c.l1))
        for name, value in (("n", self.source.n_train), ("width", c.width)):
            own = (c.encoder or {}).get(name, value)
            require(own == value, f"coder.encoder.{name}", own, f"be {value}, as elsewhere in these settings")
        require(c.k is None or c.kind != "solver", "coder.k", c.k and list(c.k), "be null for a solver")


@dataclass(frozen=True, kw_only=True)
class UnknownSettings(StackSettings):
    """`profile`: whose values a cell has; it changes no number by itself."""

    profile: Literal["repo", "paper_text", "tuned"]


@dataclass(frozen=True, kw_only=True)
class AblationSettings(StackSettings):
    """`part`: the study that a cell belongs to."""

    part: Literal["width", "bias", "zipf", "geometry"]


@dataclass(frozen=True, kw_only=True)
class LargeScaleSettings(StackSettings):
    """Samples in a step and in a chunk of the evaluation; test samples that the solver takes."""

    batch_size: int = at_least(1)
    n_oracle: int = at_least(2)
    solver_tasks: ClassVar[tuple[str, ...]] = ("known_codes",)


@dataclass(frozen=True, kw_only=True)
class LLMSettings(Checked):
    """`profile`: the part of the grid that a cell belongs to; it changes no number."""

    node: ClassVar[str] = ""
    profile: Literal["paper_text", "repo", "matched_steps", "matched_flops"]


@dataclass(frozen=True, kw_only=True)
class Shape(Checked):
    """Codes and active codes of a problem."""

    node: ClassVar[str] = "shapes"
    N: int = at_least(1)
    K: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class Illustration(Checked):
    """Samples of the problem in the plane, and how many of them are shown."""

    node: ClassVar[str] = "illustration"
    n_samples: int = at_least(1)
    n_shown: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class TheoremSettings(Checked):
    """The checks of the theorem."""

    node: ClassVar[str] = ""
    threads: int | None = between(1, MAX_THREADS)
    seeds: tuple[int, ...] = not_empty()
    M: int = at_least(1)
    shapes: tuple[Shape, ...] = not_empty()
    n_train: int = at_least(1)
    n_test: int = at_least(1)
    steps: int = at_least(1)
    lr: float = positive()
    illustration: Illustration


@dataclass(frozen=True, kw_only=True)
class ClassicalCoder(Checked):
    """scikit-learn's dictionary learning."""

    node: ClassVar[str] = "coder"
    name: str = not_empty()
    fit_algorithm: Literal["lars", "cd"]
    fit_alpha: float = positive()
    transform_alpha: float = positive()
    max_iter: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class ClassicalSettings(Checked):
    """The classical method, on the authors' data or on ours."""

    node: ClassVar[str] = ""
    threads: int | None = between(1, MAX_THREADS)
    seeds: tuple[int, ...] = rule(
        lambda seeds: len(seeds) > 0 and all(0 <= seed < 2**32 for seed in seeds),
        "be a list of whole numbers from 0 to 2^32 - 1, which scikit-learn takes",
    )
    source: Codes
    codes: Literal["signed", "nonnegative"]
    coder: ClassicalCoder
    coders: dict[str, ClassicalCoder]
