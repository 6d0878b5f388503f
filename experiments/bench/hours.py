"""How long the panels of O'Neill et al. take at paper scale on this machine, extrapolated from a few hundredths.

Each part of a panel is run twice, as a user would run it, with two small fractions of its steps (and of whatever grows
with them). A cell's time is a line in the fraction: a constant for drawing data, starting and evaluating at the ends,
plus the work. The line is extended to 1. If the machine's speed varies, the difference of two short runs is coarse. The
second estimate needs no difference: the larger run's time over its fraction, which overstates the hours by the
constant.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig

from core import results
from core.bench import hardware, save_table
from core.errors import UserError
from core.shares import number_of_cell_processes
from experiments.bench.settings import HoursSettings

SETTINGS = HoursSettings

ROOT = Path(__file__).resolve().parents[2]


def run(cfg: DictConfig) -> dict[str, float]:
    """`<part>_hours`: the sum over its cells. `hours_on_all_cores`: all parts, with a cell on every core, along the
    lines; `hours_on_all_cores_from_larger`: the same from the larger runs alone."""
    rows = [measured(name, part, part.get("fractions", cfg.fractions)) for name, part in cfg.parts.items()]
    cores = number_of_cell_processes("auto", sum(row["cells"] for row in rows))
    total, coarse = (sum(row[column] for row in rows) for column in ("hours of the cells", "from the larger run"))
    notes = [
        hardware(torch.device("cpu"), 1),
        f"{total:.2f} hours of cells, {total / cores:.2f} on {cores} cores",
        f"from the larger runs alone {coarse:.2f} and {coarse / cores:.2f}: as if all time of a short run were work",
        "each part from two runs with small fractions of its work, along a line",
    ]
    save_table(Path(cfg.cell_folder), rows, notes)
    parts = {f"{row['part']}_hours": row["hours of the cells"] for row in rows}
    return {**parts, "hours_on_all_cores": total / cores, "hours_on_all_cores_from_larger": coarse / cores}


def measured(name: str, part: Mapping[str, Any], fractions: tuple[float, float]) -> dict[str, Any]:
    """One part's row of the table."""
    low, high = fractions
    less, more = (seconds_of_cells(part, fraction) for fraction in (low, high))
    hours, coarse = extended(low, sum(less), high, sum(more)) / 3600, sum(more) / high / 3600
    print(f"{name}: {len(less)} cells, {hours:.2f} hours; from the larger run {coarse:.2f}", file=sys.stderr)
    return {
        "part": name,
        "cells": len(less),
        "fraction": low,
        "seconds": sum(less),
        "larger fraction": high,
        "its seconds": sum(more),
        "hours of the cells": hours,
        "from the larger run": coarse,
    }


def extended(x1: float, y1: float, x2: float, y2: float) -> float:
    """The value at 1 of the line through two points, but at least y2, in case noise made the line fall."""
    return y2 + max(0.0, y2 - y1) * (1 - x2) / (x2 - x1)


def seconds_of_cells(part: Mapping[str, Any], fraction: float) -> list[float]:
    """Seconds of each of the part's cells, run with a fraction of the work. Raises UserError if one fails."""
    given = [f"experiment={part['panel']}", "scale=paper", *overrides(part, fraction)]
    with TemporaryDirectory(prefix="bench_hours_") as folder:
        where = [f"output_dir={folder}", f"artifacts_dir={folder}/artifacts", "logging=none"]
        ended = subprocess.run([sys.executable, "run.py", *given, *where], cwd=ROOT, check=False)
        if ended.returncode:
            raise UserError(f"run.py {' '.join(given)} ended with {ended.returncode}; its output is above.")
        return [float(record["seconds"]) for _, record in results.read_all(Path(folder))]


def overrides(part: Mapping[str, Any], fraction: float) -> list[str]:
    """The command line: which cells, and a fraction of the settings that grow with the work."""
    less = [f"{key}={max(1, round(value * fraction))}" for key, value in part["full"].items()]
    return [*part.get("only", []), *less, *part.get("set", [])]
