"""The appendix studies of O'Neill et al. 2025: MLP width, biases, Zipf codes, decoder geometry.

Each cell changes one thing in one of the three problems; `part` names the study. Claims: oneill/ablations-*.
"""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.oneill.common import TASKS
from experiments.oneill.settings import AblationSettings

SETTINGS = AblationSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """One coder in one study, all seeds."""
    return TASKS[cfg.task](cfg)
