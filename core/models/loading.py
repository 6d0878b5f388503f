"""From the configuration group `model` to a Hugging Face model and tokenizer on their device.

Only safetensors are read, and GGUF files where the packages for them are installed. No code from a repository is run.
What is wrong is found in the order of its cost: settings, list of files, `config.json`, tokenizer, heads of the files
with weights, weights. Nothing that the library makes up is accepted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from core.checked import Checked, positive, require
from core.errors import UserError
from core.interrupts import raise_if_interrupted
from core.models.files import (
    CONFIG,
    OFFLINE,
    SHIPPED,
    ModelFiles,
    cause_of,
    check_content,
    check_file,
    model_files,
    read_part,
    weight_names,
)
from core.models.sites import FAMILIES, width_of
from core.models.tokenizer import check_ids, load_tokenizer, tokenizer_names
from core.models.weights import check_loaded, check_size, check_weights
from core.reading import kind_of

__all__ = ["DTYPES", "SHIPPED", "Settings", "chosen_device", "family_of", "load_pretrained", "site_width", "used_names"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF_PACKAGES = ("gguf", "accelerate")
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"]


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """The keys of the group `model`.

    source    a name on the hub, a folder in Hugging Face's format, a GGUF file, or `bundled`
    revision  a commit, branch or tag on the hub; ignored for a folder
    d_model, n_layers  may be null; checked against the model where they are given
    device    `auto` is the GPU if there is one
    """

    node: ClassVar[str] = "model"
    name: str
    source: str
    revision: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    d_model: int | None = positive()
    n_layers: int | None = positive()
    attn_implementation: Attention
    device: str

    def check(self) -> None:
        require(bool(self.source.strip()), "model.source", self.source, f"name a model. {OFFLINE}")
        require(self.revision != "", "model.revision", self.revision, "be a commit, branch or tag, or null")

    @classmethod
    def of(cls, values: Mapping[str, Any], node: str | None = None) -> Settings:
        given = {str(key): _value(values, str(key)) for key in values}
        if "source" in given and given["source"] is None:
            raise UserError(
                "model.source is not set: set it to a name on the Hugging Face hub or a folder, or use model=bundled."
            )
        return super().of(given, node)


def _value(cfg: Any, key: str) -> Any:
    """A key's value; None if it is still `???`, so that a check can raise a more helpful error."""
    value = None if OmegaConf.is_config(cfg) and OmegaConf.is_missing(cfg, key) else cfg[key]
    return None if value == "???" else value


def load_pretrained(settings: Settings) -> tuple[Any, Any, str, str | None]:
    """(model, tokenizer, name, commit). Raises UserError for a model that is not whole or does not fit the settings."""
    files = model_files(settings.source, settings.revision)
    device = chosen_device(settings.device)
    config = _checked_config(settings, files)
    names = tokenizer_names(files, config.model_type)
    tokenizer = load_tokenizer(files, names)
    model = _model(settings, files, config)
    check_ids(settings.source, tokenizer, model.get_input_embeddings().num_embeddings)
    files.note(used_names(files))
    return model.to(device), tokenizer, settings.name, files.commit


def tokenizer_of(cfg: Any) -> Any:
    """The tokenizer alone of a configuration group `model`. Raises UserError as `load_pretrained`."""
    settings = Settings.of(cfg)
    files = model_files(settings.source, settings.revision)
    return load_tokenizer(files, tokenizer_names(files, family_of(files)))


def used_names(files: ModelFiles) -> list[str]:
    """All files that decide what the model computes: configuration, tokenizer and weights."""
    own = [] if files.gguf is not None else [CONFIG]
    return list(dict.fromkeys([*own, *tokenizer_names(files, family_of(files)), *weight_names(files)]))


def family_of(files: ModelFiles) -> str:
    """The model type that config.json names; empty for a GGUF file, which says it itself."""
    return "" if files.gguf is not None else str(_config_dict(files).get("model_type"))


def site_width(cfg: Mapping[str, Any], site: str) -> int:
    """The size of an activation at a site of the model that the group `model` describes. Reads its configuration only.

    Raises UserError for a site that does not exist, and for `d_model` and `n_layers` that are not the model's.
    """
    settings = Settings.of(cfg)
    return width_of(_checked_config(settings, model_files(settings.source, settings.revision)), site)


def _model(settings: Settings, files: ModelFiles, config: Any) -> Any:
    names = weight_names(files)
    paths = files.get(names)
    numbers = check_weights(settings.source, paths)
    check_content(files, names)
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    gguf = {} if files.gguf is None else {"gguf_file": files.gguf}
    try:
        with _quiet():
            if files.gguf is None:
                check_size(settings.source, config, numbers)
            model, info = AutoModelForCausalLM.from_pretrained(
                files.folder,
                config=config,
                dtype=DTYPES[settings.dtype],
                attn_implementation=settings.attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are named below
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                **gguf,
            )
    except ImportError as error:
        raise UserError(f"model.attn_implementation={settings.attn_implementation}: {error}") from error
    except (MemoryError, UserError):
        raise
    except Exception as error:  # the library raises what its parts raise
        raise_if_interrupted(error)
        if "attn_implementation" in str(error):
            raise UserError(f"model.attn_implementation={settings.attn_implementation}: {cause_of(error)}") from error
        raise UserError(f"model.source: {settings.source} cannot be loaded: {cause_of(error)}") from error
    check_loaded(settings.source, model, info)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's table of missing tensors: `check_loaded` says what matters of it."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def _checked_config(settings: Settings, files: ModelFiles) -> Any:
    """The model's configuration. Raises UserError for one that is not read here or contradicts `settings`."""
    given = settings.source
    config = _gguf_config(files) if files.gguf is not None else _config(files)
    if FAMILIES[config.model_type].needs_eager and settings.attn_implementation == "sdpa":
        raise UserError(
            f"model.attn_implementation=sdpa: {config.model_type} soft-caps its attention scores, which sdpa cannot "
            "do. Set model.attn_implementation=eager."
        )
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel instead of eight
    for key, stated, actual in (
        ("d_model", settings.d_model, config.hidden_size),
        ("n_layers", settings.n_layers, config.num_hidden_layers),
    ):
        if stated not in (None, actual):
            raise UserError(f"model.{key} is {stated}, but {given} has {actual}. Set model.{key}={actual}.")
    return config


def _config(files: ModelFiles) -> Any:
    """What config.json says, as the library's object."""
    content, path = _config_dict(files), files.folder / CONFIG
    _check_family(files, content.get("model_type"))
    if (quantised := content.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        how = f" ({method})" if method else ""
        raise UserError(
            f"model.source: {files.source} is quantised{how}, see quantization_config in {path}. Quantised weights are "
            "not "
            "read here; use the model that they were made from."
        )
    if content.get("transformers_weights") is not None:
        raise UserError(
            f"model.source: {path} names other files of weights (transformers_weights). Only {', '.join(PLAIN)} are "
            "read."
        )
    if "adapter_config.json" in files:
        raise UserError(
            f"model.source: {files.source} has an adapter (adapter_config.json), which is not read. Merge it into the "
            "model "
            "(`merge_and_unload`) and save that, or remove the adapter's files."
        )
    try:
        config = AutoConfig.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
        sizes = [getattr(config, name) for name in SIZES]
    except Exception as error:  # the library checks values in many ways
        raise_if_interrupted(error)
        raise UserError(f"model.source: {path} cannot be used: {cause_of(error)}") from error
    for name, size in zip(SIZES, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"model.source: {path}: {name} is {size!r:.60}, not a whole number above 0.")
    return config


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
PLAIN = ("model.safetensors", "the shards of model.safetensors.index.json")


def _check_family(files: ModelFiles, model_type: object) -> None:
    if model_type not in FAMILIES:
        families = ", ".join(FAMILIES)
        kind = "of no family that config.json names" if model_type is None else f"of the family {model_type!r}"
        raise UserError(f"model.source: {files.source} is {kind}; supported: {families}. {OFFLINE}")


def _config_dict(files: ModelFiles) -> dict[str, Any]:
    if CONFIG not in files:
        if any(name.endswith(".gguf") for name in files.sizes):
            weight_names(files)  # raises the error that names the GGUF files
        raise files.missing(f"has no {CONFIG}, so it is not a Hugging Face model. {OFFLINE}")
    [path] = files.get([CONFIG])
    content = read_part(path)
    if not isinstance(content.get("model_type", ""), str):
        raise UserError(f"model.source: {path}: model_type is {kind_of(content['model_type'])}, not a text.")
    return content


def _gguf_config(files: ModelFiles) -> Any:
    """The configuration in a GGUF file, which transformers reads with the packages `gguf` and `accelerate`."""
    absent = [name for name in GGUF_PACKAGES if find_spec(name) is None]
    if absent:
        raise UserError(
            f"model.source: {files.source} is a GGUF file. It is read where the packages {' and '.join(GGUF_PACKAGES)} "
            "are "
            f"installed; missing here: {', '.join(absent)} (pip install {' '.join(absent)}). Or convert it to "
            "safetensors."
        )
    [path] = files.get(weight_names(files))
    check_file(path)
    try:
        config = AutoConfig.from_pretrained(files.folder, gguf_file=files.gguf, local_files_only=True)
    except Exception as error:  # the packages raise what they find
        raise_if_interrupted(error)
        raise UserError(f"model.source: {path} cannot be read as GGUF: {cause_of(error)}") from error
    _check_family(files, config.model_type)
    return config


def chosen_device(name: str) -> torch.device:
    """The device that `model.device` names. Raises UserError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device: {name!r} must be one of auto, cpu, cuda, cuda:<n>.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"model.device={name}: this machine has no such GPU. Use model.device=auto.")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UserError(f"model.device: {name!r} must be one of auto, cpu, cuda, cuda:<n>.")
    return device
