"""Read what the experiments left behind: finished cells, failed ones, and how many the grid asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from core.results import FAILED, RESULTS, read_all

HISTOGRAM = "l0_histogram.parquet"
CONF = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Cell:
    """One finished cell. `settings` is its configuration with dotted keys (`method.k`); lists become text."""

    experiment: str
    scale: str
    seed: int
    folder: Path
    metrics: Mapping[str, float]
    settings: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def method(self) -> str | None:
        """The name of the method's class: `BatchTopK`."""
        target = self.settings.get("method._target_")
        return str(target).rpartition(".")[2] if target else None

    def get(self, key: str) -> Any:
        """`method` (its class), a metric as `metrics.<name>`, or a setting; None where the cell has no such thing."""
        if key == "method":
            return self.method
        if key.startswith("metrics."):
            return self.metrics.get(key.removeprefix("metrics."))
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
    """Every finished cell below the folder."""
    cells = []
    for folder, record in read_all(outputs, RESULTS):
        metrics = {**record["metrics"], **_l0_range(folder / HISTOGRAM)}
        cells.append(
            Cell(
                experiment=record["experiment"],
                scale=record["scale"],
                seed=record["seed"],
                folder=folder,
                metrics=metrics,
                settings=dict(_flat(record["config"])),
                record={key: value for key, value in record.items() if key not in ("metrics", "config")},
            )
        )
    return cells


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
