"""Learning codes and dictionary together (O'Neill et al. 2025, sec. 4.3, fig. 4).

SAE, SAE with inference-time optimisation, MLP encoders and sparse coding on the same data: how well codes and
dictionary are recovered, against steps and against FLOPs, as the paper counts them and corrected. Claims:
oneill/unknown-*.
"""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.oneill.common import unknown
from experiments.oneill.settings import UnknownSettings

SETTINGS = UnknownSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """One coder, all seeds: MCC of latents and dictionary, loss and L0 along the training."""
    return unknown(cfg)
