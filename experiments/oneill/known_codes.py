"""Learning to infer known sparse codes (O'Neill et al. 2025, sec. 4.1, fig. 2).

An SAE's encoder and MLPs of growing width are trained on the codes themselves, so that only the form of the encoder
limits them. Claims: oneill/codes-*.
"""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.oneill.common import known_codes
from experiments.oneill.settings import StackSettings

SETTINGS = StackSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """One encoder, all seeds: MCC with the true codes on held-out samples against steps and FLOPs."""
    return known_codes(cfg)
