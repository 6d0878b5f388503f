"""Read the results of experiments: finished cells, failed ones, and the number of cells in a grid.

A cell's folder may hold many runs (runs.parquet, one row for each). Then every run is a `Cell` of its own. Results kept
in the repository are used for cells that the outputs lack.
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
OF_THE_CELL = ("seconds", "peak_extra_gb")  # metrics of a whole cell, which each of its runs gets
PRETRAINED = "Pretrained"  # the method of all dictionaries of `method=pretrained`
READERS = "core.interop."  # prefix of the functions that read them
METRIC = "metrics."  # prefix of metrics among a cell's keys and among the columns of runs.parquet
CONF = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Cell:
    """One finished cell, or one run of a cell that holds many. Runs of one cell share its folder.

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
        """`coder.name` if there is one, else the name of the method's class, such as `BatchTopK`. All dictionaries that
        were read from files are called `Pretrained`."""
        if name := self.settings.get("coder.name"):
            return str(name)
        target = self.settings.get("method._target_")
        if str(target).startswith(READERS):
            return PRETRAINED
        return str(target).rpartition(".")[2] if target else None

    def has(self, key: str) -> bool:
        """Whether the cell has this key. A setting whose value is null counts."""
        return key in self.settings or self.get(key) is not None

    def get(self, key: str) -> Any:
        """The value of `method`, of a metric (`metrics.<name>`) or of a setting; None if the cell has no such key."""
        if key == "method":
            return self.method
        if key.startswith(METRIC):
            return self.metrics.get(key.removeprefix(METRIC))
        return self.settings.get(key)


@dataclass(frozen=True)
class Failure:
    """One cell whose latest run ended in an error. `later_than_results`: an earlier run left results."""

    experiment: str
    scale: str
    folder: Path
    error: str
    message: str
    later_than_results: bool


def read_cells(outputs: Path) -> list[Cell]:
    """Every finished cell below the folder. A cell that holds many runs gives one `Cell` for each."""
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
    """The cells of `outputs`, and the kept cells that neither finished nor failed there."""
    cells = read_cells(outputs)
    ended = {*map(_place, cells), *map(_place, read_failures(outputs))}
    kept_cells = read_cells(kept) if kept else []
    return cells + [replace(cell, kept=True) for cell in kept_cells if _place(cell) not in ended]


def one_per_folder(cells: Iterable[Cell]) -> list[Cell]:
    """The first run of every folder, so that each cell counts once."""
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
    """The number of cells in the experiment's grid at this scale; None without a YAML of that name."""
    from hydra_plugins.blocks_sweeper.sweeper import cells_of

    path = conf / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        return None
    blocks = OmegaConf.select(OmegaConf.load(path), f"grid.{scale}")
    return len(cells_of(blocks or [{}], []))


def deviations(experiment: str, conf: Path = CONF) -> list[str]:
    """The `# deviations:` comments of an experiment's YAML; an indented comment line continues the line above."""
    path = conf / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        return []
    notes: list[str] = []
    continues = False
    for line in path.read_text().splitlines():
        if line.startswith("# deviations:"):
            notes.append(line.removeprefix("# deviations:").strip())
            continues = True
        elif continues and line.startswith("#  "):
            notes[-1] += f" {line[1:].strip()}"
        else:
            continues = False
    return notes


def _place(one: Cell | Failure) -> tuple[str, str, str]:
    return one.experiment, one.scale, one.folder.name


def _runs(cell: Cell) -> list[Cell]:
    """One cell for each row of runs.parquet: its settings over the configuration's, its own metrics.

    The cell's own metrics are means over its runs, and are dropped except `OF_THE_CELL`. An empty entry of a metric
    means that the run lacks it. An empty entry of a setting means null if the configuration has the setting, else that
    the run lacks it.
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
