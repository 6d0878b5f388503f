"""The default launcher of sweeps: compose every cell, train missing dictionaries together, run the cells one by one.

Composing all cells first finds a misspelt key before hours are spent. Training first is only a prefetch: a cell never
depends on it, since `load_or_train` trains what it does not find.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from omegaconf import DictConfig, open_dict

from core import results
from core.errors import UserError
from core.interrupts import raise_if_interrupted


class FleetLauncher(BasicLauncher):
    """Runs the cells in this process after a prefetch. Raises UserError at the end if cells failed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        cells = self._compose(job_overrides, initial_job_idx)
        pending = [cfg for cfg in map(self._pending, cells) if cfg is not None]
        print(f"{len(cells)} cells, {len(pending)} to run", file=sys.stderr)
        self._prefetch(pending)
        returns: list[JobReturn] = []
        with cells_bar(len(cells)) as advance:
            for cell in cells:
                returns.append(self._run(cell))
                advance()
        failed = [r for r in returns if r.status != JobStatus.COMPLETED]
        if failed:
            raise CellsFailedError(len(returns), failed)
        return returns

    def _compose(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[DictConfig]:
        """The configuration of every cell, Hydra's own node included. Composing one takes a fifth of a second, so it is
        done once."""
        assert self.hydra_context is not None and self.config is not None
        cells = []
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            cell = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cell):
                cell.hydra.job.id = cell.hydra.job.num = index
            cells.append(cell)
        return cells

    @staticmethod
    def _pending(cell: DictConfig) -> DictConfig | None:
        """The configuration as the experiment will see it, if the cell is not finished yet."""
        HydraConfig.instance().set_config(cell)  # the folder's name is made from the cell's own overrides
        folder = Path(cell.hydra.sweep.dir) / cell.hydra.sweep.subdir
        cfg = cell.copy()
        with open_dict(cfg):
            del cfg["hydra"]
        return None if results.is_finished(folder, cfg) and not cfg.force else cfg

    def _run(self, cell: DictConfig) -> JobReturn:
        assert self.hydra_context is not None and self.config is not None and self.task_function is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        job = run_job(
            task_function=self.task_function,
            config=cell,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self.hydra_context,
        )
        if job.status != JobStatus.COMPLETED:
            raise_if_interrupted(job._return_value)
        return job

    @staticmethod
    def _prefetch(pending: list[DictConfig]) -> None:
        if not pending:
            return
        module = import_module(f"experiments.{pending[0].name}")
        if not hasattr(module, "dictionaries"):
            return
        from core.fleet import prefetch

        prefetch([request for cfg in pending for request in module.dictionaries(cfg)], pending[0])


@contextmanager
def cells_bar(n_cells: int) -> Iterator[Callable[[], None]]:
    """A bar over cells on a terminal, with the time left; calling what it yields moves it on. Nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("cells", total=n_cells)
        yield lambda: bar.advance(task)


class CellsFailedError(UserError):
    """Names every failed cell with its error; the whole traceback of each is in its failed.json."""

    def __init__(self, n_cells: int, failed: Sequence[JobReturn]) -> None:
        lines = []
        for job in failed:
            error = job._return_value
            name = " ".join(job.overrides or ())
            lines.append(f"  {name}\n    {type(error).__name__}: {error}")
        super().__init__(
            f"{len(failed)} of {n_cells} cells failed (see failed.json in their folders):\n" + "\n".join(lines)
        )
