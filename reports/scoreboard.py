"""Write the scoreboard of the papers into the README: `python -m reports.scoreboard [--page README.md]`.

A row for each paper and group of claims (the paper's, the authors' numbers, own checks, sanity checks, and those made
or changed after the result was seen), from the kept results: how many have which verdict. Verdicts that rest on one
value stand in a column of their own. The table replaces what is between the lines `<!-- scoreboard -->` and
`<!-- /scoreboard -->` of the page. Without `--page`, the tables in `docs/results-*.md` are written as well
(`reports/pages.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from core.atomic import write_atomically
from core.errors import UserError
from reports.claims import SCALES, Paper
from reports.collect import KEPT, folder_of
from reports.compare import Report
from reports.left_out import nothing_left_out
from reports.pages import filled, result_pages
from reports.render import Markup, Table, markdown
from reports.tables import COLUMNS, ONE_VALUE, counts

BEGIN, END = "<!-- scoreboard -->", "<!-- /scoreboard -->"
README = Path(__file__).parents[1] / "README.md"
HEADER = ("paper", "claims", *COLUMNS, ONE_VALUE, "from")


def read(kept: Path = KEPT) -> Report:
    """The kept results and the claims."""
    return Report.read(folder_of(kept, "--kept"), None)


def scoreboard(report: Report, kept: Path = KEPT) -> str:
    """The table in Markdown: the papers that are built, then one row of those that are planned."""
    in_order = sorted(report.papers, key=lambda paper: (not paper.claims, paper.name))
    rows = [row for paper in in_order if paper.claims for row in _rows(report, paper)]
    if planned := [paper.short for paper in in_order if not paper.claims]:
        rows.append([", ".join(planned), "planned", *[""] * (len(HEADER) - 2)])
    return markdown([Table(HEADER, rows)], kept).strip()


def _rows(report: Report, paper: Paper) -> list[list[str]]:
    """The rows of each scale with kept results, or one without numbers."""
    page = Path("docs") / f"results-{paper.name}.md"
    linked = (README.parent / page).is_file()
    name = Markup(f"[{paper.short}]({page.as_posix()})") if linked else paper.short
    blank = [""] * (len(HEADER) - 2)
    rows = []
    for scale in SCALES:
        if n_kept := sum(bool(report.cells(experiment, scale)) for experiment in paper.experiments):
            judged = [(claim, report.judgements[claim.id][scale]) for claim in paper.claims]
            source = f"{scale} scale, {n_kept} of {len(paper.experiments)} experiments"
            first, *others = counts(judged) or [blank]
            rows += [[name, *first, source], *(["", *row, ""] for row in others)]
    return rows or [[name, "no results kept", *blank]]


def updated(page: str, table: str) -> str:
    """The page with the table between its markers. Raises UserError if it does not have both, in this order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"The page needs a line {BEGIN} and, below it, a line {END}.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, help="page to write into (default: README.md, and docs/results-*.md)")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder with kept results (default: reports/results)")
    options = parser.parse_args(arguments)
    page = options.page or README
    try:
        with nothing_left_out():
            report = read(options.kept)
            table = scoreboard(report, options.kept)
        written = {page: updated(page.read_text(), table)}
        for page in [] if options.page else result_pages():
            written[page] = filled(page.read_text(), report)
        for page, text in written.items():
            write_atomically(page, text)
            print(f"scoreboard: {page}")
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {page}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
