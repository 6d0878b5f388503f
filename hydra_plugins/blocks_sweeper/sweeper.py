"""A grid written as a list of blocks, each a product of its axes; the cells are the union of the blocks.

A paper's grid is rarely one product: k varies at one dictionary size, the size varies at one k, and a third method has
a sparsity coefficient instead of k. Each such part is a block:

    hydra.sweeper.blocks:
      - {method: "topk,batchtopk", method.dict_size: "768,1536", method.k: 32}
      - {method: jumprelu, method.dict_size: 768, method.l0_coefficient: "0.1,0.2"}

A setting given on the command line narrows the grid. If blocks have it as an axis, the other blocks fall out, and of
those only the given values stay; values that are nowhere in the grid go to every block that has the axis (`seed=7`). A
setting that is no axis of any block holds in all cells (`method.lr=0.001`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from core.errors import UserError

Axis = list[str]  # one axis: ["key=value1", "key=value2"]


class BlocksSweeper(BasicSweeper):
    """The basic sweeper over a union of products. Raises UserError when the grid is empty."""

    def __init__(self, blocks: ListConfig | list[DictConfig], max_batch_size: int | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size, params={})
        self.blocks = blocks or [OmegaConf.create({})]

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.hydra_context is not None and self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        cells = cells_of(self.blocks, arguments, self.hydra_context.config_loader)
        results = self.launcher.launch(cells, initial_job_idx=0)
        for result in results:
            _ = result.return_value  # raises what the cell raised
        return [results]


def cells_of(
    blocks: Iterable[Mapping[str, Any]], arguments: Sequence[str], config_loader: ConfigLoader | None = None
) -> list[list[str]]:
    """The overrides of every cell, without repetitions, block after block. Raises UserError if there is none."""
    given = _axes(arguments, config_loader)
    parsed = [_axes([f"{key}={value}" for key, value in block.items()], config_loader) for block in blocks]
    cells = {cell: None for block in narrowed(parsed, given) for cell in product(*block.values())}
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
