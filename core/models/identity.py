"""The part of `model` that goes into content keys: what decides the model's activations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from core.models.loading import SHIPPED


def model_identity(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Source, revision and dtype. For a folder, the hash of its weights replaces source and revision."""
    folder = SHIPPED.get(cfg["source"], Path(cfg["source"]).expanduser())
    if folder.is_dir():
        return {"weights": _folder_hash(folder), "dtype": cfg["dtype"]}
    return {"source": cfg["source"], "revision": cfg["revision"], "dtype": cfg["dtype"]}


@cache
def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]
