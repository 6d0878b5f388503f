"""A callback of Hydra that leaves the folder of a finished cell alone: it may lie on a disk that is read-only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from core import results


class LeaveFinishedCell(Callback):
    """Before a single cell runs (sweeps have the launcher): if it is finished, Hydra writes no record and no log."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        HydraConfig.instance().set_config(config)  # the folder's name is made from the overrides
        cfg = config.copy()
        with open_dict(cfg):
            del cfg["hydra"]
        try:
            finished = not cfg.force and results.is_finished(Path(config.hydra.run.dir).absolute(), cfg)
        except OmegaConfBaseException:  # the run itself raises it
            return
        if finished:
            with read_write(config.hydra), open_dict(config.hydra):
                config.hydra.output_subdir = None
                config.hydra.job_logging = OmegaConf.create({"root": None})
