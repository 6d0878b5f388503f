"""The settings that the benchmarks add to the shared ones; their YAMLs say what each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from core.checked import Checked, at_least, between, each_at_least, not_empty, require, rule
from core.input_norm import Normalisation
from core.models.sites import check_site
from core.streams.activation_source import BufferDtype
from core.streams.activations import check_sizes
from core.text.rows import Packing

MAX_THREADS = 1024


def threads_or_null() -> Any:
    return between(1, MAX_THREADS)


def growing(**options: Any) -> Any:
    return rule(lambda pair: 0 < pair[0] < pair[1] <= 1, "grow within (0, 1]", **options)


@dataclass(frozen=True, kw_only=True)
class Timed(Checked):
    """Rounds that are timed, and those before them that are not."""

    node: ClassVar[str] = ""
    repetitions: int = at_least(1)
    warmup: int = at_least(0)


@dataclass(frozen=True, kw_only=True)
class FleetSettings(Checked):
    """A grid of another experiment."""

    node: ClassVar[str] = ""
    threads: int | None = threads_or_null()
    grid_of: str = not_empty()
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part(Checked):
    """A panel at two fractions of its work."""

    node: ClassVar[str] = "parts"
    panel: str = not_empty()
    full: Mapping[str, int] = not_empty()
    fractions: tuple[float, float] | None = growing(default=None)
    only: tuple[str, ...] = ()
    set: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HoursSettings(Checked):
    """Parts of panels, and the fractions of those that name none."""

    node: ClassVar[str] = ""
    parts: Mapping[str, Part] = not_empty()
    fractions: tuple[float, float] = growing()


@dataclass(frozen=True, kw_only=True)
class StepShape(Checked):
    """Sizes of a batch and of a dictionary."""

    node: ClassVar[str] = "base"
    batch_size: int = at_least(1)
    d_model: int = at_least(1)
    dict_size: int = at_least(1)
    k: int = at_least(1)

    def check(self) -> None:
        require(self.k <= self.dict_size, self.named("k"), self.k, f"be at most dict_size = {self.dict_size}")


@dataclass(frozen=True, kw_only=True)
class Axes(Checked):
    """The values of each axis."""

    node: ClassVar[str] = "axes"
    dict_size: tuple[int, ...] = each_at_least(1)
    k: tuple[int, ...] = each_at_least(1)
    batch_size: tuple[int, ...] = each_at_least(1)


@dataclass(frozen=True, kw_only=True)
class ScalingFleet(Checked):
    """Fleets in a `Trainer.fit`."""

    node: ClassVar[str] = "fleet"
    threads: int | None = threads_or_null()
    sizes: tuple[int, ...] = each_at_least(1)
    batches_per_chunk: int = at_least(1)
    chunks: int = at_least(1)
    warmup: int = at_least(0)
    shape: StepShape


@dataclass(frozen=True, kw_only=True)
class ScalingSettings(Timed):
    """A step around a base point along the axes, and fleets."""

    threads: int | None = threads_or_null()
    step: dict[str, Any]
    base: StepShape
    axes: Axes
    fleet: ScalingFleet

    def check(self) -> None:
        largest, smallest = max(self.axes.k), min(self.axes.dict_size)
        require(largest <= self.base.dict_size, "axes.k", largest, f"be at most base.dict_size = {self.base.dict_size}")
        require(smallest >= self.base.k, "axes.dict_size", smallest, f"be at least base.k = {self.base.k}")


@dataclass(frozen=True, kw_only=True)
class Panel(Checked):
    """A stack of runs."""

    node: ClassVar[str] = "panels"
    coder: Literal["sae", "mlp", "sc"]
    width: int | None = at_least(1, default=None)
    N: int = at_least(1)
    M: int = at_least(1)
    K: int = at_least(1)
    runs: int = at_least(1)

    def check(self) -> None:
        require(self.K <= self.N, self.named("K"), self.K, f"be at most N = {self.N}")
        require(self.coder != "mlp" or self.width is not None, self.named("width"), None, "be given for an mlp")


@dataclass(frozen=True, kw_only=True)
class StackedSettings(Timed):
    """Panels, and the steps of a timed task."""

    threads: int | None = threads_or_null()
    n_train: int = at_least(1)
    steps: int = at_least(1)
    panels: Mapping[str, Panel] = not_empty()


@dataclass(frozen=True, kw_only=True)
class StitchingSettings(Timed):
    """Two dictionaries with random weights, and rows."""

    threads: int | None = threads_or_null()
    d_model: int = at_least(1)
    small: int = at_least(1)
    large: int = at_least(1)
    l0: float = rule(lambda l0: l0 > 0, "be positive")
    n_rows: int = at_least(1)
    rows_per_batch: int = at_least(1)

    def check(self) -> None:
        words = f"be less than small = {self.small} and large = {self.large}"
        require(self.l0 < min(self.small, self.large), "l0", self.l0, words)


@dataclass(frozen=True, kw_only=True)
class BareStream(Checked):
    """The stream's sizes (conf/source/common.yaml), without a length."""

    node: ClassVar[str] = "stream"
    site: str = not_empty()
    n_ctx: int = at_least(2)
    packing: Packing
    max_document_tokens: int | None = at_least(2)
    batch_size: int = at_least(1)
    buffer_tokens: int = at_least(1)
    buffer_dtype: BufferDtype
    rows_per_forward: int = at_least(1)

    def check(self) -> None:
        check_site(self.site)
        check_sizes(self.batch_size, self.buffer_tokens, self.n_ctx)


@dataclass(frozen=True, kw_only=True)
class StreamSettings(Timed):
    """A stream, and the shape of a model with random weights, if any."""

    threads: int | None = threads_or_null()
    random_architecture: dict[str, int] | None
    stream: BareStream


@dataclass(frozen=True, kw_only=True)
class Lightning(Checked):
    """Chunks in a `Trainer.fit`; 0: none."""

    node: ClassVar[str] = "lightning"
    batches_per_chunk: int = at_least(1)
    chunks: int = at_least(0)
    warmup: int = at_least(0)


@dataclass(frozen=True, kw_only=True)
class Peers(Timed):
    """Other libraries."""

    node: ClassVar[str] = "peers"
    names: tuple[str, ...]
    kinds: tuple[Literal["batchtopk", "topk"], ...]
    dict_sizes: tuple[int, ...] = each_at_least(1)


@dataclass(frozen=True, kw_only=True)
class ProductDtypes(Checked):
    """Types of numbers by device."""

    node: ClassVar[str] = "product_dtypes"
    cpu: tuple[BufferDtype, ...]
    cuda: tuple[BufferDtype, ...]


@dataclass(frozen=True, kw_only=True)
class TrainStepSettings(Timed):
    """Steps of methods at several sizes, and peers."""

    threads: int | None = threads_or_null()
    batch_size: int = at_least(1)
    d_model: int = at_least(1)
    dict_sizes: tuple[int, ...] = each_at_least(1)
    k: int = at_least(1)
    product_dtypes: ProductDtypes
    methods: Mapping[str, Any] = not_empty()
    memory: bool
    lightning: Lightning
    peers_python: str | None = not_empty()
    peers: Peers

    def check(self) -> None:
        smallest = min(self.dict_sizes)
        require(self.k <= smallest, "k", self.k, f"be at most {smallest}, the size of the smallest dictionary")


@dataclass(frozen=True, kw_only=True)
class QualitySettings(Checked):
    """One setting of the comparison: a method, a dictionary, a training, and other libraries."""

    node: ClassVar[str] = ""
    threads: int = between(1, MAX_THREADS)
    kind: Literal["batchtopk", "topk"]
    dict_size: int = at_least(1)
    k: int = at_least(1)
    n_steps: int = at_least(1)
    lr: float = rule(lambda lr: lr > 0, "be positive")
    decay_fraction: float = between(0, 1)
    training_seeds: tuple[int, ...] = not_empty()
    input_norm: Normalisation
    methods: Mapping[str, Any] = not_empty()
    peers_python: str | None = not_empty()
    peers: tuple[Literal["dictionary_learning", "saelens"], ...]

    def check(self) -> None:
        require(self.k <= self.dict_size, self.named("k"), self.k, f"be at most dict_size = {self.dict_size}")
