"""Read what the experiments left behind: finished cells, failed ones, and how many the grid asks for.

A cell's folder may hold many runs (runs.parquet, one row for each): then every run counts as a `Cell` of its own.
Results that are kept in the repository stand in for cells that are nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from core.results import FAILED, RESULTS, read_all

HISTOGRAM = "l0_histogram.parquet"
RUNS = "runs.parquet"
KEPT = Path(__file__).parent / "results"
OF_THE_CELL = ("seconds", "peak_extra_gb")  # metrics that every run has from its cell
PRETRAINED = "Pretrained"  # what dictionaries of `method=pretrained` are called, whatever they are
READERS = "core.interop."  # what the names of the functions that read them begin with
METRIC = "metrics."  # what the names of metrics begin with, among a cell's keys and the columns of runs.parquet
CONF = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Cell:
    """One finished cell, or one run of a cell that holds many: those share their folder.

    `settings` is the configuration with dotted keys (`method.k`); lists become text. `kept`: read from the repository.
    """

    experiment: str
    scale: str
    seed: int
    folder: Path
    metrics: Mapping[str, float]
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    kept: bool = False

    @property
    def method(self) -> str | None:
        """`coder.name` where there is one, else the name of the method's class: `BatchTopK`; of a dictionary that was
        read, whatever it is, `Pretrained`."""
        if name := self.settings.get("coder.name"):
            return str(name)
        target = self.settings.get("method._target_")
        if str(target).startswith(READERS):
            return PRETRAINED
        return str(target).rpartition(".")[2] if target else None

    def has(self, key: str) -> bool:
        """Whether the cell knows this key; a setting that is null is known."""
        return key in self.settings or self.get(key) is not None

    def get(self, key: str) -> Any:
        """`method`, a metric as `metrics.<name>`, or a setting; None where the cell has no such thing."""
        if key == "method":
            return self.method
        if key.startswith(METRIC):
            return self.metrics.get(key.removeprefix(METRIC))
        return self.settings.get(key)


@dataclass(frozen=True)
class Failure:
    """One cell that ended in an error and has no results. `later_than_results`: it has, from an earlier run."""

    experiment: str
    scale: str
    folder: Path
    error: str
    message: str
    later_than_results: bool


def read_cells(outputs: Path) -> list[Cell]:
    """Every finished cell below the folder; those that hold many runs as one cell for each run."""
    cells = []
    for folder, record in read_all(outputs, RESULTS):
        cell = Cell(
            experiment=record["experiment"],
            scale=record["scale"],
            seed=record["seed"],
            folder=folder,
            metrics={**record["metrics"], **_l0_range(folder / HISTOGRAM)},
            settings=dict(_flat(record["config"])),
            record={key: value for key, value in record.items() if key not in ("metrics", "config")},
        )
        cells += _runs(cell) if (folder / RUNS).is_file() else [cell]
    return cells


def with_kept(outputs: Path, kept: Path | None) -> list[Cell]:
    """The cells of `outputs` and, for every cell that neither finished nor failed there, the kept one."""
    cells = read_cells(outputs)
    known = {*map(_place, cells), *map(_place, read_failures(outputs))}
    standing_in = read_cells(kept) if kept else []
    return cells + [replace(cell, kept=True) for cell in standing_in if _place(cell) not in known]


def one_per_folder(cells: Iterable[Cell]) -> list[Cell]:
    """The first run of every folder: cells as they were started and finished."""
    first: dict[Path, Cell] = {}
    for cell in cells:
        first.setdefault(cell.folder, cell)
    return list(first.values())


def read_failures(outputs: Path) -> list[Failure]:
    """Every failed.json below the folder."""
    return [
        Failure(
            experiment=record["experiment"],
            scale=record["scale"],
            folder=folder,
            error=record["error"],
            message=record["message"],
            later_than_results=(folder / RESULTS).is_file(),
        )
        for folder, record in read_all(outputs, FAILED)
    ]


def grid_size(experiment: str, scale: str, conf: Path = CONF) -> int | None:
    """How many cells the experiment's YAML asks for at this scale; None without such a YAML."""
    from hydra_plugins.blocks_sweeper.sweeper import cells_of

    path = conf / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        return None
    blocks = OmegaConf.select(OmegaConf.load(path), f"grid.{scale}")
    return len(cells_of(blocks or [{}], []))


def deviations(experiment: str, conf: Path = CONF) -> list[str]:
    """The `# deviations:` comments of an experiment's YAML; an indented comment line continues the one before it."""
    path = conf / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        return []
    found: list[str] = []
    continues = False
    for line in path.read_text().splitlines():
        if line.startswith("# deviations:"):
            found.append(line.removeprefix("# deviations:").strip())
            continues = True
        elif continues and line.startswith("#  "):
            found[-1] += f" {line[1:].strip()}"
        else:
            continues = False
    return found


def _place(found: Cell | Failure) -> tuple[str, str, str]:
    return found.experiment, found.scale, found.folder.name


def _runs(cell: Cell) -> list[Cell]:
    """One cell for each row of runs.parquet: its settings over the configuration's, its own metrics.

    The cell's metrics are means over its runs and left out, but for `OF_THE_CELL`. An empty entry is a metric that the
    run lacks, or a setting: null if the configuration has it, else unknown.
    """
    cells = []
    shared = {name: cell.metrics[name] for name in OF_THE_CELL if name in cell.metrics}
    for row in pq.read_table(cell.folder / RUNS).to_pylist():
        known = {key: value for key, value in _flat(row) if value is not None and value == value}
        emptied = {key: None for key in row.keys() - known.keys() if key in cell.settings}
        own = {key.removeprefix(METRIC): float(known.pop(key)) for key in list(known) if key.startswith(METRIC)}
        settings = {**cell.settings, **emptied, **known}
        cells.append(
            replace(cell, seed=int(known.get("seed", cell.seed)), metrics={**shared, **own}, settings=settings)
        )
    return cells


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, list) else value


def _l0_range(path: Path) -> dict[str, float]:
    """The lowest and highest per-token L0 that occurs in a histogram, where a cell has one."""
    if not path.is_file():
        return {}
    table = pq.read_table(path, columns=["l0", "count"])
    occurring = [l0 for l0, n in zip(table["l0"].to_pylist(), table["count"].to_pylist(), strict=True) if n > 0]
    return {"l0_lowest": float(min(occurring)), "l0_highest": float(max(occurring))} if occurring else {}
