"""Run an experiment: `python run.py experiment=leask_batchtopk [scale=smoke|demo|paper] [key=value ...] [-m]`.

Without arguments this lists the experiments. A finished cell is skipped unless `force=true`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"


def list_experiments() -> str:
    """One line per experiment: its name and the first comment of its YAML."""
    lines = [__doc__.splitlines()[0] if __doc__ else "", ""]
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
        title = next((comment for comment in comments if not comment.startswith("@package")), "")
        lines.append(f"  {path.stem:24} {title}")
    return "\n".join(lines)


def task(cfg: DictConfig) -> None:
    """Run one cell in the folder that Hydra made for it."""
    from hydra.core.hydra_config import HydraConfig

    run_cell(cfg, Path(HydraConfig.get().runtime.output_dir))


def run_cell(cfg: DictConfig, folder: Path) -> None:
    """Run one composed cell: skip it if finished, seed, call the experiment's module, write results.json."""
    from importlib import import_module

    import torch

    from core import preflight, results

    preflight.check([cfg])
    if not cfg.force and results.is_finished(folder, cfg):
        print(f"already finished, skipped: {folder}", file=sys.stderr)
        return
    torch.manual_seed(cfg.seed)
    module = import_module(cfg.module)
    cfg.cell_folder = str(folder)
    results.run_cell(cfg, folder, module.run)
    print(f"finished: {folder / results.RESULTS}", file=sys.stderr)


def main() -> int:
    """Let Hydra run the command line. SIGINT and SIGTERM end the run at any point; finished work is kept."""
    from core.interrupts import Interrupted, handled_by, stop_at_once

    try:
        with handled_by(stop_at_once):
            return run_hydra()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code


def run_hydra() -> int:
    """Compose and run all cells. An error that the user can fix is printed without a traceback."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from core.cells import cell_name
    from core.errors import NonFiniteLoss, UserError
    from core.interrupts import raise_if_interrupted

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors are raised here instead of ending the process
    OmegaConf.register_new_resolver("cell", cell_name, replace=True)
    fixable = (UserError, NonFiniteLoss, FloatingPointError, OSError, HydraException, OmegaConfBaseException)
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except Exception as error:
        raise_if_interrupted(error)
        if not isinstance(error, fixable):
            raise
        cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        print(f"error: {error}{cause}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(list_experiments())
        sys.exit(0)
    sys.exit(main())
