"""Where sparse coding beats amortised encoders (O'Neill et al. 2025, fig. 5): a grid over N, M and K.

Cells with M < K log(N / K) are beyond what compressed sensing promises. Claims: oneill/regimes-*.
"""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.oneill.common import unknown
from experiments.oneill.settings import StackSettings

SETTINGS = StackSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """One coder at one (N, M, K), all seeds, each with its own data."""
    return unknown(cfg)
