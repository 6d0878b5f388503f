"""The tables of the report."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from reports.checks.base import Ranges, independent
from reports.checks.outcomes import Finding, effect_of, range_of, spelled
from reports.claims import GROUPS, SCALES, Claim, ExperimentRows, Paper, Scale
from reports.collect import Cell, Failure, grid_size, one_per_folder
from reports.draws import n_different
from reports.matching import order, refined, shown
from reports.render import Table
from reports.side_files import listing
from reports.verdicts import AGREES, DIRECTION, DISAGREES, PARTLY, UNDECIDED, Judgement

Judgements = Mapping[str, Mapping[Scale, Judgement]]
# the columns of a count of verdicts; those that rest on one value stand in the last one alone
COLUMNS = {"agree": (AGREES, DIRECTION), "partly": (PARTLY,), "disagree": (DISAGREES,), "inconclusive": (UNDECIDED,)}
ONE_VALUE = "on one value"


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
    header = ["claim", "whose", "statement", "where", "paper", "published elsewhere", "source, confidence"]
    header += [title for scale in SCALES for title in (f"ours, {scale} scale", f"verdict, {scale} scale")]
    rows = []
    for claim in paper.claims:
        row = [claim.id, claim.kind, claim.statement, claim.where, claim.paper_says, elsewhere(paper, claim)]
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
            claim.kind,
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
    return Table(["claim", "whose", "statement", "where", "paper", "published elsewhere", "ours", "verdict"], rows)


def counts(judged: Sequence[tuple[Claim, Judgement]]) -> list[list[str]]:
    """A row for each group of claims that has one with results: its name and size, and how many have which verdict."""
    rows = []
    for group, name in GROUPS.items():
        own = [judgement for claim, judgement in judged if claim.group == group and judgement.ours]
        if own:
            firm = [judgement.word for judgement in own if not judgement.one_value]
            numbers = [str(sum(word in words for word in firm)) for words in COLUMNS.values()]
            rows.append([f"{name} ({len(own)})", *numbers, one_value(own)])
    return rows


def one_value(judgements: Sequence[Judgement]) -> str:
    """`2 agree, 1 disagree`: the verdicts that rest on one value."""
    words = [judgement.word for judgement in judgements if judgement.one_value]
    numbers = {name: sum(word in group for word in words) for name, group in COLUMNS.items()}
    return ", ".join(f"{n} {name}" for name, n in numbers.items() if n) or "0"


def claims_of(papers: Sequence[Paper], experiment: str) -> list[tuple[Paper, Claim]]:
    return [(paper, claim) for paper in papers for claim in paper.claims if claim.experiment == experiment]


def details(papers: Sequence[Paper], experiment: str, scale: Scale, judgements: Judgements) -> Table:
    """One row for each comparison behind the claims of an experiment."""
    rows = []
    for _, claim in claims_of(papers, experiment):
        judgement = judgements[claim.id][scale]
        for comparison, found, effect in zip(judgement.comparisons, judgement.findings, judgement.effects, strict=True):
            if found is None:
                values = ["", "", f"not judged: {comparison.note}", "", "0", "", "", "", ""]
            else:
                measured, other = comparison.values
                values = [f"{measured:.4g}", f"{other:.4g}", effect, _region(found), *_behind(found), found.outcome]
            rows.append([claim.id, comparison.label, *values])
    header = ["claim", "setting", "measured", "compared with", "difference or ratio", "must be", "seeds"]
    return Table([*header, "draws of data", "of initialisation", "n", "as claimed"], rows)


def _behind(found: Finding) -> list[str]:
    """Seeds, draws of data and of initialisation, independent values."""
    return [str(n) for n in (found.n_seeds, found.n_data, found.n_initialisations, found.effect.n)]


def _region(found: Finding) -> str:
    """What the check accepts, in words."""
    low, high = found.region.low, found.region.high
    if found.region.strict:
        return "above 0" if low == 0 else "below 0"
    if low == -high:
        return f"within {high:g}"
    parts = [f"at least {low:g}" if low > -math.inf else "", f"at most {high:g}" if high < math.inf else ""]
    return ", ".join(part for part in parts if part)


def paper_of(papers: Sequence[Paper], experiment: str) -> Paper | None:
    """The paper with claims about an experiment; None for an experiment without claims."""
    return next((paper for paper in papers if experiment in paper.experiments), None)


def results(cells: Sequence[Cell], rows: ExperimentRows | None, ranges: Ranges | None = None) -> Table:
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
    header = [*(key.rpartition(".")[2] or key for key in match), "seeds", "draws of data", "of initialisation"]
    body = []
    for key, group in groups.items():
        drawn = [rows.draws.of([cell]) for cell in group]
        behind = [len({cell.seed for cell in group}), *(n_different([pair[i] for pair in drawn]) for i in (0, 1))]
        body.append([*key, *map(str, behind), *(mean(group, metric, rows, ranges) for metric in rows.columns)])
    return Table([*header, *rows.columns], body)


def mean(cells: Sequence[Cell], metric: str, rows: ExperimentRows | None = None, ranges: Ranges | None = None) -> str:
    """`0.291 [0.285, 0.297]`; without an interval where there is one independent value. Clusters are shown as runs."""
    known = {i: cell for i, cell in enumerate(cells) if metric in cell.metrics}
    if not known:
        return ""
    values = [cell.metrics[metric] for cell in known.values()]
    if rows is not None:
        effects = {i: cell.metrics[metric] for i, cell in known.items()}
        values = independent(effects, {i: rows.draws.of([cell]) for i, cell in known.items()})
    limits = range_of(metric, ranges or {})
    return spelled(effect_of(values, limits, rows is not None and metric in rows.clustered), ".4g")


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
