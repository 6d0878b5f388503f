"""Composes configurations for tests, as run.py does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from core.cells import register_resolvers

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


@contextmanager
def composing() -> Iterator[None]:
    """Within, Hydra composes the configurations of this repository."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    """The configuration of `run.py <overrides>`; `hydra`: with Hydra's own node."""
    with composing():
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)
