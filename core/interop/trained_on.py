"""On which language model a dictionary was trained, as its files say, against the model in use.

Two models of one width take each other's dictionaries without an error, and all figures are then wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError, shown
from core.models.identity import model_identity

NO_NAMES = ("local", "hub")  # of groups of the configuration, which older exports wrote as a model's name
SAME = {
    "gpt2small": "gpt2",
    "mistral7b": "mistral7bv01",
    "mistral7binstruct": "mistral7binstructv01",
}  # TransformerLens'


def check_model(stated: str | None, model: Mapping[str, Any] | None) -> None:
    """Raises UserError if the files name another model than the one in use, a node of the configuration as in
    conf/model. No check if one is None."""
    if stated is None or model is None or stated in NO_NAMES or _is_open(model):
        return
    name, at, digest = stated.rpartition("@")  # as an export names a model in a folder
    if at and (weights := model_identity(model).get("weights")):
        if not str(weights).startswith(digest):
            raise _wrong(stated, model)
        return
    stated = name if at else stated
    if _plain(stated) not in [_plain(name) for name in (str(model["source"]), str(model.get("name")))]:
        raise _wrong(stated, model)


def check_identity(trained: Mapping[str, Any], model: Mapping[str, Any] | None) -> None:
    """The same for a dictionary of ours; `trained` is the identity of the model in the store's specification."""
    if model is None or _is_open(model):
        return
    current = model_identity(model)
    if trained.keys() == current.keys() and trained.get("weights") != current.get("weights"):
        raise _wrong(f"a model in a folder, with weights {trained['weights']}", model)
    if {"source"} <= trained.keys() & current.keys() and trained["source"] != current["source"]:
        raise _wrong(str(trained["source"]), model)
    if isinstance(trained.get("source"), str) and "source" not in current:
        check_model(trained["source"], model)


def _is_open(model: Mapping[str, Any]) -> bool:
    return model.get("source") in (None, "???")


def _wrong(stated: str, model: Mapping[str, Any]) -> UserError:
    return UserError(
        f"model.source={shown(model['source'])}: the dictionary was trained on {shown(stated)}. Choose that model "
        "(model=...), or set method.model=null to use the dictionary with another all the same."
    )


def _plain(name: str) -> str:
    """The last part of a name or path, its letters and digits only."""
    plain = re.sub("[^a-z0-9]", "", Path(name).name.lower())
    return SAME.get(plain, plain)
