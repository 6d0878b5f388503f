"""Compare all results with the papers' claims: `python -m reports.compare [--outputs outputs] [--to outputs/report]`.

Cells that are not in the outputs are read from the results kept in the repository (`--kept FOLDER`, `--no-kept`).
Writes report.md, report.html (one file with the figures inside), claims.json and the figures. Prints the claims and the
paths of the files. Smoke results are not reported. What cannot be read or drawn is left out, and named on standard
error and in the report.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from core.atomic import write_atomically
from core.errors import UserError
from reports import figures, render, tables
from reports.claims import SCALES, Claim, Paper, Scale, load_papers, with_derived
from reports.collect import KEPT, Cell, Failure, deviations, folder_of, one_per_folder, read_failures, with_kept
from reports.culprits import on_the_rest
from reports.left_out import Omission, noting
from reports.render import Block, Bullets, Figure, Heading, Paragraph, Table
from reports.safe_text import plain
from reports.verdicts import AMBIGUOUS, DISAGREES, Judgement, judge, rule


@dataclass(frozen=True)
class Report:
    """The results, the failures, and the papers' claims."""

    outputs: Path
    papers: Sequence[Paper]
    all_cells: Sequence[Cell]
    all_failures: Sequence[Failure]

    @classmethod
    def read(cls, outputs: Path, kept: Path | None) -> Report:
        """Raises UserError if a file of claims is wrong."""
        papers = load_papers()
        cells = with_derived(papers, with_kept(outputs, kept))
        return cls(outputs, papers, cells, read_failures(outputs, cells))

    @property
    def experiments(self) -> list[str]:
        """The experiments that left something at a reported scale."""
        ended: list[Cell | Failure] = [*self.all_cells, *self.all_failures]
        return sorted({one.experiment for one in ended if one.scale in SCALES})

    def cells(self, experiment: str, scale: Scale) -> list[Cell]:
        return [cell for cell in self.all_cells if (cell.experiment, cell.scale) == (experiment, scale)]

    def failures(self, experiment: str, scale: Scale) -> list[Failure]:
        """The failed cells without results. One that has older results counts as a finished cell."""
        return [
            failure
            for failure in self.all_failures
            if (failure.experiment, failure.scale) == (experiment, scale) and not failure.later_than_results
        ]

    @cached_property
    def judgements(self) -> dict[str, dict[Scale, Judgement]]:
        """claim's id -> scale -> judgement."""
        return {
            claim.id: {scale: self._judge(paper, claim, scale) for scale in SCALES}
            for paper in self.papers
            for claim in paper.claims
        }

    def _judge(self, paper: Paper, claim: Claim, scale: Scale) -> Judgement:
        n_failed = len(self.failures(claim.experiment, scale))

        def judged(cells: Sequence[Cell]) -> Judgement:
            return judge(paper, claim, scale, cells, n_failed)

        cells = self.cells(claim.experiment, scale)
        if not cells:
            return judged([])
        judgement, _ = on_the_rest(judged, cells, f"the claim {claim.id} at {scale} scale")
        return judgement or Judgement(verdict=AMBIGUOUS, ours="no cell with which it can be judged")


@dataclass(frozen=True)
class Written:
    """The files that were written, and for each other one its path and what prevented it."""

    figures: Sequence[Path]
    pages: Sequence[Path]
    problems: Sequence[str]


def write(report: Report, to: Path, omissions: Sequence[Omission]) -> Written:
    """Write everything that can be written. `omissions` grows while figures and tables are made."""
    problems: list[str] = []

    def written(path: Path, content: str | bytes) -> bool:
        try:
            write_atomically(path, content)
        except OSError as error:
            problems.append(f"{path} could not be written: {error.strerror or error}.")
            return False
        return True

    drawn: dict[tuple[str, Scale], list[Path]] = {}
    for experiment in report.experiments:
        for scale in SCALES:
            files = figures.drawn(experiment, report.cells(experiment, scale))
            paths = [to / "figures" / name for name, content in files if written(to / "figures" / name, content)]
            drawn[experiment, scale] = paths
    blocks = report_blocks(report, drawn, omissions)
    pages = {
        "report.md": render.markdown(blocks, to),
        "report.html": render.page("Results beside the papers' claims", blocks),
        "claims.json": claims_text(report),
    }
    paths = [to / name for name, text in pages.items() if written(to / name, text)]
    return Written([path for own in drawn.values() for path in own], paths, problems)


def report_blocks(
    report: Report, drawn: dict[tuple[str, Scale], list[Path]], omissions: Sequence[Omission]
) -> list[Block]:
    """The report from top to bottom: claims, then each experiment's figures, tables and circumstances. What is left out
    stands before the claims."""
    claims: list[Block] = []
    for paper in report.papers:
        if paper.claims:
            claims += [Heading(2, paper.title), tables.claims(paper, report.judgements)]
    of_experiments: list[Block] = []
    for experiment in report.experiments:
        of_experiments.append(Heading(2, experiment))
        for scale in SCALES:
            of_experiments += _scale_blocks(report, experiment, scale, drawn[experiment, scale])
        if notes := deviations(experiment):
            of_experiments += [Heading(3, "Deviations from the paper"), Bullets(notes)]
    return [
        Heading(1, "Results beside the papers' claims"),
        Paragraph(
            "At paper scale, our numbers are compared with the paper's. At demo scale (a small model, short "
            "runs), only the direction of a claim is judged. A percentage compares two measured values at equal seeds "
            "and settings."
        ),
        Paragraph("How claims are judged:"),
        Bullets(rule()),
        tables.finished(report.experiments, report.cells, report.failures),
        *left_out(omissions),
        *claims,
        *of_experiments,
    ]


def left_out(omissions: Sequence[Omission]) -> list[Block]:
    """What the report lacks; nothing if it lacks nothing."""
    if not omissions:
        return []
    words = Paragraph("The report was made without these. Everything else is in it.")
    return [Heading(2, "Left out"), words, Table(["what", "why"], [list(omission) for omission in omissions])]


def _scale_blocks(report: Report, experiment: str, scale: Scale, drawn: Sequence[Path]) -> list[Block]:
    cells, failures = report.cells(experiment, scale), report.failures(experiment, scale)
    if not cells and not failures:
        return []
    where = f"{experiment} at {scale} scale"
    blocks: list[Block] = [Heading(3, where)]
    blocks += [Figure(path, path.stem.replace("_", " ")) for path in drawn if path.suffix == ".png"]
    for cell in one_per_folder(cells):
        if own := tables.of_cell(cell):
            blocks += [Paragraph(f"Cell {cell.folder.name}:"), own[0], Bullets(own[1])]
    if cells:
        paper = tables.paper_of(report.papers, experiment)
        rows, ranges = (paper.experiments[experiment], paper.ranges) if paper else (None, {})
        blocks += _on_the_rest(lambda left: tables.results(left, rows, ranges), cells, f"the table of {where}")
        blocks += _on_the_rest(lambda left: Bullets(tables.circumstances(left)), cells, f"the hardware of {where}")
    if failures:
        blocks += [Paragraph("Failed cells. They are counted, and are in no other number:"), tables.failures(failures)]
    if repeated := [
        f for f in report.all_failures if f.later_than_results and (f.experiment, f.scale) == (experiment, scale)
    ]:
        blocks += [
            Paragraph("Cells whose latest run failed. The numbers shown are those of the run before:"),
            tables.failures(repeated),
        ]
    details = tables.details(report.papers, experiment, scale, report.judgements)
    return [*blocks, Paragraph("Claims, setting by setting:"), details] if details.rows else blocks


def _on_the_rest(make: Callable[[Sequence[Cell]], Block], cells: Sequence[Cell], what: str) -> list[Block]:
    block, _ = on_the_rest(make, cells, what)
    return [] if block is None else [block]


def claims_text(report: Report) -> str:
    """claims.json: numbers that are none are null, and no text can close an element of a page that it is put into."""
    text = json.dumps(_finite(claims_json(report)), indent=1, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def claims_json(report: Report) -> list[dict[str, Any]]:
    """Every claim with its judgement at each scale, for programs to read."""
    return [
        {
            "id": claim.id,
            "paper": paper.name,
            "experiment": claim.experiment,
            "origin": claim.origin,
            "after_results": claim.after_results,
            "statement": claim.statement,
            "where": claim.where,
            "source": claim.source,
            "confidence": claim.confidence,
            "paper_says": claim.paper_says,
            "paper_value": claim.paper,
            "tolerance": claim.tolerance,
            "anchors": list(claim.anchors),
            "needs": claim.needs,
            "scales": {scale: _judgement_json(report.judgements[claim.id][scale]) for scale in SCALES},
        }
        for paper in report.papers
        for claim in paper.claims
    ]


def _judgement_json(judgement: Judgement) -> dict[str, Any]:
    settings = [
        {
            "setting": c.label,
            "seeds": {str(seed): list(pair) for seed, pair in c.pairs.items()},
            "note": c.note,
            **(found.as_json() if found else {"outcome": None}),
        }
        for c, found in zip(judgement.comparisons, judgement.findings, strict=True)
    ]
    return {
        "verdict": judgement.verdict,
        "one_value": judgement.one_value,
        "ours": judgement.ours,
        "n_seeds": judgement.n_seeds,
        "settings": settings,
    }


def print_claims(report: Report, console: Console) -> None:
    """The claims as a table in the terminal."""
    table = RichTable("claim", "statement", "paper scale", "demo scale", title="Claims", title_justify="left")
    for paper in report.papers:
        for claim in paper.claims:
            verdicts = [_terminal(report.judgements[claim.id][scale]) for scale in SCALES]
            table.add_row(Text(claim.id), Text(claim.statement), *verdicts)
    console.print(table)


def _terminal(judgement: Judgement) -> Text:
    word = judgement.verdict
    good = "agrees" in word and not judgement.one_value
    colour = "red" if word.startswith(DISAGREES) else "green" if good else "yellow" if word != "-" else "dim"
    ours = f"\n{plain(judgement.ours.split('; ')[0])}" if judgement.ours else ""
    return Text.assemble((plain(word), colour), ours)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if there is nothing to report, if a claims file is wrong, or if something could not be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outputs", type=Path, help="folder with the results (default: outputs)")
    parser.add_argument("--to", type=Path, help="folder for the report (default: <outputs>/report)")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--kept", type=Path, default=KEPT, help="folder with kept results (default: reports/results)")
    origin.add_argument("--no-kept", dest="kept", action="store_const", const=None, help="leave kept results out")
    options = parser.parse_args(arguments)
    try:
        with noting() as omissions:
            return _report(options, omissions)
    except UserError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 1


def _report(options: argparse.Namespace, omissions: Sequence[Omission]) -> int:
    outputs = options.outputs or Path("outputs")
    if options.outputs or outputs.exists():
        folder_of(outputs, "--outputs")
    else:
        print(f"there is no folder {outputs} yet: the report is of the kept results", file=sys.stderr)
    kept = folder_of(options.kept, "--kept") if options.kept else None
    to = options.to or outputs / "report"
    report = Report.read(outputs, kept)
    if not report.experiments:
        seen = "only smoke results, which are not reported" if report.all_cells else "no results"
        raise UserError(f"{outputs} holds {seen}. Run `make demo`, or name the folder with --outputs.")
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to: the folder {to} cannot be made: {error.strerror or error}.") from error
    made = write(report, to, omissions)
    console = Console()
    print_claims(report, console if console.is_terminal else Console(width=140))
    for path in made.figures:
        if path.suffix == ".png":
            print(f"figure: {plain(path)}")
    for path in made.pages:
        if path.name != "claims.json":
            print(f"report: {plain(path)}")
    if omissions:
        print(f"left out: {len(omissions)}, named above and in the report", file=sys.stderr)
    for problem in made.problems:
        print(f"error: {plain(problem)}", file=sys.stderr)
    return 1 if made.problems else 0


if __name__ == "__main__":
    sys.exit(main())
