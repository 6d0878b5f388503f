"""The numbers of claims in pages written by hand, so that they cannot fall behind the kept results.

A page marks what is written for it:

  <!-- claims: leask/batchtopk-5a leask/batchtopk-2c -->    a row for each of these claims: statement, ours, verdict
  <!-- /claims -->
  <!-- counts: oneill -->                                   a row for each group of a paper's claims: its verdicts
  <!-- /counts -->

`python -m reports.scoreboard` writes README.md and the pages `docs/results-*.md`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from core.errors import UserError
from reports.claims import SCALES, Claim, Paper
from reports.compare import Report
from reports.render import Table, markdown
from reports.tables import COLUMNS, ONE_VALUE, counts
from reports.verdicts import Judgement

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- (claims|counts): ([^>]*?) -->\n).*?(<!-- /\2 -->)", flags=re.DOTALL)
T = TypeVar("T")
OPENING = re.compile(r"<!-- (claims|counts):")


def result_pages() -> list[Path]:
    """The pages with the results of a paper."""
    return sorted(DOCS.glob("results-*.md"))


def filled(page: str, report: Report) -> str:
    """The page with its marked tables written anew. Raises UserError for a claim or paper that is none, and for a mark
    without its end."""
    if len(BLOCK.findall(page)) != len(OPENING.findall(page)):
        raise UserError("A line <!-- claims: ... --> or <!-- counts: ... --> needs its end, <!-- /claims --> or so.")
    return BLOCK.sub(lambda match: f"{match[1]}{_table(match[2], match[3].split(), report)}\n{match[4]}", page)


def _table(kind: str, names: list[str], report: Report) -> str:
    if kind == "counts":
        papers = {paper.name: paper for paper in report.papers}
        rows = [row for name in names for row in counts(_judged(_known(papers, name), report))]
        table = Table(["claims", *COLUMNS, ONE_VALUE], rows)
    else:
        claims = {claim.id: claim for paper in report.papers for claim in paper.claims}
        table = Table(["claim", "here", "verdict"], [_row(_known(claims, name), report) for name in names])
    return markdown([table], DOCS).strip()


def _known(table: dict[str, T], name: str) -> T:
    if name not in table:
        raise UserError(f"There is no claim or paper {name}.")
    return table[name]


def _row(claim: Claim, report: Report) -> list[str]:
    """What the kept results of the larger scale say about a claim."""
    judgements = [report.judgements[claim.id][scale] for scale in SCALES]
    judged = next((judgement for judgement in judgements if judgement.ours), judgements[0])
    return [f"{claim.statement} ({claim.id.partition('/')[2]})", judged.ours, judged.verdict]


def _judged(paper: Paper, report: Report) -> list[tuple[Claim, Judgement]]:
    return [(claim, report.judgements[claim.id][scale]) for claim in paper.claims for scale in SCALES]
