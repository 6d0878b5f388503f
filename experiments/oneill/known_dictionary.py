"""Inferring codes under the true dictionary (O'Neill et al. 2025, sec. 4.2, fig. 3).

Encoders are trained on reconstruction and L1; inference-time optimisation (ITO) needs no training; converged LASSO,
NNLS and an exhaustive L0 search bound what inference can reach. Claims: oneill/dictionary-*.
"""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.oneill.common import known_dictionary
from experiments.oneill.settings import StackSettings

SETTINGS = StackSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """One encoder or solver, all seeds: MCC with the true codes against steps and FLOPs."""
    return known_dictionary(cfg)
