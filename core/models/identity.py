"""What decides a model's activations: for content keys, for the inputs of a cell, and for the names of what is
exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core import hub
from core.models.files import ModelFiles, model_files
from core.models.loading import family_of, used_names
from core.models.tokenizer import tokenizer_names

HASH_DIGITS = 12  # of the weights' hash in a name for people


def model_identity(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `model` that goes into content keys: dtype, the tokenizer's hash, and source and commit. For a folder
    the hash of its configuration and weights replaces source and commit.

    A branch is its commit here, so a dictionary of another commit lies under another key. Raises UserError for a model
    that does not exist, or lacks tokenizer or weights.
    """
    files = model_files(cfg["source"], cfg["revision"])
    made_of = tokenizer_names(files, family_of(files))
    weights = {"weights": _weights_digest(files)} if files.repo is None else {}
    place = {} if files.repo is None else {"source": cfg["source"], "revision": files.commit}
    return {**place, **weights, "tokenizer": files.digest(made_of), "dtype": cfg["dtype"]}


def model_label(cfg: Mapping[str, Any]) -> str:
    """A name that says which model it is: the one on the hub, or the folder's with a hash of configuration and weights,
    `<folder>@<hash>`."""
    files = model_files(cfg["source"], cfg["revision"])
    if files.repo is not None:
        return str(cfg["source"])
    folder = files.folder.resolve()
    return f"{folder.name if files.gguf is None else files.gguf}@{_weights_digest(files)[:HASH_DIGITS]}"


def note_model(cfg: Mapping[str, Any]) -> None:
    """Record that the running cell's results depend on the model's files, or on its commit on the hub."""
    files = model_files(cfg["source"], cfg["revision"])
    files.note(used_names(files))


def pinned_model(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The group `model` with the commit in the place of a branch."""
    files = model_files(cfg["source"], cfg["revision"])
    return {**cfg, "revision": cfg["revision"] if files.repo is None else files.commit}


def commits_of(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The commit of a model on the hub, by `core.hub.name_of`; nothing for a folder."""
    files = model_files(cfg["source"], cfg["revision"])
    return {} if files.repo is None else {hub.name_of(files.repo, files.revision): str(files.commit)}


def _weights_digest(files: ModelFiles) -> str:
    tokens = [] if files.gguf is not None else tokenizer_names(files, family_of(files))
    return files.digest([name for name in used_names(files) if name not in tokens])
