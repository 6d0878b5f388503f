"""Where activations are read and written: names of sites, and one table that maps them to each family's modules.

resid_pre.L   the residual stream before block L (its input)
resid_post.L  the residual stream after block L (its output)
mlp_out.L     what the MLP of block L adds to the residual stream
mlp_hidden.L  the MLP's activated hidden units: the input of its down projection
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from core.errors import UserError

SITE_KINDS = ("resid_pre", "resid_post", "mlp_out", "mlp_hidden")


@dataclass(frozen=True, slots=True)
class Family:
    """The module names of one architecture.

    blocks       path from the causal LM to its list of blocks
    mlp_out      within a block, the module whose output is added to the residual stream; in Gemma 2 that is the RMSNorm
                 after the MLP
    mlp_down     within a block, the MLP's down projection
    mlp_size     the size of the MLP's hidden layer in the configuration; None there means 4 d_model
    needs_eager  whether attention scores are soft-capped, which PyTorch's fused attention (sdpa) cannot do
    """

    blocks: str
    mlp_out: str
    mlp_down: str
    mlp_size: str = "intermediate_size"
    needs_eager: bool = False


FAMILIES = {  # by `model_type` of a Hugging Face configuration
    "gpt2": Family("transformer.h", "mlp", "mlp.c_proj", mlp_size="n_inner"),
    "gpt_neox": Family("gpt_neox.layers", "mlp", "mlp.dense_4h_to_h"),
    "llama": Family("model.layers", "mlp", "mlp.down_proj"),
    "gemma2": Family("model.layers", "post_feedforward_layernorm", "mlp.down_proj", needs_eager=True),
    "qwen2": Family("model.layers", "mlp", "mlp.down_proj"),
    "qwen3": Family("model.layers", "mlp", "mlp.down_proj"),
}


class Site(NamedTuple):
    kind: str
    layer: int

    @property
    def on_residual_stream(self) -> bool:
        """Whether the rest of the model sees nothing but these activations."""
        return self.kind in ("resid_pre", "resid_post")

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


def check_site(site: str) -> None:
    """Raises UserError for a `stream.site` that names no site of any model."""
    try:
        parse_site(site)
    except UserError as error:
        raise UserError(f"stream.{error}") from error


def parse_site(site: str, n_layers: int | None = None) -> Site:
    """`"resid_pre.8"` -> `Site("resid_pre", 8)`. With `n_layers`, the layer must lie within the model."""
    kind, _, layer = site.partition(".")
    if kind not in SITE_KINDS or not (layer.isascii() and layer.isdecimal()):
        kinds = ", ".join(f"{kind}.L" for kind in SITE_KINDS)
        layers = "the number of a layer" if n_layers is None else f"a layer from 0 to {n_layers - 1}"
        raise UserError(f"site: {site!r} is not one of {kinds}, with {layers} for L.")
    parsed = Site(kind, int(layer))
    if n_layers is not None and parsed.layer >= n_layers:
        last = f"resid_post.{n_layers - 1}"
        hint = f" The residual stream after all layers is {last}." if parsed.kind.startswith("resid") else ""
        raise UserError(
            f"site: {site} does not exist: the model has {n_layers} layers (0 to {n_layers - 1}).{hint} "
            f"Valid: {', '.join(f'{kind}.L' for kind in SITE_KINDS)}."
        )
    return parsed


def width_of(config: Any, site: str) -> int:
    """The size of an activation at a site, from a model's configuration. The site must lie within the model."""
    parsed = parse_site(site, config.num_hidden_layers)
    if parsed.kind != "mlp_hidden":
        return int(config.hidden_size)
    hidden = getattr(config, FAMILIES[config.model_type].mlp_size)
    return 4 * int(config.hidden_size) if hidden is None else int(hidden)


@contextmanager
def blocks_skipped(model: nn.Module, model_type: str, site: Site) -> Iterator[None]:
    """Inside the block, the model's blocks before a site of the residual stream return their input."""
    blocks = model.get_submodule(FAMILIES[model_type].blocks)
    assert isinstance(blocks, nn.ModuleList) and site.on_residual_stream
    skipped = list(blocks)[: site.layer + (site.kind == "resid_post")]
    try:
        for block in skipped:
            block.forward = _pass_through
        yield
    finally:
        for block in skipped:
            vars(block).pop("forward", None)


def _pass_through(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states


class Tap(NamedTuple):
    """A place in a model: the first input or the (first) output of a module."""

    module: nn.Module
    side: Literal["input", "output"]


def locate(model: nn.Module, model_type: str, site: Site) -> Tap:
    """The module, and its side, that a site names in a causal LM."""
    family = FAMILIES[model_type]
    block = model.get_submodule(f"{family.blocks}.{site.layer}")
    if site.kind == "resid_pre":
        return Tap(block, "input")
    if site.kind == "resid_post":
        return Tap(block, "output")
    if site.kind == "mlp_out":
        return Tap(block.get_submodule(family.mlp_out), "output")
    return Tap(block.get_submodule(family.mlp_down), "input")


def attach(tap: Tap, fn: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `fn` with the activation in every forward pass. If `fn` returns a tensor, it replaces the activation."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        new = fn(args[0])
        return None if new is None else (new, *args[1:])

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            new = fn(output[0])
            return None if new is None else (new, *output[1:])
        return fn(output)

    if tap.side == "input":
        return tap.module.register_forward_pre_hook(before)
    return tap.module.register_forward_hook(after)
