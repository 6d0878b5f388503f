"""Settings are checked when a run starts: each one alone, all together, and every leaf of every experiment."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf

from core import preflight
from core.errors import UserError
from tests.composing import CONF, composed

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
VALUES: list[Any] = [None, "abc", -1, 0, 1.5, "nan", [], {}, 1e30, True]
MORE: list[Any] = [
    "",
    2**64,
    float("inf"),
    float("-inf"),
    [None],
    [-1],
    {"a": 1},
    "0",
    "1e8",
    "???",
    "${nothing}",
    10**400,
]


@cache
def base(name: str) -> DictConfig:
    """An experiment's first smoke cell."""
    from hydra_plugins.blocks_sweeper.sweeper import cells_of

    cfg = composed(f"experiment={name}", "scale=smoke")
    grid = cfg.grid.get("smoke")
    return composed(f"experiment={name}", "scale=smoke", *(cells_of(grid, [])[0] if grid else []))


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The names of all settings that are no groups. Of the table of scales those of smoke; no grid."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        name = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}" if path else str(key)
        child = node._get_node(key)
        if name == "grid" or (path.startswith("at.") and path.count(".") == 1 and key in ("paper", "demo")):
            continue
        group = isinstance(child, DictConfig | ListConfig) and not child._is_interpolation() and not child._is_none()
        if group and len(child):
            yield from leaves(child, name)
        else:
            yield name


@contextmanager
def changed(cfg: DictConfig, name: str, value: Any) -> Iterator[DictConfig]:
    """The configuration with another value, while the block runs."""
    parts = re.findall(r"[^.\[\]]+", name)
    parent: Any = cfg
    for part in parts[:-1]:
        parent = parent._get_node(int(part) if isinstance(parent, ListConfig) else part)
    key: Any = int(parts[-1]) if isinstance(parent, ListConfig) else parts[-1]
    content = parent.__dict__["_content"]
    before = content[key]
    content[key] = deepcopy(before)  # which an update changes
    try:
        OmegaConf.update(cfg, name, value, merge=False)
        yield cfg
    finally:
        content[key] = before


@cache
def places() -> list[tuple[str, str]]:
    """(experiment, leaf): every leaf once, with the first experiment that has it."""
    first: dict[str, str] = {}
    for name in EXPERIMENTS:
        for leaf in leaves(base(name)):
            first.setdefault(leaf, name)
    return [(name, leaf) for leaf, name in first.items()]


def refused_without_its_name(name: str, leaf: str, value: Any) -> str | None:
    """The message of a check that refuses a value of a setting without naming it. None if it passes, or is refused as
    it should be. Anything but a UserError is raised."""
    try:
        with changed(base(name), leaf, value) as cfg:
            preflight.check([cfg])
    except UserError as error:
        key = leaf.partition("[")[0]
        named = key.split(".")[1] if key.startswith("at.") else key
        return None if named in str(error) else f"{name} {leaf}={value!r}: {error}"
    return None


@pytest.mark.parametrize("part", range(4))
def test_every_setting_of_every_experiment_is_right_or_refused_by_name(part: int):
    """Each leaf with one of the values, so that every value meets many leaves."""
    wrong = [
        refused_without_its_name(name, leaf, VALUES[number % len(VALUES)])
        for number, (name, leaf) in list(enumerate(places()))[part::4]
    ]
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES + MORE, ids=lambda value: repr(value)[:12])
def test_every_setting_takes_or_refuses_a_value_of_every_kind(value: Any):
    wrong = [refused_without_its_name(name, leaf, value) for name, leaf in places()]
    assert not any(wrong), "\n".join(filter(None, wrong))
