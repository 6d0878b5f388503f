"""From a node of the configuration to the object that it describes: the one place that calls Hydra's `instantiate`."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from core.errors import UserError


def plain(node: Any) -> Any:
    """A part of the configuration without interpolations, as JSON can hold it."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def build(node: Any, **given: Any) -> Any:
    """The object that a node describes, with further arguments. A UserError of its class is raised as it is, not inside
    Hydra's "Error in call to target"."""
    try:
        return instantiate(plain(node), **given)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from cause.__cause__
        raise
