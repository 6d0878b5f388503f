"""What experiments share: the dictionaries that a cell asks for, and the held-out text that it scores them on.

What depends on the language model and the text only is computed once in a process, for all its cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from core.analysis.held_out import DownstreamReference, HeldOut, downstream_reference
from core.artifacts import Store, content_key
from core.atomic import write_atomically
from core.building import build, plain
from core.counts import Counts, count, counting
from core.errors import UserError
from core.fleet import KIND, Request, load_or_train
from core.hub import go_on_with_unfinished
from core.inputs import Inputs, note_all, noting
from core.methods.dictionary import Dictionary
from core.methods.settings import Settings
from core.models.language_model import LanguageModel, load_language_model
from core.models.loading import tokenizer_of
from core.notices import say_once
from core.reading import read_object
from core.runtime import Runtime
from core.streams.source import Source, source_of
from core.text.rows import Rows, check_held_out, read_held_out

Result = TypeVar("Result")
FOLLOWS = "${model.d_model}"  # what a node has as d_model where none was chosen
OF_TRAINING = frozenset(entry.name for entry in fields(Settings)) - {"d_model", "dict_size", "input_norm"}


def is_loaded(method: Any) -> bool:
    """Whether a `method` node names a dictionary made elsewhere, which is read (`core.interop`) and never trained."""
    return str(method["_target_"]).startswith("core.interop.")


def request(cfg: DictConfig, method: Any = None) -> Request:
    """The dictionary that a cell's `stream`, `model` and `data` describe, and its `method` or another node of the kind.

    Raises UserError for one that is loaded, and for a width that is not that of the site."""
    node = method_node(cfg, method)
    if is_loaded(node):
        raise UserError("method=pretrained: this experiment trains its dictionaries; choose another method.")
    ready = partial(check_held_out_text, cfg) if "evaluation" in cfg and "packing" in cfg.stream else None
    return Request(node, source(cfg), cfg.trainer.precision, ready=ready)


def source(cfg: DictConfig) -> Source:
    """What a cell's dictionaries are trained on."""
    go_on_with_unfinished(cfg.artifacts_dir)
    return source_of(plain(cfg.stream), plain(cfg), cfg.trainer.devices)


def method_node(cfg: DictConfig, method: Any = None) -> dict[str, Any]:
    """A cell's `method`, or another node of the kind, as plain settings. Where its d_model is that of the model, or
    null,
    it becomes the size of an activation at `stream.site`: at `mlp_hidden.L` that is another one.

    Raises UserError for any other d_model that is not that size, and for a site that does not exist.
    """
    node = dict(plain(cfg.method if method is None else method))
    return {**node, "d_model": _width(cfg, "method", cfg.method, node.get("d_model"))}


def meta_node(cfg: DictConfig) -> dict[str, Any]:
    """A cell's `meta` as plain settings, with the size of an activation as `method_node` has it."""
    node = plain(cfg.meta)
    method = node["method"]
    return {**node, "method": {**method, "d_model": _width(cfg, "meta.method", cfg.meta.method, method.get("d_model"))}}


def _width(cfg: DictConfig, name: str, node: DictConfig, d_model: int | None) -> int | None:
    """The size of a row of the cell's source, unless `d_model` was chosen for `node`: then it must be that."""
    actual = source(cfg).row_width
    written: Any = OmegaConf.to_container(node, resolve=False)
    follows = written.get("d_model") == FOLLOWS and d_model == cfg.model.d_model
    if actual is None or d_model == actual:
        return d_model
    if d_model is None or follows:
        return actual
    raise UserError(
        f"{name}.d_model is {d_model}, but {cfg.stream.site} of {cfg.model.source} has {actual}. Set "
        f"{name}.d_model={actual}, or leave it out."
    )


def requests(cfg: DictConfig, *methods: Any) -> list[Request]:
    """What a cell asks of the fleet for its `method`, or for these nodes; nothing for dictionaries that are loaded."""
    return [request(cfg, method) for method in methods or (cfg.method,) if not is_loaded(method)]


def trained(cfg: DictConfig, method: Any = None) -> Dictionary:
    """The cell's dictionary, or that of another `method` node, on the model's device: trained, or loaded if the node
    names a dictionary made elsewhere. `dictionary.json` in the cell's folder records where it is and how it was made;
    for another node `dictionary_<key>.json`."""
    node = method_node(cfg, method)
    if is_loaded(node):
        key, (dictionary, record) = content_key(node), _loaded(node)
    else:
        wanted = request(cfg, node)
        dictionary, key = load_or_train(wanted, Runtime.of(cfg)), wanted.key
        record = stored(cfg, wanted.spec)
    write_record(cfg, "dictionary" if method is None else f"dictionary_{key}", record)
    return dictionary.to(language_model(cfg).device)


def stored(cfg: DictConfig, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Where the store keeps a trained dictionary, and how it was made."""
    folder = Store(cfg.artifacts_dir).path(KIND, spec)
    return {"folder": str(folder), **read_object(folder / "manifest.json")}


def write_record(cfg: DictConfig, name: str, record: Mapping[str, Any]) -> None:
    """`<name>.json` in the cell's folder: how a dictionary was made. Writes nothing while the cell has no folder, as
    when the fleet collects what it will ask for."""
    if cfg.cell_folder is not None:
        write_atomically(Path(cfg.cell_folder) / f"{name}.json", json.dumps(record, indent=1))


def _loaded(method: dict[str, Any]) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary that a node names, and its record: class, options and source. Settings of a training, which
    experiments set for every method, are left out."""
    if method["repo"] in (None, "???"):
        raise UserError("method.repo is not set: a name on the Hugging Face hub, or a folder with a dictionary.")
    dictionary = build({key: value for key, value in method.items() if key not in OF_TRAINING})
    return dictionary, {**dictionary.description(), "loaded": method}


def once_per(*keys: str) -> Callable[[Callable[[DictConfig], Result]], Callable[[DictConfig], Result]]:
    """Remember a function's latest result while these keys of the configuration keep their values. What was noted and
    counted when it was made is noted and counted for every cell that uses it."""

    def decorate(make: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
        latest: dict[str, tuple[Result, Inputs, Counts]] = {}

        @wraps(make)
        def remembered(cfg: DictConfig) -> Result:
            name = json.dumps([plain(OmegaConf.select(cfg, key)) for key in keys], sort_keys=True)
            if "data" in keys:
                name += content_key(build(cfg.data).spec)  # the files may have changed
            if name not in latest:
                latest.clear()
                with noting() as noted, counting() as counts:
                    result = make(cfg)
                latest[name] = result, noted, counts
            result, noted, counts = latest[name]
            note_all(noted)
            count(counts)
            return result

        return remembered

    return decorate


@once_per("model")
def language_model(cfg: DictConfig) -> LanguageModel:
    go_on_with_unfinished(cfg.artifacts_dir)
    return load_language_model(cfg.model)


TEXT = ("model", "data", "stream.n_ctx", "stream.packing", "stream.max_document_tokens", "evaluation")


@once_per(*TEXT)
def check_held_out_text(cfg: DictConfig) -> None:
    """Raises UserError if there is no held-out text to score on, which is better known before a training."""
    s = cfg.stream
    check_held_out(
        build(cfg.data), tokenizer_of(cfg.model), cfg.evaluation.seed, s.n_ctx, s.packing, s.max_document_tokens
    )


@once_per(*TEXT)
def held_out_text(cfg: DictConfig) -> Rows:
    """`evaluation.n_rows` rows `[R, n_ctx]` of held-out text, or as many as there are; one choice for all cells.
    Their numbers are counted for the cell's results."""
    lm, s, e = language_model(cfg), cfg.stream, cfg.evaluation
    data = build(cfg.data)
    assert data.spec  # notes the files that the cell depends on
    rows, counts = read_held_out(data, lm.tokenizer, e.n_rows, e.seed, s.n_ctx, s.packing, s.max_document_tokens)
    count(counts)
    return Rows(rows.tokens.to(lm.device), rows.starts.to(lm.device))


def held_out_rows(cfg: DictConfig) -> Tensor:
    """The tokens of `held_out_text`, `[R, n_ctx]`."""
    return held_out_text(cfg).tokens


SITE = (*TEXT, "stream.site")


@once_per(*SITE)
def reference_losses(cfg: DictConfig) -> DownstreamReference:
    """Clean, zero-ablated and mean-ablated losses on the first `evaluation.n_downstream_rows` held-out rows."""
    rows = held_out_rows(cfg)[: cfg.evaluation.n_downstream_rows]
    keep = cfg.evaluation.keep_activations
    return downstream_reference(language_model(cfg), cfg.stream.site, rows, cfg.evaluation.rows_per_batch, keep)


@once_per(*SITE)
def held_out_activations(cfg: DictConfig) -> Tensor | None:
    """The held-out rows' activations `[R, n_ctx, d]` at the site, if `evaluation.keep_activations` is true."""
    if not cfg.evaluation.keep_activations:
        return None
    lm, rows = language_model(cfg), held_out_rows(cfg)
    return torch.cat([lm.capture(part, cfg.stream.site) for part in rows.split(cfg.evaluation.rows_per_batch)])


@once_per(*SITE)
def held_out(cfg: DictConfig) -> HeldOut:
    """What every dictionary of the cell is scored on."""
    e = cfg.evaluation
    return HeldOut(
        lm=language_model(cfg),
        site=cfg.stream.site,
        rows=held_out_text(cfg).tokens,
        starts=held_out_text(cfg).starts,
        n_downstream_rows=e.n_downstream_rows,
        rows_per_batch=e.rows_per_batch,
        reference=reference_losses(cfg) if e.n_downstream_rows else None,
        captured=held_out_activations(cfg),
    )


@once_per(*SITE)
def compat_held_out(cfg: DictConfig) -> HeldOut:
    """The first `evaluation.compat_tokens` held-out tokens, in one batch, with their losses."""
    n_tokens = cfg.evaluation.compat_tokens
    one_batch = held_out(cfg).one_batch(n_tokens)
    if len(one_batch.rows) < n_tokens // one_batch.rows.shape[1]:
        n_there = one_batch.rows.numel()
        say_once(f"evaluation.compat_tokens={n_tokens:,}: the figures called compat are on {n_there:,}, all there are.")
    keep = cfg.evaluation.keep_activations
    reference = downstream_reference(one_batch.lm, one_batch.site, one_batch.rows, len(one_batch.rows), keep)
    return replace(one_batch, reference=reference)
