"""Run an experiment: `python run.py experiment=leask_batchtopk [scale=smoke|demo|paper] [key=value ...] [-m]`.

Without arguments this lists the experiments. A finished cell is skipped unless `force=true`.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # until the handlers stand, and after them, a signal ends the process without a traceback
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)

import atexit
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"
ADDRESS_SPACE_BYTES = 1_500_000_000  # that the libraries take before anything is read


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


def memory_limit() -> str | None:
    """What to say if `ulimit -v` is so low that the libraries cannot even be loaded, which ends some of them hard."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or limit >= ADDRESS_SPACE_BYTES:
        return None
    return (
        f"There is not enough memory: the limit of this process is {limit / 1e9:.2f} GB (`ulimit -v`), and PyTorch "
        f"alone takes {ADDRESS_SPACE_BYTES / 1e9:g} GB of addresses. Raise the limit: ulimit -v unlimited"
    )


def run_hydra() -> int:
    """Compose and run all cells. An error that the user can fix is printed without a traceback."""
    if too_little := memory_limit():
        print(f"error: {too_little}", file=sys.stderr)
        return 1
    from core.errors import lack_of_memory
    from core.interrupts import raise_if_interrupted

    try:
        run_command_line()
    except Exception as error:
        raise_if_interrupted(error)
        message = lack_of_memory(error) or message_of(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0


def run_command_line() -> None:
    """What Hydra makes of the command line. Errors of the cells are raised."""
    import hydra

    from core.cells import register_resolvers

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors are raised here instead of ending the process
    register_resolvers()
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()


def message_of(error: Exception) -> str | None:
    """What to print for an error that the user can fix; None for any other."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from core.atomic import file_of
    from core.errors import NonFiniteLoss, UserError
    from core.overrides import explained

    if (message := explained(error, sys.argv[1:], CONF)) is not None:
        return message
    if not isinstance(error, UserError | NonFiniteLoss | FloatingPointError | OSError | HydraException):
        if not isinstance(error, OmegaConfBaseException):
            return None
        if isinstance(error.__cause__, UserError):  # raised while an interpolation was resolved
            return str(error.__cause__)
    if isinstance(error, OSError) and error.filename is None and (file := file_of(error)):
        return f"{error}: {file}"
    cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return f"{error}{cause}"


def leave(code: int) -> NoReturn:
    """End the process. After a stop, at once: taking large libraries apart can take seconds."""
    if code > 128:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(list_experiments())
        sys.exit(0)
    leave(main())
