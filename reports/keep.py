"""Keep results in the repository: `python -m reports.keep [--outputs outputs] [--scale paper] [experiment ...]`.

Copies every finished cell's results to reports/results/<experiment>/<scale>/<cell>, and the figures drawn from what is
kept to reports/results/<experiment>; reports/results/README.md shows all that is kept beside the papers' claims.
Nothing is copied if a file is larger than 2 MB. What is left behind is named. With `--redraw` nothing is copied, and
figures and README are made anew from what is kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from core.artifacts import write_atomically
from core.errors import UserError
from core.results import FAILED
from reports import figures, render, tables
from reports.claims import AGREES, DIRECTION, DISAGREES, PARTLY, SCALES, Scale
from reports.collect import KEPT, Cell, deviations, grid_size, one_per_folder, read_cells
from reports.compare import Report
from reports.render import Block, Bullets, Figure, Heading, Paragraph, Table

MAX_BYTES = 2_000_000
README = "README.md"
VERDICTS = (AGREES, DIRECTION, PARTLY, DISAGREES)
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
    return [*written, write_readme(kept)]


def redraw(scale: str, experiments: Sequence[str], kept: Path) -> list[Path]:
    """Figures, and the README, of what is kept already. Raises UserError if one of the experiments is not."""
    there = sorted({cell.experiment for cell in read_cells(kept) if cell.scale == scale})
    if missing := sorted(set(experiments) - set(there)):
        raise UserError(f"{kept} holds nothing of {', '.join(missing)} at {scale} scale.")
    written = [path for experiment in experiments or there for path in draw(experiment, scale, kept)]
    return [*written, write_readme(kept)]


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


def write_readme(kept: Path) -> Path:
    write_atomically(kept / README, readme(kept))
    return kept / README


def readme(kept: Path) -> str:
    """All that is kept, in Markdown: an overview, then each experiment's claims, figures and circumstances."""
    report = Report.read(kept, None)
    there = [(name, scale) for name in report.experiments for scale in SCALES if report.cells(name, scale)]
    blocks: list[Block] = [
        Heading(1, "Results kept in the repository"),
        Paragraph(
            "Written by `python -m reports.keep` from the files beside it. Intervals are 95 % t intervals over seeds; "
            "how each claim is judged stands in [reports/paper](../paper). Hours are the wall time of all cells added "
            "up, two at a time on two cores, also where the machine was paused or did other work beside them."
        ),
        overview(report, there),
    ]
    for experiment, scale in there:
        cells = report.cells(experiment, scale)
        blocks += [Heading(2, f"{experiment}, {scale} scale")]
        blocks += [tables.judged(report.papers, experiment, scale, report.judgements)]
        drawn = sorted((kept / experiment).glob(f"{experiment}_{scale}*.png"))
        blocks += [Figure(path, path.stem.replace("_", " ")) for path in drawn]
        blocks += [Bullets(tables.circumstances(cells))]
        if notes := deviations(experiment):
            blocks += [Paragraph("Deviations from the paper:"), Bullets(notes)]
    return render.markdown(blocks, kept)


def overview(report: Report, there: Sequence[tuple[str, Scale]]) -> Table:
    """A row for each experiment and one for all: its cells, their hours, and how many claims have which verdict."""
    rows, hours, verdicts = [], 0.0, Counter[str]()
    for experiment, scale in there:
        cells = one_per_folder(report.cells(experiment, scale))
        own_hours = sum(map(tables.seconds_of, cells)) / 3600
        judgements = [report.judgements[claim.id][scale] for _, claim in tables.claims_of(report.papers, experiment)]
        own = Counter(judgement.verdict.partition(";")[0] for judgement in judgements if judgement.ours)
        size = grid_size(experiment, scale) or "?"
        rows.append(
            [experiment, scale, f"{len(cells)} of {size}", f"{own_hours:.2f}", *(str(own[word]) for word in VERDICTS)]
        )
        hours, verdicts = hours + own_hours, verdicts + own
    rows.append(["all", "", "", f"{hours:.2f}", *(str(verdicts[word]) for word in VERDICTS)])
    return Table(["experiment", "scale", "cells", "hours of the cells", *VERDICTS], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiments", nargs="*", metavar="experiment", help="which experiments (default: all)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder with the results")
    parser.add_argument("--scale", choices=SCALES, default="paper", help="default: paper")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder to keep them in (default: reports/results)")
    parser.add_argument("--redraw", action="store_true", help="copy nothing; figures and README of what is kept, anew")
    options = parser.parse_args(arguments)
    try:
        if options.redraw:
            written = redraw(options.scale, options.experiments, options.kept)
        else:
            written = keep(options.outputs, options.scale, options.experiments, options.kept)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"kept: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
