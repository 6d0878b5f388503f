"""What the metrics of Minder et al. 2025's experiments are compared with, where it follows from a cell's settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from reports.collect import Cell

METRICS = {"minder_planted": ("both_given_chat",)}


def derive(cells: Iterable[Cell]) -> list[Cell]:
    """The cells in their order.

    both_given_chat  how often a `sometimes` concept that is in the chat model is in the base model too
    """
    return [_with_share(cell) if cell.experiment == "minder_planted" else cell for cell in cells]


def _with_share(cell: Cell) -> Cell:
    p_both = cell.get("stream.p_both")
    if not isinstance(p_both, int | float):
        return cell
    return replace(cell, metrics={**cell.metrics, "both_given_chat": 2 * p_both / (1 + p_both)})
