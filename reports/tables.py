"""The tables of the report."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from reports.checks.base import interval, spelled
from reports.claims import SCALES, Claim, ExperimentRows, Paper, Scale
from reports.collect import Cell, Failure, grid_size, one_per_folder
from reports.matching import order, refined, shown
from reports.render import Table
from reports.side_files import listing
from reports.verdicts import Judgement

Judgements = Mapping[str, Mapping[Scale, Judgement]]


def finished(
    experiments: Sequence[str],
    cells: Callable[[str, Scale], list[Cell]],
    failed: Callable[[str, Scale], list[Failure]],
) -> Table:
    """How many cells of each grid have finished or failed."""
    rows = []
    for experiment in experiments:
        for scale in SCALES:
            n_cells, n_failed = len(one_per_folder(cells(experiment, scale))), len(failed(experiment, scale))
            if n_cells or n_failed:
                rows.append([experiment, scale, str(n_cells), str(n_failed), str(grid_size(experiment, scale) or "?")])
    return Table(["experiment", "scale", "cells finished", "failed", "in the grid"], rows)


def claims(paper: Paper, judgements: Judgements) -> Table:
    """One row for each claim of a paper."""
    header = ["claim", "statement", "where", "paper", "published elsewhere", "source, confidence"]
    header += [title for scale in SCALES for title in (f"ours, {scale} scale", f"verdict, {scale} scale")]
    rows = []
    for claim in paper.claims:
        row = [claim.id, claim.statement, claim.where, claim.paper_says, elsewhere(paper, claim)]
        row.append(f"{claim.source}; {claim.confidence}" + (f"; needs {claim.needs}" if claim.needs else ""))
        for scale in SCALES:
            judgement = judgements[claim.id][scale]
            row += [judgement.ours, judgement.verdict]
        rows.append(row)
    return Table(header, rows)


def elsewhere(paper: Paper, claim: Claim) -> str:
    """The numbers that are published, but not in the paper's text."""
    return "; ".join(part for part in (paper.check(claim).published, claim.others_say) if part)


def judged(papers: Sequence[Paper], experiment: str, scale: Scale, judgements: Judgements) -> Table:
    """One row for each claim of an experiment at one scale: what the paper and others say, ours, and the verdict."""
    rows = [
        [
            claim.id,
            claim.statement,
            claim.where,
            claim.paper_says,
            elsewhere(paper, claim),
            judgements[claim.id][scale].ours,
            judgements[claim.id][scale].verdict,
        ]
        for paper, claim in claims_of(papers, experiment)
        if judgements[claim.id][scale].ours
    ]
    return Table(["claim", "statement", "where", "paper", "published elsewhere", "ours", "verdict"], rows)


def claims_of(papers: Sequence[Paper], experiment: str) -> list[tuple[Paper, Claim]]:
    return [(paper, claim) for paper in papers for claim in paper.claims if claim.experiment == experiment]


def details(papers: Sequence[Paper], experiment: str, scale: Scale, judgements: Judgements) -> Table:
    """One row for each comparison behind the claims of an experiment."""
    rows = []
    for _, claim in claims_of(papers, experiment):
        judgement = judgements[claim.id][scale]
        for comparison, held, effect in zip(judgement.comparisons, judgement.holds, judgement.effects, strict=True):
            if held is None:
                values = ["", "", f"not judged: {comparison.note}", "0", ""]
            else:
                _, other = comparison.values
                values = [
                    spelled(comparison.measured, ".4g"),
                    f"{other:.4g}",
                    effect,
                    str(len(comparison.pairs)),
                    "yes" if held else "no",
                ]
            rows.append([claim.id, comparison.label, *values])
    return Table(["claim", "setting", "measured", "compared with", "difference or ratio", "seeds", "as claimed"], rows)


def rows_of(papers: Sequence[Paper], experiment: str) -> ExperimentRows | None:
    """The columns of an experiment's table; None for an experiment without claims."""
    return next((paper.experiments[experiment] for paper in papers if experiment in paper.experiments), None)


def results(cells: Sequence[Cell], rows: ExperimentRows | None) -> Table:
    """Means over seeds with their intervals: a row for each method and setting, or, without `rows`, for each metric."""
    groups: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    if rows is None:
        for cell in cells:
            groups[(_name(cell),)].append(cell)
        metrics = list(dict.fromkeys(metric for cell in cells for metric in cell.metrics))
        body = [[metric, *(mean(group, metric) for group in groups.values())] for metric in metrics]
        return Table(["metric", *(name for (name,) in groups)], body)
    match = ("method", *refined(cells, tuple(rows.match)))
    for cell in sorted(cells, key=lambda cell: order([cell.get(key) for key in match])):
        groups[tuple(shown(cell.get(key)) for key in match)].append(cell)
    header = [*(key.rpartition(".")[2] or key for key in match), "seeds", *rows.columns]
    body = [
        [*key, str(len({cell.seed for cell in group})), *(mean(group, metric) for metric in rows.columns)]
        for key, group in groups.items()
    ]
    return Table(header, body)


def mean(cells: Sequence[Cell], metric: str) -> str:
    """`0.291 [0.285, 0.297]`; without an interval where there is one value."""
    values = [cell.metrics[metric] for cell in cells if metric in cell.metrics]
    if not values:
        return ""
    return spelled(interval(values), ".4g")


def of_cell(cell: Cell) -> tuple[Table, list[str]] | None:
    """The table and notes that an experiment wrote into `table.json` beside its results; None without such a file."""
    content = listing(cell)
    if content is None:
        return None
    header = list(dict.fromkeys(column for row in content.rows for column in row))
    body = [[_digits(row.get(column)) for column in header] for row in content.rows]
    return Table(header, body), content.notes


def _digits(value: object) -> str:
    """Four significant digits, and all those before the decimal point."""
    if not isinstance(value, float):
        return shown(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def failures(failed: Sequence[Failure]) -> Table:
    rows = [[failure.folder.name, failure.error, failure.message] for failure in failed]
    return Table(["cell", "error", "message"], rows)


def circumstances(cells: Sequence[Cell]) -> list[str]:
    """Hardware, commits, versions and time of the cells, and how many of them are kept results."""
    folders = one_per_folder(cells)
    records = [cell.record for cell in folders]
    versions = sorted({f"{name} {version}" for record in records for name, version in record["versions"].items()})
    seconds = [seconds_of(cell) for cell in folders]
    lines = [
        f"device: {', '.join(sorted({record['device'] for record in records}))}",
        f"commit: {', '.join(sorted({record['commit'] for record in records}))}",
        f"versions: {', '.join(versions)}",
        f"time: {sum(seconds):,.0f} s in {len(folders)} cells, {statistics.median(seconds):,.1f} s in the median one "
        "(without the training of dictionaries that were trained together before the cells, or that were in the store)",
    ]
    if len(cells) > len(folders):
        lines.append(f"runs: {len(cells)}, stacked in the {len(folders)} cells")
    if kept := [cell for cell in folders if cell.kept]:
        commits = ", ".join(sorted({cell.record["commit"] for cell in kept}))
        lines.append(
            f"kept results: {len(kept)} of {len(folders)} cells were read from the repository, commit {commits}"
        )
    return lines


def seconds_of(cell: Cell) -> float:
    """The time that the cell took, including that before the checkpoint from which it resumed."""
    return float(cell.metrics.get("seconds", cell.record["seconds"]))


def _name(cell: Cell) -> str:
    """The cell's folder without its seed."""
    return ",".join(part for part in cell.folder.name.split(",") if not part.startswith("seed=")) or "base"
