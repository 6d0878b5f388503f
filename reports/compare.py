"""Compare all results with the papers' claims: `python -m reports.compare [--outputs outputs] [--to outputs/report]`.

Cells that are not in the outputs are read from the results kept in the repository (`--kept FOLDER`, `--no-kept`).
Writes report.md, report.html (one file with the figures inside), claims.json and the figures. Prints the claims and the
paths of the files. Smoke results are not reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from core.artifacts import write_atomically
from core.errors import UserError
from reports import figures, render, tables
from reports.claims import SCALES, Claim, Paper, Scale, load_papers, with_derived
from reports.collect import KEPT, Cell, Failure, deviations, one_per_folder, read_failures, with_kept
from reports.render import Block, Bullets, Figure, Heading, Paragraph
from reports.verdicts import DISAGREES, Judgement, judge, rule


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
        return cls(outputs, papers, cells, read_failures(outputs))

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
        return judge(paper, claim, scale, self.cells(claim.experiment, scale), n_failed)


def write(report: Report, to: Path) -> list[Path]:
    """Write everything and return the figures' paths, PNG and SVG."""
    drawn = {
        (experiment, scale): figures.draw(experiment, report.cells(experiment, scale), to / "figures")
        for experiment in report.experiments
        for scale in SCALES
    }
    blocks = report_blocks(report, drawn)
    write_atomically(to / "report.md", render.markdown(blocks, to))
    write_atomically(to / "report.html", render.page("Results beside the papers' claims", blocks))
    write_atomically(to / "claims.json", json.dumps(claims_json(report), indent=1))
    return [path for paths in drawn.values() for path in paths]


def report_blocks(report: Report, drawn: dict[tuple[str, Scale], list[Path]]) -> list[Block]:
    """The report from top to bottom: claims, then each experiment's figures, tables and circumstances."""
    blocks: list[Block] = [
        Heading(1, "Results beside the papers' claims"),
        Paragraph(
            "At paper scale, our numbers are compared with the paper's. At demo scale (a small model, short "
            "runs), only the direction of a claim is judged. A percentage compares two measured values at equal seeds "
            "and settings."
        ),
        Paragraph("How claims are judged:"),
        Bullets(rule()),
        tables.finished(report.experiments, report.cells, report.failures),
    ]
    for paper in report.papers:
        if paper.claims:
            blocks += [Heading(2, paper.title), tables.claims(paper, report.judgements)]
    for experiment in report.experiments:
        blocks.append(Heading(2, experiment))
        for scale in SCALES:
            blocks += _scale_blocks(report, experiment, scale, drawn[experiment, scale])
        if notes := deviations(experiment):
            blocks += [Heading(3, "Deviations from the paper"), Bullets(notes)]
    return blocks


def _scale_blocks(report: Report, experiment: str, scale: Scale, drawn: Sequence[Path]) -> list[Block]:
    cells, failures = report.cells(experiment, scale), report.failures(experiment, scale)
    if not cells and not failures:
        return []
    blocks: list[Block] = [Heading(3, f"{experiment} at {scale} scale")]
    blocks += [Figure(path, path.stem.replace("_", " ")) for path in drawn if path.suffix == ".png"]
    for cell in one_per_folder(cells):
        if own := tables.of_cell(cell):
            blocks += [Paragraph(f"Cell {cell.folder.name}:"), own[0], Bullets(own[1])]
    if cells:
        paper = tables.paper_of(report.papers, experiment)
        rows, ranges = (paper.experiments[experiment], paper.ranges) if paper else (None, {})
        blocks += [tables.results(cells, rows, ranges)]
        blocks += [Bullets(tables.circumstances(cells))]
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
            table.add_row(
                claim.id, claim.statement, *(_terminal(report.judgements[claim.id][scale]) for scale in SCALES)
            )
    console.print(table)


def _terminal(judgement: Judgement) -> str:
    word = judgement.verdict
    good = "agrees" in word and not judgement.one_value
    colour = "red" if word.startswith(DISAGREES) else "green" if good else "yellow" if word != "-" else "dim"
    return f"[{colour}]{word}[/]" + (f"\n{judgement.ours.split('; ')[0]}" if judgement.ours else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if there is nothing to report, or if a claims file is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder with the results")
    parser.add_argument("--to", type=Path, default=None, help="folder for the report (default: <outputs>/report)")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--kept", type=Path, default=KEPT, help="folder with kept results (default: reports/results)")
    origin.add_argument("--no-kept", dest="kept", action="store_const", const=None, help="leave kept results out")
    options = parser.parse_args(arguments)
    to = options.to or options.outputs / "report"
    try:
        report = Report.read(options.outputs, options.kept)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not report.experiments:
        seen = "only smoke results, which are not reported" if report.all_cells else "no results"
        print(
            f"error: {options.outputs} holds {seen}. Run `make demo`, or name the folder with --outputs.",
            file=sys.stderr,
        )
        return 1
    drawn = write(report, to)
    console = Console()
    print_claims(report, console if console.is_terminal else Console(width=140))
    for path in (p for p in drawn if p.suffix == ".png"):
        print(f"figure: {path}")
    print(f"report: {to / 'report.md'}\nreport: {to / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
