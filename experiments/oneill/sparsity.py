"""Sparsity against reconstruction and recovery (O'Neill et al. 2025, fig. 6): L1 penalties and TopK.

The headline figures use a penalty of 0.01; the best recovery lies elsewhere. Claims: oneill/sparsity-*.
"""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.oneill.common import unknown
from experiments.oneill.settings import StackSettings

SETTINGS = StackSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """One coder, all penalties (or all k) and seeds in one stack."""
    return unknown(cfg)
