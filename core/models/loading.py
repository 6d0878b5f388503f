"""From the configuration group `model` to a Hugging Face model and tokenizer on their device.

Only safetensors are read, and no code from a repository is run. Wrong settings are detected from `config.json`, before
the weights are read, with one request that fails at once without a network.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as hf_logging

from core.errors import UserError
from core.models.sites import FAMILIES

SHIPPED = {"bundled": Path(__file__).parent / "bundled"}  # by `model.source`: models that come with the code
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_TIMEOUT_S = 10
OFFLINE = "model=bundled needs no network."


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of the group `model`.

    source    a name on the hub, a folder in Hugging Face's format, or `bundled`
    revision  a commit, branch or tag on the hub; ignored for a folder
    d_model, n_layers  checked against the model; n_layers may be null
    device    `auto` is the GPU if there is one
    """

    name: str
    source: str
    revision: str | None
    dtype: str
    d_model: int | None
    n_layers: int | None
    attn_implementation: str
    device: str

    @classmethod
    def of(cls, cfg: Any) -> Settings:
        values = {str(key): _value(cfg, str(key)) for key in cfg}
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            wrong = ", ".join(f"model.{key}" for key in sorted(values.keys() ^ names))
            raise UserError(f"{wrong}: unknown or missing. The keys of model are {', '.join(sorted(names))}.")
        if values["source"] is None:
            raise UserError(
                "model.source is not set: set it to a name on the Hugging Face hub or a folder, or use model=bundled."
            )
        return cls(**values)


def _value(cfg: Any, key: str) -> Any:
    """A key's value; None if it is still `???`, so that a check can raise a more helpful error."""
    return None if OmegaConf.is_config(cfg) and OmegaConf.is_missing(cfg, key) else cfg[key]


def load_pretrained(settings: Settings) -> tuple[Any, Any, str, str | None]:
    """(model, tokenizer, name, commit)."""
    source, commit = _resolved(settings, _place(settings.source))
    # A commit, not a branch, so that configuration, weights and tokenizer are from the same state of the repository.
    where = {"revision": commit or "main", "trust_remote_code": False}
    config = _checked_config(settings, source, where)
    device = chosen_device(settings.device)
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=DTYPES[settings.dtype],
            attn_implementation=settings.attn_implementation,
            use_safetensors=True,
            **where,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except ImportError as error:
        raise UserError(f"model.attn_implementation={settings.attn_implementation}: {error}") from error
    except OSError as error:
        raise UserError(_reason(settings, error, from_cache=commit is not None and Path(source).is_dir())) from error
    return model.to(device), tokenizer, settings.name, commit


def _place(source: str) -> str:
    """The folder or hub name behind `model.source`."""
    folder = SHIPPED.get(source, Path(source).expanduser())
    if folder.is_dir():
        return str(folder)
    if source in SHIPPED:
        raise UserError(f"model={source}: {folder} is missing. It is part of the repository: git checkout {folder}")
    if source.startswith(("/", "~", ".")) or source.count("/") > 1:
        raise UserError(f"model.source: there is no folder {folder}. {OFFLINE}")
    return source


def _resolved(settings: Settings, source: str) -> tuple[str, str | None]:
    """Where to load from, and the commit of `model.revision` (None for a folder).

    The hub is asked once, because transformers would try six times, over minutes. If it does not answer, the folder of
    the local cache is used.
    """
    if Path(source).is_dir():
        return source, None
    api, revision = HfApi(), settings.revision or "main"
    try:
        api.model_info(source, revision=revision, timeout=HUB_TIMEOUT_S)
        return source, api.resolve_revision(source, revision=revision).resolved
    except Exception as error:  # errors of the hub, of its HTTP client and of the system have no common base class
        folder = _cached(api, source, revision)
        if folder is None:
            raise UserError(_reason(settings, error)) from error
        return str(folder), folder.name


def _cached(api: HfApi, source: str, revision: str) -> Path | None:
    """The folder in the local cache, which is named after its commit, or None."""
    try:
        commit = api.resolve_revision(source, revision=revision, local_files_only=True)
        config = try_to_load_from_cache(source, "config.json", revision=commit.resolved)
    except (RevisionResolutionError, HFValidationError):
        return None
    return Path(config).parent if isinstance(config, str) else None


def _checked_config(settings: Settings, source: str, where: dict[str, Any]) -> Any:
    """The model's configuration. Raises UserError if it contradicts `settings`."""
    given = settings.source
    model_type = _config_dict(settings, source, where).get("model_type")
    if model_type not in FAMILIES:
        families = ", ".join(FAMILIES)
        raise UserError(f"model.source: {given} is of the family {model_type!r}; supported: {families}. {OFFLINE}")
    if settings.dtype not in DTYPES:
        raise UserError(f"model.dtype: {settings.dtype!r} is not one of {', '.join(DTYPES)}.")
    if FAMILIES[model_type].needs_eager and settings.attn_implementation == "sdpa":
        raise UserError(
            f"model.attn_implementation=sdpa: {model_type} soft-caps its attention scores, which sdpa cannot do. "
            "Set model.attn_implementation=eager."
        )
    config = AutoConfig.from_pretrained(source, **where)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel instead of eight
    for key, stated, actual in (
        ("d_model", settings.d_model, config.hidden_size),
        ("n_layers", settings.n_layers, config.num_hidden_layers),
    ):
        if stated != actual and (key, stated) != ("n_layers", None):
            shown = "not set" if stated is None else stated
            raise UserError(f"model.{key} is {shown}, but {given} has {actual}. Set model.{key}={actual}.")
    return config


def _config_dict(settings: Settings, source: str, where: dict[str, Any]) -> Mapping[str, Any]:
    try:
        config, _ = PretrainedConfig.get_config_dict(source, **where)
    except OSError as error:
        raise UserError(_reason(settings, error)) from error
    if not config:
        raise UserError(
            f"model.source: {settings.source} has no config.json, so it is not a Hugging Face model. {OFFLINE}"
        )
    return config


def _reason(settings: Settings, error: BaseException, from_cache: bool = False) -> str:
    """One sentence on why a model could not be read, with a way out."""
    causes, source = _causes(error), settings.source
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        url = f"https://huggingface.co/{source}"
        return f"model.source: {source} is gated. Accept its licence at {url} and set HF_TOKEN, or use model=bundled."
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"model.revision: {source} has no revision {settings.revision!r} on the hub."
    if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
        return f"model.source: {source} is neither a local folder nor a readable model on the hub. {OFFLINE}"
    if "safetensors" in str(error) and not from_cache:
        return (
            f"model.source: {source} has no weights as safetensors, and pickled weights are not read, since they can "
            "run code. Convert them (`model.save_pretrained`), or use model=bundled."
        )
    cause = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"model.source: {source} could not be reached, and is not complete in the local cache ({cause}). {OFFLINE}"


def _causes(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def chosen_device(name: str) -> torch.device:
    """The device that `model.device` names. Raises UserError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device: {name!r} is not a device; use auto, cpu, cuda or cuda:<n>.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"model.device={name}: this machine has no such GPU. Use model.device=auto.")
    return device
