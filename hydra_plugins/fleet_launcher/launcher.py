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
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, open_dict

from core import results
from core.errors import UserError


class FleetLauncher(BasicLauncher):
    """Runs the cells in this process after a prefetch. Raises UserError at the end if cells failed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        pending = self._pending(job_overrides)
        print(f"{len(job_overrides)} cells, {len(pending)} to run", file=sys.stderr)
        self._prefetch(pending)
        returns: list[JobReturn] = []
        with cells_bar(len(job_overrides)) as advance:
            for index, overrides in enumerate(job_overrides, initial_job_idx):
                returns += super().launch([overrides], index)
                advance()
        failed = [r for r in returns if r.status != JobStatus.COMPLETED]
        if failed:
            raise CellsFailedError(len(returns), failed)
        return returns

    def _pending(self, job_overrides: Sequence[Sequence[str]]) -> list[DictConfig]:
        """The configurations of the cells that are not finished yet."""
        assert self.hydra_context is not None and self.config is not None
        pending = []
        for index, overrides in enumerate(job_overrides):
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = index
            HydraConfig.instance().set_config(cfg)  # the folder's name is made from the cell's own overrides
            folder = Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir
            with open_dict(cfg):
                del cfg["hydra"]
            if cfg.force or not results.is_finished(folder, cfg):
                pending.append(cfg)
        return pending

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
