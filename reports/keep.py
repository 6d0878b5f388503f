"""Keep results in the repository: `python -m reports.keep [--outputs outputs] [--scale paper] [experiment ...]`.

Copies every finished cell's results to reports/results/<experiment>/<scale>/<cell>, and the figures drawn from what is
kept to reports/results/<experiment>. Nothing is copied if a file is larger than 2 MB. What is left behind is named.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from core.errors import UserError
from core.results import FAILED
from reports import figures
from reports.claims import SCALES
from reports.collect import KEPT, Cell, one_per_folder, read_cells

MAX_BYTES = 2_000_000
ENDINGS = (".json", ".parquet")  # of the files that the report reads


def keep(outputs: Path, scale: str, experiments: Sequence[str], kept: Path) -> list[Path]:
    """Copy the finished cells and draw; the folders and figures written.

    Without names, of every experiment that finished a cell at this scale. Raises UserError if there is nothing to
    keep, or a file is too large.
    """
    cells = [cell for cell in one_per_folder(read_cells(outputs)) if cell.scale == scale]
    finished = sorted({cell.experiment for cell in cells})
    if missing := sorted(set(experiments) - set(finished)):
        raise UserError(f"{outputs} holds no finished cell of {', '.join(missing)} at {scale} scale.")
    if not finished:
        raise UserError(f"{outputs} holds no finished cell at {scale} scale; --outputs names the folder.")
    chosen = [cell for cell in cells if cell.experiment in (experiments or finished)]
    refuse_large(file for cell in chosen for file in kept_files(cell.folder))
    say_what_is_missing(chosen)
    written = [copy(cell, kept / cell.experiment / cell.scale / cell.folder.name) for cell in chosen]
    for experiment in sorted({cell.experiment for cell in chosen}):
        written += draw(experiment, scale, kept)
    return written


def kept_files(folder: Path) -> list[Path]:
    """The files of a cell that the report reads."""
    return [file for file in sorted(folder.iterdir()) if file.suffix in ENDINGS and file.name != FAILED]


def refuse_large(files: Iterable[Path]) -> None:
    large = [f"{file} ({file.stat().st_size / 1e6:.1f} MB)" for file in files if file.stat().st_size > MAX_BYTES]
    if large:
        raise UserError(
            f"Larger than {MAX_BYTES / 1e6:g} MB, so nothing was kept: {', '.join(large)}. Write fewer rows "
            "(a larger log_every), or narrower types, and run the cell again."
        )


def copy(cell: Cell, to: Path) -> Path:
    """Replace what was kept of the cell."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for file in kept_files(cell.folder):
        shutil.copyfile(file, to / file.name)
    return to


def say_what_is_missing(cells: Sequence[Cell]) -> None:
    """What is left behind of the cells, and how many were made from code with uncommitted changes."""
    left = Counter(
        entry.name for cell in cells for entry in cell.folder.iterdir() if entry not in kept_files(cell.folder)
    )
    if left:
        print(f"left behind: {', '.join(f'{name} (in {n} cells)' for name, n in left.items())}", file=sys.stderr)
    if dirty := [cell for cell in cells if cell.record["commit"].endswith("-dirty")]:
        print(f"warning: {len(dirty)} cells were made from code with uncommitted changes", file=sys.stderr)


def draw(experiment: str, scale: str, kept: Path) -> list[Path]:
    """The experiment's figures as PNG, from all its kept cells of one scale."""
    cells = [cell for cell in read_cells(kept / experiment) if cell.scale == scale]
    with TemporaryDirectory() as scratch:
        drawn = [path for path in figures.draw(experiment, cells, Path(scratch)) if path.suffix == ".png"]
        refuse_large(drawn)
        return [Path(shutil.copyfile(path, kept / experiment / path.name)) for path in drawn]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiments", nargs="*", metavar="experiment", help="which experiments (default: all)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder with the results")
    parser.add_argument("--scale", choices=SCALES, default="paper", help="default: paper")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder to keep them in (default: reports/results)")
    options = parser.parse_args(arguments)
    try:
        written = keep(options.outputs, options.scale, options.experiments, options.kept)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"kept: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
