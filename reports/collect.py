"""Read the results of experiments: finished cells, failed ones, and the number of cells in a grid.

A cell's folder may hold many runs (runs.parquet, one row for each). Then every run is a `Cell` of its own. Results kept
in the repository are used for cells that the outputs lack.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from core.atomic import NOT_A_LIST, damage
from core.errors import UserError
from core.reading import field, kind_of, optional_field, read_object, read_rows, read_table
from core.results import FAILED, RESULTS, SCALES
from reports.left_out import described, note
from reports.side_files import ALTERED, MAX_BYTES, SCALARS, SideTable

HISTOGRAM = SideTable("l0_histogram.parquet", {"l0": "filled", "count": "filled", "count_without_bos": "filled"})
RUNS = "runs.parquet"
ENDINGS = (".json", ".parquet")  # of the files beside results.json that the report reads
EXPERIMENT = re.compile(r"\w[\w.-]{0,99}")
MAX_RUNS = 20_000  # of a cell
MAX_DEPTH = 50  # of settings
MAX_RECORD_BYTES = 16 * 2**20  # of a results.json
MAX_FILES = 1000  # that a results.json lists
MAX_NAMED = 20  # metrics of one file that are named one by one
LARGEST_EXACT = 2**53  # a larger integer is a float to numpy in any case
CIRCUMSTANCES: Mapping[str, type] = {"commit": str, "device": str, "versions": dict}
NOT_RECORDED = "not recorded"
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
    """Every finished cell below the folder. A cell that holds many runs gives one `Cell` for each.

    One that cannot be read is left out and named (`reports.left_out`).
    """
    cells: list[Cell] = []
    for path in found(outputs, RESULTS):
        try:
            cells += _cells(path)
        except Exception as error:  # whatever a file holds
            note(path.parent, described(error))
    return cells


def _cells(path: Path) -> list[Cell]:
    """The runs of one cell. Raises UserError."""
    record, folder = _record(path), path.parent
    altered = _altered(optional_field(record, "files", dict, path) or {}, folder, path)
    config = field(record, "config", dict, path)
    for key, kind in CIRCUMSTANCES.items():
        optional_field(record, key, kind, path)
    cell = Cell(
        experiment=record["experiment"],
        scale=record["scale"],
        seed=field(record, "seed", int, path),
        folder=folder,
        metrics=_numbers(field(record, "metrics", dict, path), folder)
        | ({} if HISTOGRAM.name in altered else _l0_range(folder)),
        settings=dict(_flat(config, path)),
        record={
            **dict.fromkeys(CIRCUMSTANCES, NOT_RECORDED),
            "versions": {},
            "seconds": field(record, "seconds", float, path),
            ALTERED: altered,
            **{key: value for key, value in record.items() if key not in ("metrics", "config") and value is not None},
        },
    )
    if os.path.lexists(folder / RUNS):
        return _runs(cell)
    if isinstance(seeds := config.get("seeds"), list):
        raise UserError(f"{folder / RUNS} is missing. The cell's own metrics are means over its {len(seeds)} seeds.")
    return [cell]


def _altered(files: Mapping[str, Any], folder: Path, path: Path) -> frozenset[str]:
    """The tables that results.json lists, and that are missing or not those that the run wrote. They are left out and
    named. Raises UserError where the table of runs is one of them, and for a list that is none."""
    altered: dict[str, str] = {}
    if len(files) > MAX_FILES:
        raise UserError(f"{path} lists {len(files):,} files; a cell has at most {MAX_FILES:,}.")
    try:
        for name, entry in files.items():
            if Path(name).suffix in ENDINGS and (wrong := damage(folder, {name: entry})):
                altered[name] = wrong
    except (*NOT_A_LIST, OSError) as error:
        raise UserError(f"{path}: the list of files cannot be read ({type(error).__name__}).") from error
    if RUNS in altered:
        raise UserError(f"{folder}: {altered[RUNS]}.")
    for name, wrong in altered.items():
        note(folder / name, wrong)
    return frozenset(altered)


def _record(path: Path) -> dict[str, Any]:
    """What results.json or failed.json holds, if it names an experiment and a scale. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    if (n_bytes := path.stat().st_size) > MAX_RECORD_BYTES:
        raise UserError(f"{path} has {n_bytes:,} bytes; the report reads up to {MAX_RECORD_BYTES:,}.")
    record = read_object(path)
    experiment, scale = (field(record, key, str, path) for key in ("experiment", "scale"))
    if not EXPERIMENT.fullmatch(experiment):
        raise UserError(f"{path}: experiment is {kind_of(experiment)}, not a name of letters, digits, _, . and -.")
    if scale not in SCALES:
        raise UserError(f"{path}: scale is {kind_of(scale)}, not one of {', '.join(sorted(SCALES))}.")
    return record


def _numbers(metrics: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """The metrics that are finite numbers. The others are left out and named."""
    good = {name: value for name, value in metrics.items() if is_number(value)}
    _name_wrong({name: value for name, value in metrics.items() if name not in good}, folder)
    return {name: value if abs(value) < LARGEST_EXACT else float(value) for name, value in good.items()}


def _name_wrong(metrics: Mapping[str, Any], folder: Path) -> None:
    """Name the metrics that are no numbers, or how many there are of them."""
    if len(metrics) > MAX_NAMED:
        note(f"{len(metrics):,} metrics of {folder}", f"they are not finite numbers, such as {next(iter(metrics))}")
        return
    for name, value in metrics.items():
        note(f"the metric {name} of {folder}", f"it is {kind_of(value)}, not a finite number")


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def found(root: Path, name: str) -> list[Path]:
    """Everything of this name below a folder, in the order of paths. Links to folders are followed, each folder is
    entered once, and one that cannot be entered is left out and named."""
    paths: list[Path] = []
    entered: set[Path] = set()
    to_enter = [root]
    while to_enter:
        start = to_enter.pop(0)
        for folder, subfolders, files in os.walk(start, onerror=_not_entered):
            real = Path(os.path.realpath(folder))
            if real in entered:
                subfolders.clear()
                continue
            entered.add(real)
            subfolders[:] = [one for one in subfolders if not one.startswith(".")]  # half of an exchange (reports.keep)
            if name in files or name in subfolders:
                paths.append(Path(folder, name))
            links = [Path(folder, one) for one in sorted(subfolders) if Path(folder, one).is_symlink()]
            to_enter += [link for link in links if not _leads_above(link, root)]
    return sorted(paths)


def _not_entered(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        note(error.filename, error.strerror or error)


def _leads_above(link: Path, root: Path) -> bool:
    """Whether a link leads to the folder itself or to one above it, and so to nothing new."""
    if not Path(os.path.realpath(root)).is_relative_to(os.path.realpath(link)):
        return False
    note(link, "a link to a folder above it is not followed")
    return True


def with_kept(outputs: Path, kept: Path | None) -> list[Cell]:
    """The cells of `outputs`, and the kept cells that neither finished nor failed there."""
    cells = read_cells(outputs)
    ended = {*map(_place, cells), *map(_place, read_failures(outputs, cells))}
    kept_cells = read_cells(kept) if kept else []
    return cells + [replace(cell, kept=True) for cell in kept_cells if _place(cell) not in ended]


def one_per_folder(cells: Iterable[Cell]) -> list[Cell]:
    """The first run of every folder, so that each cell counts once."""
    first: dict[Path, Cell] = {}
    for cell in cells:
        first.setdefault(cell.folder, cell)
    return list(first.values())


def read_failures(outputs: Path, finished: Iterable[Cell] = ()) -> list[Failure]:
    """Every failed.json below the folder. `finished`: the cells that have results. One that cannot be read is left out
    and named."""
    folders = {cell.folder for cell in finished}
    failures = []
    for path in found(outputs, FAILED):
        try:
            record = _record(path)
            error, message = (field(record, key, str, path) for key in ("error", "message"))
            later = path.parent in folders
            failures.append(Failure(record["experiment"], record["scale"], path.parent, error, message, later))
        except Exception as cause:  # whatever a file holds
            note(path, described(cause))
    return failures


def grid_size(experiment: str, scale: str, conf: Path = CONF) -> int | None:
    """The number of cells in the experiment's grid at this scale; None without a YAML of that name."""
    from hydra_plugins.blocks_sweeper.sweeper import cells_of

    path = _yaml(experiment, conf)
    if path is None:
        return None
    blocks = OmegaConf.select(OmegaConf.load(path), f"grid.{scale}")
    return len(cells_of(blocks or [{}], []))


def deviations(experiment: str, conf: Path = CONF) -> list[str]:
    """The `# deviations:` comments of an experiment's YAML; an indented comment line continues the line above."""
    path = _yaml(experiment, conf)
    if path is None:
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


def _yaml(experiment: str, conf: Path) -> Path | None:
    """The experiment's YAML, if there is one of exactly this name."""
    return next((path for path in (conf / "experiment").glob("*.yaml") if path.stem == experiment), None)


def folder_of(path: Path, option: str) -> Path:
    """The folder that an option names. Raises UserError if there is none."""
    if not path.is_dir():
        wrong = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{option}: {path} {wrong}. Name the folder with the results.")
    return path


def _place(one: Cell | Failure) -> tuple[str, str, str]:
    return one.experiment, one.scale, one.folder.name


def _runs(cell: Cell) -> list[Cell]:
    """One cell for each row of runs.parquet: its settings over the configuration's, its own metrics.

    The cell's own metrics are means over its runs, and are dropped except `OF_THE_CELL`. An empty entry of a metric
    means that the run lacks it. An empty entry of a setting means null if the configuration has the setting, else that
    the run lacks it. Raises UserError.
    """
    path = cell.folder / RUNS
    n_runs = read_table(path, most_bytes=MAX_BYTES).num_rows
    if not 0 < n_runs <= MAX_RUNS:
        raise UserError(f"{path} has {n_runs:,} rows; a cell has at least one and at most {MAX_RUNS:,} runs.")
    shared = {name: cell.metrics[name] for name in OF_THE_CELL if name in cell.metrics}
    cells, wrong = [], dict[str, Any]()
    for row in read_rows(path, most_bytes=MAX_BYTES):
        known = {key: value for key, value in _flat(row, path) if value is not None and value == value}
        emptied = {key: None for key in row.keys() - known.keys() if key in cell.settings}
        own = {key.removeprefix(METRIC): known.pop(key) for key in list(known) if key.startswith(METRIC)}
        wrong = {name: value for name, value in own.items() if not is_number(value)} | wrong
        own = {name: float(value) for name, value in own.items() if is_number(value)}
        seed = field({"seed": cell.seed, **known}, "seed", int, path)
        settings = {**cell.settings, **emptied, **known}
        cells.append(replace(cell, seed=seed, metrics={**shared, **own}, settings=settings))
    _name_wrong(wrong, path)
    return cells


def _flat(config: Mapping[str, Any], path: Path, prefix: str = "", depth: int = 0) -> Iterable[tuple[str, Any]]:
    """Dotted key and value: a number, a text, true, false or None; lists and other values as text."""
    if depth > MAX_DEPTH:
        raise UserError(f"{path}: the settings are nested deeper than {MAX_DEPTH} levels.")
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, path, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value if isinstance(value, SCALARS) else str(value)


def _l0_range(folder: Path) -> dict[str, float]:
    """The lowest and highest per-token L0 that occurs in a histogram, where a cell has one."""
    table = HISTOGRAM.at(folder)
    if table is None:
        return {}
    occurring = table.loc[table["count"] > 0, "l0"]
    return {"l0_lowest": float(occurring.min()), "l0_highest": float(occurring.max())} if len(occurring) else {}
