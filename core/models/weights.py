"""Weights are accepted only whole: files are checked before they are read, and every tensor must come from them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from core.errors import UserError
from core.models.files import check_file, count, damaged
from core.models.sites import FAMILIES

FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors; tensors of other kinds are masks, or quantised weights
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|(attn|attention)\.bias|position_ids)$")
ROOM = 4  # the numbers of a model against those in its files, at most: some are read more than once
N_NAMED = 3  # tensors or tokens that a message names


def check_weights(source: str, paths: Iterable[Path]) -> dict[str, int]:
    """How many numbers each tensor has, by name. Raises UserError for a file that is a pointer, cut or damaged, and for
    weights that are whole numbers. Reads only the heads of the files."""
    numbers: dict[str, int] = {}
    for path in paths:
        check_file(path)
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="pt") as file:
                heads = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
                kinds = {name: head.get_dtype() for name, head in heads.items()}
                numbers |= {name: math.prod(head.get_shape()) for name, head in heads.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(damaged(path, f"it is no whole file of safetensors ({error})")) from error
        others = [name for name, kind in kinds.items() if kind not in FLOATS and not BUFFERS.search(name)]
        if others:
            raise UserError(
                f"model.source: {source} is quantised: {some(others)} of {path.name} are {kinds[others[0]]}. Quantised "
                "weights are not read here; use the model that they were made from."
            )
    return numbers


def check_size(source: str, config: Any, numbers: Mapping[str, int]) -> None:
    """Raises UserError for a configuration that describes a far larger model than the files hold, before any of its
    tensors is made."""
    held, room = sum(numbers.values()), ROOM * sum(numbers.values())
    sizes = (config.hidden_size, config.vocab_size, config.num_attention_heads)
    if config.num_hidden_layers > len(numbers) or max(sizes) > room:
        described = (
            f"{config.num_hidden_layers:,} layers, a width of {config.hidden_size:,} and {config.vocab_size:,} tokens"
        )
        raise UserError(
            f"model.source: {source} does not fit its config.json, which describes {described:.200}: the files have "
            f"{count(len(numbers), 'tensor')} of {held:,} numbers. Correct config.json, or fetch the model again."
        )
    with torch.device("meta"):
        described_numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if described_numbers > room:
        raise UserError(
            f"model.source: {source} does not fit its config.json, which describes {described_numbers:,} numbers: the "
            "files "
            f"hold {held:,}. Correct config.json, or fetch the model again."
        )


def check_loaded(source: str, model: Any, info: Mapping[str, Any]) -> None:
    """Raises UserError unless every tensor of the model came from the files, in its shape. `info` is what transformers
    says about the loading. Tensors that the model does not use are said; inside its blocks they are an error, since
    the files are then of another architecture."""
    if info["mismatched_keys"]:
        raise UserError(_mismatch(source, model.config, info["mismatched_keys"]))
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    n_tensors = len(model.state_dict())
    if missing:
        instead = f" They have {count(len(unused), 'other')} instead: {some(unused)}." if unused else ""
        raise UserError(
            f"model.source: {source} is not whole: its files lack {len(missing)} of {n_tensors} tensors: "
            f"{some(missing)}."
            f"{instead} What is missing would be drawn at random. Fetch the model again, or save it with "
            "`model.save_pretrained`."
        )
    if info["error_msgs"]:
        raise UserError(f"model.source: {source} cannot be loaded: {info['error_msgs'][0]}")
    blocks = FAMILIES[model.config.model_type].blocks.rpartition(".")[2]
    in_block = re.compile(rf"(^|\.){blocks}\.\d+\.")
    inside = [name for name in unused if in_block.search(name) and not BUFFERS.search(name)]
    if inside:
        raise UserError(
            f"model.source: {source} does not fit its config.json: its files have {count(len(inside), 'tensor')} "
            "without a "
            f"place in the {model.config.num_hidden_layers} layers of this {model.config.model_type}: {some(inside)}. "
            "Correct config.json, or fetch the model again."
        )
    if rest := [name for name in unused if not BUFFERS.search(name)]:
        print(f"{source}: not used of its files: {count(len(rest), 'tensor')} ({some(rest)})", file=sys.stderr)


def _mismatch(source: str, config: Any, mismatched: Iterable[tuple[str, Any, Any]]) -> str:
    """`mismatched` has (name, shape in the files, shape by config.json)."""
    listed = sorted((name, list(there), list(here)) for name, there, here in mismatched)
    shapes = "; ".join(f"{name} is {there}, by config.json {here}" for name, there, here in listed[:N_NAMED])
    _, there, here = listed[0]
    vocabulary = len(there) == len(here) == 2 and there[1:] == here[1:] and here[0] == config.vocab_size
    hint = f" config.json has vocab_size {here[0]}, the weights are for {there[0]}." if vocabulary else ""
    return (
        f"model.source: {source} does not fit its config.json: {count(len(listed), 'tensor')} of other shapes: "
        f"{shapes}.{hint} "
        "Correct config.json, or fetch the model again."
    )


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - N_NAMED
    return ", ".join(names[:N_NAMED]) + (f" and {more} more" if more > 0 else "")
