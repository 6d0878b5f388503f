"""Keep results in the repository: `python -m reports.keep [--outputs outputs] [--scale paper] [experiment ...]`.

Copies every finished cell's results to reports/results/<experiment>/<scale>/<cell>, and draws the figures of the kept
results into reports/results/<experiment>. reports/results/README.md shows all kept results beside the papers' claims.
Nothing is copied if a file is larger than 2 MB. The files that are not copied are listed. With `--redraw`, nothing is
copied: figures and README are made again from the kept results.

All cells are copied beside those kept before, and only then take their places. So kept results survive a disk that is
full, and a run that is killed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from core.atomic import atomically, remove_leftovers, sync, write_atomically
from core.errors import UserError
from core.results import FAILED, RESULTS, damage_of, read
from reports import figures, render, tables
from reports.claims import SCALES, Claim, Scale, load_papers, with_derived
from reports.collect import KEPT, Cell, deviations, folder_of, grid_size, one_per_folder, read_cells
from reports.compare import Report
from reports.left_out import nothing_left_out
from reports.render import Block, Bullets, Figure, Heading, Paragraph, Table, own_words
from reports.tables import COLUMNS, ONE_VALUE
from reports.verdicts import Judgement, rule

MAX_BYTES = 2_000_000
README = "README.md"
OLD, NEW = ".kept before.", ".to be kept."  # how the names of folders begin while they change places
ENDINGS = (".json", ".parquet")  # of the files that the report reads


def keep(outputs: Path, scale: str, experiments: Sequence[str], kept: Path) -> list[Path]:
    """Copy the finished cells, draw their figures, and return the folders and files written.

    Without names, all experiments with a finished cell at this scale are kept. Raises UserError if there is nothing to
    keep, or a file is too large.
    """
    repair(kept)
    cells = [cell for cell in one_per_folder(read_cells(outputs)) if cell.scale == scale]
    finished = sorted({cell.experiment for cell in cells})
    if missing := sorted(set(experiments) - set(finished)):
        raise UserError(f"{outputs} holds no finished cell of {', '.join(missing)} at {scale} scale.")
    if not finished:
        raise UserError(f"{outputs} holds no finished cell at {scale} scale; --outputs names the folder.")
    chosen = [cell for cell in cells if cell.experiment in (experiments or finished)]
    refuse_damaged(chosen)
    refuse_large(file for cell in chosen for file in kept_files(cell.folder))
    report_omissions(chosen)
    written = copy({kept / cell.experiment / cell.scale / cell.folder.name: cell for cell in chosen})
    for experiment in sorted({cell.experiment for cell in chosen}):
        written += draw(experiment, scale, kept)
    return [*written, write_readme(kept)]


def redraw(scale: str, experiments: Sequence[str], kept: Path) -> list[Path]:
    """Make figures and README again from the kept results. Raises UserError if there are none of an experiment."""
    repair(kept)
    available = sorted({cell.experiment for cell in read_cells(folder_of(kept, "--kept")) if cell.scale == scale})
    if missing := sorted(set(experiments) - set(available)):
        raise UserError(f"{kept} holds nothing of {', '.join(missing)} at {scale} scale.")
    written = [path for experiment in experiments or available for path in draw(experiment, scale, kept)]
    return [*written, write_readme(kept)]


def kept_files(folder: Path) -> list[Path]:
    """The files of a cell that the report reads."""
    return [file for file in sorted(folder.iterdir()) if file.suffix in ENDINGS and file.name != FAILED]


def refuse_damaged(cells: Iterable[Cell]) -> None:
    wrong = [f"{cell.folder}: {found}" for cell in cells if (found := damage_of(cell.folder))]
    if wrong:
        raise UserError(f"These cells are not whole, so nothing was kept. Run them again. {'; '.join(wrong)}")


def refuse_large(files: Iterable[Path]) -> None:
    large = [f"{file} ({file.stat().st_size / 1e6:.1f} MB)" for file in files if file.stat().st_size > MAX_BYTES]
    if large:
        raise UserError(
            f"Larger than {MAX_BYTES / 1e6:g} MB, so nothing was kept: {', '.join(large)}. Write fewer rows "
            "(a larger log_every), or narrower types, and run the cell again."
        )


def copy(cells: Mapping[Path, Cell]) -> list[Path]:
    """Copy the cells' files in the place of those kept before, and return the folders. All or none: see above."""
    copies = {to: to.with_name(f"{NEW}{to.name}") for to in cells}
    try:
        for to, cell in cells.items():
            copies[to].mkdir(parents=True)
            for file in kept_files(cell.folder):
                with atomically(copies[to] / file.name) as temporary:
                    shutil.copyfile(file, temporary)
            list_kept_files(copies[to])
        for to, copied in copies.items():
            exchange(copied, to)
    finally:
        finish_exchanges({to.parent for to in cells})
    return list(cells)


def repair(kept: Path) -> None:
    """Finish what an earlier run that was killed has left half done."""
    finish_exchanges(kept.glob("*/*"))
    remove_leftovers(kept)


def exchange(new: Path, to: Path) -> None:
    """Put a folder in the place of another one. What was there is removed when the new one stands."""
    old = to.with_name(f"{OLD}{to.name}")
    if to.exists():
        to.replace(old)
    new.replace(to)
    sync(to.parent)
    shutil.rmtree(old, ignore_errors=True)


def finish_exchanges(folders: Iterable[Path]) -> None:
    """Bring back what an exchange that was broken off had moved away, and remove what it left over."""
    for folder in folders:
        for old in folder.glob(f"{OLD}*"):
            place = old.with_name(old.name.removeprefix(OLD))
            if place.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.replace(place)
        for new in folder.glob(f"{NEW}*"):
            shutil.rmtree(new, ignore_errors=True)


def list_kept_files(folder: Path) -> None:
    """Let a kept results.json list those of its files that are kept."""
    record = read(folder / RESULTS) or {}
    if "files" in record:
        record["files"] = {name: entry for name, entry in record["files"].items() if (folder / name).is_file()}
        write_atomically(folder / RESULTS, json.dumps(record, indent=1))


def report_omissions(cells: Sequence[Cell]) -> None:
    """Print which files are not copied, and how many cells were made from code with uncommitted changes."""
    omitted = Counter(
        entry.name for cell in cells for entry in cell.folder.iterdir() if entry not in kept_files(cell.folder)
    )
    if omitted:
        print(f"not copied: {', '.join(f'{name} (in {n} cells)' for name, n in omitted.items())}", file=sys.stderr)
    if dirty := [cell for cell in cells if cell.record["commit"].endswith("-dirty")]:
        print(f"warning: {len(dirty)} cells were made from code with uncommitted changes", file=sys.stderr)


def draw(experiment: str, scale: str, kept: Path) -> list[Path]:
    """The experiment's figures as PNG, from all its kept cells of one scale."""
    with TemporaryDirectory() as scratch, nothing_left_out():
        cells = with_derived(load_papers(), [cell for cell in read_cells(kept / experiment) if cell.scale == scale])
        drawn = [path for path in figures.draw(experiment, cells, Path(scratch)) if path.suffix == ".png"]
        refuse_large(drawn)
        for path in drawn:
            write_atomically(kept / experiment / path.name, path.read_bytes())
        return [kept / experiment / path.name for path in drawn]


def write_readme(kept: Path) -> Path:
    with nothing_left_out():
        text = readme(kept)
    write_atomically(kept / README, text)
    return kept / README


def readme(kept: Path) -> str:
    """All kept results in Markdown: an overview, then each experiment's claims, figures and circumstances."""
    report = Report.read(kept, None)
    sections = [(name, scale) for name in report.experiments for scale in SCALES if report.cells(name, scale)]
    blocks: list[Block] = [
        Heading(1, "Results kept in the repository"),
        own_words(
            "Written by `python -m reports.keep` from the files in this folder. The claims, and the check of each, are "
            "in [reports/papers](../papers). Hours are the sum of the wall times of all cells. Two cells ran at a time "
            "on two cores. The sum includes pauses of the machine, and times when it did other work."
        ),
        overview(report, sections),
        Table(["claims", *COLUMNS, ONE_VALUE], tables.counts(everything(report))),
        Paragraph("How claims are judged:"),
        Bullets(rule()),
    ]
    for experiment, scale in sections:
        cells = report.cells(experiment, scale)
        blocks += [Heading(2, f"{experiment}, {scale} scale")]
        blocks += [tables.judged(report.papers, experiment, scale, report.judgements)]
        drawn = sorted((kept / experiment).glob(f"{experiment}_{scale}*.png"))
        blocks += [Figure(path, path.stem.replace("_", " ")) for path in drawn]
        blocks += [Bullets(tables.circumstances(cells))]
        if notes := deviations(experiment):
            blocks += [Paragraph("Deviations from the paper:"), Bullets(notes)]
    return render.markdown(blocks, kept)


def everything(report: Report) -> list[tuple[Claim, Judgement]]:
    """All claims at all scales."""
    claims = [claim for paper in report.papers for claim in paper.claims]
    return [(claim, report.judgements[claim.id][scale]) for claim in claims for scale in SCALES]


def overview(report: Report, sections: Sequence[tuple[str, Scale]]) -> Table:
    """A row for each experiment and one for all: cells, hours, and the number of claims with each verdict."""
    rows, hours, all_judged = [], 0.0, list[Judgement]()
    for experiment, scale in sections:
        cells = one_per_folder(report.cells(experiment, scale))
        own_hours = sum(map(tables.seconds_of, cells)) / 3600
        claims = [claim for _, claim in tables.claims_of(report.papers, experiment)]
        judged = [report.judgements[claim.id][scale] for claim in claims]
        size = grid_size(experiment, scale) or "?"
        rows.append([experiment, scale, f"{len(cells)} of {size}", f"{own_hours:.2f}", *_counted(judged)])
        hours, all_judged = hours + own_hours, all_judged + judged
    rows.append(["all", "", "", f"{hours:.2f}", *_counted(all_judged)])
    return Table(["experiment", "scale", "cells", "hours of the cells", *COLUMNS, ONE_VALUE], rows)


def _counted(judgements: Sequence[Judgement]) -> list[str]:
    """How many verdicts of each word; those that rest on one value in the last column alone."""
    own = [judgement for judgement in judgements if judgement.ours]
    firm = [judgement.word for judgement in own if not judgement.one_value]
    return [*(str(sum(word in words for word in firm)) for words in COLUMNS.values()), tables.one_value(own)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiments", nargs="*", metavar="experiment", help="which experiments (default: all)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder with the results")
    parser.add_argument("--scale", choices=SCALES, default="paper", help="default: paper")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder to keep them in (default: reports/results)")
    parser.add_argument(
        "--redraw", action="store_true", help="copy nothing; make figures and README of the kept results again"
    )
    options = parser.parse_args(arguments)
    try:
        if options.redraw:
            written = redraw(options.scale, options.experiments, options.kept)
        else:
            written = keep(options.outputs, options.scale, options.experiments, options.kept)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"kept: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
