"""Plumbing that experiments share: what a cell asks of the fleet, and held-out rows with their reference losses.

What depends on the language model and the text alone is made once in a process, whatever the number of cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from core.analysis.evaluate import DownstreamReference, compat_rows, downstream_reference
from core.artifacts import Store, write_atomically
from core.data.rows import RowStream
from core.fleet import KIND, Request, load_or_train
from core.methods.base import DictionaryMethod
from core.models.language_model import LanguageModel, load_language_model

Made = TypeVar("Made")


def request(cfg: DictConfig) -> Request:
    """The dictionary that a cell's `method`, `stream`, `model` and `data` describe."""
    parts = {key: plain(cfg[key]) for key in ("method", "stream", "model", "data")}
    seed = parts["stream"].pop("seed")
    return Request(precision=cfg.trainer.precision, seed=seed, devices=cfg.trainer.devices, **parts)


def trained(cfg: DictConfig) -> DictionaryMethod:
    """The cell's dictionary, on the model's device; `dictionary.json` in its folder says where it lies and how it was
    trained."""
    wanted = request(cfg)
    method = load_or_train(wanted, cfg)
    stored = Store(cfg.artifacts_dir).path(KIND, wanted.spec)
    manifest = json.loads((stored / "manifest.json").read_text())
    write_atomically(
        Path(cfg.cell_folder) / "dictionary.json", json.dumps({"folder": str(stored), **manifest}, indent=1)
    )
    return method.to(language_model(cfg).device)


def plain(node: Any) -> Any:
    """A part of the configuration without interpolations, as JSON can hold it."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def once_per(*keys: str) -> Callable[[Callable[[DictConfig], Made]], Callable[[DictConfig], Made]]:
    """Make a function of the configuration remember its result per value of these keys; the latest one only."""

    def decorate(make: Callable[[DictConfig], Made]) -> Callable[[DictConfig], Made]:
        latest: dict[str, Made] = {}

        @wraps(make)
        def remembered(cfg: DictConfig) -> Made:
            name = json.dumps([plain(OmegaConf.select(cfg, key)) for key in keys], sort_keys=True)
            if name not in latest:
                latest.clear()
                latest[name] = make(cfg)
            return latest[name]

        return remembered

    return decorate


@once_per("model")
def language_model(cfg: DictConfig) -> LanguageModel:
    return load_language_model(cfg.model)


@once_per("model", "data", "stream.n_ctx", "stream.packing", "stream.max_document_tokens", "evaluation")
def held_out_rows(cfg: DictConfig) -> Tensor:
    """`evaluation.n_rows` rows `[R, n_ctx]` of held-out text, the same for every cell and seed."""
    lm, s = language_model(cfg), cfg.stream
    rows = RowStream(
        instantiate(cfg.data), lm.tokenizer, "heldout", cfg.evaluation.seed, s.n_ctx, s.packing, s.max_document_tokens
    )
    return rows.next_rows(cfg.evaluation.n_rows).to(lm.device)


SITE = ("model", "data", "stream.site", "stream.n_ctx", "stream.packing", "stream.max_document_tokens", "evaluation")


@once_per(*SITE)
def reference_losses(cfg: DictConfig) -> DownstreamReference:
    """Clean, zero-ablated and mean-ablated losses on the first `evaluation.n_downstream_rows` held-out rows."""
    rows = held_out_rows(cfg)[: cfg.evaluation.n_downstream_rows]
    keep = cfg.evaluation.keep_activations
    return downstream_reference(language_model(cfg), cfg.stream.site, rows, cfg.evaluation.rows_per_batch, keep)


@once_per(*SITE)
def compat_reference_losses(cfg: DictConfig) -> DownstreamReference:
    """The same on the first `evaluation.compat_tokens` held-out tokens, in one batch."""
    rows = compat_rows(held_out_rows(cfg), cfg.evaluation.compat_tokens)
    return downstream_reference(language_model(cfg), cfg.stream.site, rows, len(rows), cfg.evaluation.keep_activations)


@once_per(*SITE)
def held_out_activations(cfg: DictConfig) -> Tensor | None:
    """The held-out rows' activations `[R, n_ctx, d]` at the site, if `evaluation.keep_activations` says so."""
    if not cfg.evaluation.keep_activations:
        return None
    lm, rows = language_model(cfg), held_out_rows(cfg)
    return torch.cat([lm.capture(part, cfg.stream.site) for part in rows.split(cfg.evaluation.rows_per_batch)])
