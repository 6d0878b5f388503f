"""The default launcher of sweeps: compose every cell, train missing dictionaries together, run the cells.

Composing all cells first finds a misspelt key before hours are spent. Training first is only a prefetch: no cell
depends on it, since `load_or_train` trains what is missing. The cells then run one by one in this process, or in
`trainer.cell_processes` processes, each of which takes one cell after another.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import TaskFunction
from omegaconf import DictConfig, open_dict

from core import results
from core.errors import UserError
from core.interrupts import raise_if_interrupted

RUN_CELL = "run:run_cell"  # the same function runs a cell in this process and in another


@dataclass(frozen=True)
class PendingCell:
    """A cell that is not finished: the configuration that the experiment will get, and the cell's folder."""

    cfg: DictConfig
    folder: Path


class FleetLauncher(BasicLauncher):
    """Runs the cells after a prefetch. Raises CellsFailedError at the end if some cells failed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from core import preflight

        setup_globals()
        cells = self._compose(job_overrides, initial_job_idx)
        folders = [_folder(cell) for cell in cells]
        refuse_shared_folders(folders, job_overrides)
        preflight.check(cells)
        found = enumerate(map(_pending, cells, folders))
        pending = {index: cell for index, cell in found if cell is not None}
        n_processes = _n_processes([cell.cfg for cell in pending.values()])
        at_a_time = f", {n_processes} at a time" if n_processes > 1 else ""
        print(f"{len(cells)} cells, {len(pending)} to run{at_a_time}", file=sys.stderr)
        self._prefetch([cell.cfg for cell in pending.values()])
        with cells_progress(len(pending)) as advance:
            if n_processes > 1:
                outcomes = run_in_processes(list(pending.values()), n_processes, advance)
                by_cell = dict(zip(pending, outcomes, strict=True))
                tasks = [replay(by_cell[index]) if index in by_cell else None for index in range(len(cells))]
                returns = [
                    self._run(cell, task) if task else skipped(cell, folder)
                    for cell, folder, task in zip(cells, folders, tasks, strict=True)
                ]
            else:
                returns = []
                for index, cell in enumerate(cells):
                    if index not in pending:
                        returns.append(skipped(cell, folders[index]))
                        continue
                    returns.append(self._run(cell))
                    advance()
        failed = [r for r in returns if r.status != JobStatus.COMPLETED]
        if failed:
            raise CellsFailedError(len(returns), failed)
        return returns

    def _compose(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[DictConfig]:
        """The configuration of every cell, with Hydra's own node. Done once, since one cell takes 0.2 s."""
        assert self.hydra_context is not None and self.config is not None
        cells = []
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            cell = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cell):
                cell.hydra.job.id = cell.hydra.job.num = index
            cells.append(cell)
        return cells

    def _run(self, cell: DictConfig, task: TaskFunction | None = None) -> JobReturn:
        """Run a cell as a Hydra job: the usual task, or the given one instead."""
        assert self.hydra_context is not None and self.config is not None and self.task_function is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        job = run_job(
            task_function=task or self.task_function,
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
        module = import_module(pending[0].module)
        if not hasattr(module, "dictionaries"):
            return
        from core.fleet import prefetch, prefetch_rounds
        from core.runtime import Runtime

        run = Runtime.of(pending[0])
        prefetch([request for cfg in pending for request in module.dictionaries(cfg)], run)
        if hasattr(module, "later_dictionaries"):
            prefetch_rounds([module.later_dictionaries(cfg) for cfg in pending], run)


def _folder(cell: DictConfig) -> Path:
    HydraConfig.instance().set_config(cell)  # the folder's name is made from the cell's own overrides
    return (Path(cell.hydra.sweep.dir) / cell.hydra.sweep.subdir).absolute()


def _pending(cell: DictConfig, folder: Path) -> PendingCell | None:
    """The cell to run, or None if it is finished."""
    cfg = cell.copy()
    with open_dict(cfg):
        del cfg["hydra"]
    return None if not cfg.force and results.is_finished(folder, cfg) else PendingCell(cfg, folder)


def refuse_shared_folders(folders: Sequence[Path], cells: Sequence[Sequence[str]]) -> None:
    """Raises UserError if two cells would write to one folder, also on a disk that takes `A` and `a` for the same."""
    seen: dict[str, int] = {}
    for index, folder in enumerate(folders):
        name = unicodedata.normalize("NFC", str(folder)).casefold() if ignores_case(folder) else str(folder)
        first = seen.setdefault(name, index)
        if first != index:
            one, other = (
                " ".join(o for o in cells[a] if o not in cells[b]) or "the same settings"
                for a, b in ((first, index), (index, first))
            )
            raise UserError(
                f"Two cells of this sweep have one folder, {folder}: the one with {one}, and the one with {other}. "
                "If that changes no number, give one value; else run them one after another, each with an output_dir "
                "of its own."
            )


def ignores_case(folder: Path) -> bool:
    """Whether the disk that holds a folder takes upper and lower case for the same."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    other = there.with_name(there.name.swapcase()) if there.name else there
    return other != there and other.exists() and other.samefile(there)


def skipped(cell: DictConfig, folder: Path) -> JobReturn:
    """What a finished cell returns. Nothing is written, so the disk may be read-only."""
    print(f"already finished, skipped: {folder}", file=sys.stderr)
    return JobReturn(overrides=list(cell.hydra.overrides.task), status=JobStatus.COMPLETED)


def _n_processes(pending: Sequence[DictConfig]) -> int:
    if not pending or pending[0].trainer.cell_processes == 1:
        return 1
    from core.shares import number_of_cell_processes

    return number_of_cell_processes(pending[0].trainer.cell_processes, len(pending))


def run_in_processes(cells: Sequence[PendingCell], n_processes: int, advance: Callable[[], None]) -> list[Any]:
    """For every cell None, or the exception that ended it. Cells start in order. If a cell's process dies, failed.json
    is written from here."""
    from core.shares import slots
    from core.workers import Task, WorkerDiedError, run_tasks

    started = results.Moment.now()

    def on_end(index: int, outcome: Any) -> None:
        if isinstance(outcome, WorkerDiedError):
            results.record_failure(cells[index].cfg, cells[index].folder, outcome, started)
        advance()

    tasks = [Task(cell.folder.name, RUN_CELL, (cell.cfg, cell.folder)) for cell in cells]
    return run_tasks(tasks, slots(n_processes, cells[0].cfg.trainer.accelerator), on_end=on_end)


def replay(outcome: Exception | None) -> TaskFunction:
    """A task that ends in the same way as the cell did in another process."""

    def task(cfg: DictConfig) -> None:
        if outcome is not None:
            raise outcome

    return task


@contextmanager
def cells_progress(n_cells: int) -> Iterator[Callable[[], None]]:
    """Show how many cells are done and the time left: as a bar on a terminal, else as one line per cell. Yields the
    function to call after each cell."""
    if not sys.stderr.isatty():
        yield cell_lines(n_cells)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("cells", total=n_cells)
        yield lambda: bar.advance(task)


def cell_lines(n_cells: int) -> Callable[[], None]:
    """Returns a function that prints how many cells are done and the time left at the mean rate so far."""
    started, done = time.monotonic(), 0

    def advance() -> None:
        nonlocal done
        done += 1
        seconds_left = (time.monotonic() - started) / done * (n_cells - done)
        print(f"{done} of {n_cells} cells, {seconds_left:,.0f} s left", file=sys.stderr, flush=True)

    return advance


class CellsFailedError(UserError):
    """Lists every failed cell with its error. Each cell's failed.json has the traceback."""

    def __init__(self, n_cells: int, failed: Sequence[JobReturn]) -> None:
        lines = []
        for job in failed:
            error = job._return_value
            name = " ".join(job.overrides or ())
            lines.append(f"  {name}\n    {type(error).__name__}: {error}")
        super().__init__(
            f"{len(failed)} of {n_cells} cells failed (see failed.json in their folders):\n" + "\n".join(lines)
        )
