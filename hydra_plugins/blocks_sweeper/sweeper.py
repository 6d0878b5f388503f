"""A grid written as a list of blocks, each a product of its axes; the cells are the union of the blocks.

A paper's grid is rarely one product: k varies at one dictionary size, the size varies at one k, and another method has
a sparsity coefficient instead of k. Each of these parts is a block:

    hydra.sweeper.blocks:
      - {method: "topk,batchtopk", method.dict_size: "768,1536", method.k: 32}
      - {method: jumprelu, method.dict_size: 768, method.l0_coefficient: "0.1,0.2"}

YAML anchors and merge keys (`<<: *shared`) can share settings between blocks.

A setting on the command line narrows the grid. If it is an axis of some blocks, only these blocks stay, with only the
given values. A value that no block has goes to every block that has the axis (`seed=7`). A setting that is no axis of
any block applies to all cells (`method.lr=0.001`).

An assignment listed in `hydra.sweeper.alone` ignores a grid that does not name it (`method=pretrained`: a dictionary
that is read has no size or sparsity to vary). On the command line it runs the experiment's own settings without the
grid, once for every combination of the given values.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, ListConfig, OmegaConf

from core.atomic import write_atomically
from core.errors import UserError

Axis = list[str]  # one axis: ["key=value1", "key=value2"]


class BlocksSweeper(BasicSweeper):
    """The basic sweeper, over a union of products. Raises UserError for an empty grid, or one that does not fit."""

    def __init__(
        self, blocks: ListConfig | list[DictConfig], alone: Sequence[str] = (), max_batch_size: int | None = None
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, params={})
        self.blocks, self.alone = blocks or [OmegaConf.create({})], tuple(alone)

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.hydra_context is not None and self.launcher is not None
        record(self.config, Path(self.config.hydra.sweep.dir) / "multirun.yaml")
        cells = cells_of(self.blocks, arguments, self.hydra_context.config_loader, self.alone)
        try:
            results = self.launcher.launch(cells, initial_job_idx=0)
        except ConfigCompositionException as error:
            raise self._explained(error, arguments) from error
        for result in results:
            _ = result.return_value  # raises what the cell raised
        return [results]

    def _explained(self, error: ConfigCompositionException, arguments: Sequence[str]) -> Exception:
        """The error itself, or an explanation if it is about a setting of the grid and not of the command line."""
        named = re.search(r"'([\w./@]+)'", str(error))
        key = named[1] if named else ""
        if key in _axes(arguments, None) or not any(key in block for block in self.blocks):
            return error
        chosen = [word for word in arguments if word.startswith(f"{key.split('.')[0]}=")] or arguments
        return UserError(
            f"{key} is set by the experiment's grid, but there is no such setting with {' '.join(chosen)}. "
            "hydra.mode=RUN runs without the grid: the experiment's own settings, with yours."
        )


def record(config: DictConfig, path: Path) -> None:
    """Write the sweep's configuration, for people. A disk that refuses is reported: if all cells are finished, nothing
    else is written."""
    try:
        write_atomically(path, OmegaConf.to_yaml(config))
    except OSError as error:
        print(f"the sweep's configuration is not recorded: {error}", file=sys.stderr)


def cells_of(
    blocks: Iterable[Mapping[str, Any]],
    arguments: Sequence[str],
    config_loader: ConfigLoader | None = None,
    alone: Sequence[str] = (),
) -> list[list[str]]:
    """The overrides of every cell, block after block, without repetitions. Raises UserError if there is none."""
    is_list = isinstance(blocks, Iterable) and not isinstance(blocks, str | Mapping)
    if not is_list or not all(isinstance(block, Mapping) for block in blocks):
        raise UserError(f"grid: {blocks!r} must be a list of blocks, each a group of settings and their values.")
    given = _axes(arguments, config_loader)
    parsed = [_axes([f"{key}={value}" for key, value in block.items()], config_loader) for block in blocks]
    within, without = split_alone(parsed, given, alone)
    chosen = [*(narrowed(parsed, within) if within is not None else []), *([without] if without is not None else [])]
    cells = {cell: None for block in chosen for cell in product(*block.values())}
    if not cells:
        raise UserError(f"The grid has no cell with {' '.join(arguments)}: see `grid` in the experiment's YAML.")
    return [list(cell) for cell in cells]


def _axes(overrides: Sequence[str], config_loader: ConfigLoader | None) -> dict[str, Axis]:
    parser = OverridesParser.create(config_loader=config_loader)
    axes: dict[str, Axis] = {}
    for override in parser.parse_overrides(list(overrides)):
        [cells] = BasicSweeper.split_arguments([override], None)
        axes[override.get_key_element()] = [assignment for [assignment] in cells]
    return axes


def split_alone(
    blocks: Sequence[Mapping[str, Axis]], given: Mapping[str, Axis], alone: Sequence[str]
) -> tuple[dict[str, Axis] | None, dict[str, Axis] | None]:
    """The settings given for the grid, and those that run without it (see the head of this file); either can be
    None."""
    apart = {value for value in alone if not any(value in axis for block in blocks for axis in block.values())}
    if not any(value in apart for axis in given.values() for value in axis):
        return dict(given), None
    without = {key: [v for v in values if v in apart] or values for key, values in given.items()}
    within = {key: [v for v in values if v not in apart] for key, values in given.items()}
    return (within if all(within.values()) else None), without


def narrowed(blocks: list[dict[str, Axis]], given: dict[str, Axis]) -> list[dict[str, Axis]]:
    """The blocks under the axes given on the command line (see the head of this file)."""
    axes = {key for block in blocks for key in block}
    for key, values in given.items():
        having = [block for block in blocks if key in block or key not in axes]
        new = [value for value in values if not any(value in block.get(key, ()) for block in having)]
        kept = []
        for block in having:
            own = [value for value in values if value in new or value in block.get(key, ())]
            if own:
                kept.append({**block, key: own})
        blocks = kept
    return blocks
