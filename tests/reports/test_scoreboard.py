"""The table of the papers in the README."""

import re
from pathlib import Path

import pytest

from core.errors import UserError
from reports import scoreboard as module
from reports.compare import Report
from reports.pages import filled, result_pages
from reports.scoreboard import BEGIN, END, README, main, read, scoreboard, updated


@pytest.fixture(scope="module")
def report() -> Report:
    return read()


@pytest.fixture(scope="module")
def table(report: Report) -> str:
    return scoreboard(report)


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_the_scoreboard_counts_the_verdicts_of_the_kept_results(table: str):
    """The counts of reports/results/README.md, whose last row of the overview adds up its verdicts."""
    lines = table.splitlines()
    assert lines[0] == "| paper | claims | agree | partly | disagree | inconclusive | on one value | from |"
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in lines[2:]]
    kept = [(row[0].partition("]")[0], row[-1]) for row in rows if row[-1]]
    assert kept[0] == ("[Leask et al. 2025, Bussmann et al. 2024", "demo scale, 4 of 4 experiments")
    assert kept[-1] == ("[O'Neill et al. 2025", "paper scale, 9 of 10 experiments")
    assert {name for name, _ in kept[1:-1]} == {"[Minder et al. 2025"}
    counted = [row for row in rows if row[2]]
    [total] = [line for line in (module.KEPT / "README.md").read_text().splitlines() if line.startswith("| all |")]
    *firm, on_one = re.split(r" ?\| ?", total)[5:-1]
    assert [sum(int(row[i]) for row in counted) for i in range(2, 6)] == [int(number) for number in firm]
    assert sum(sum(numbers_in(row[6])) for row in counted) == sum(numbers_in(on_one))
    for row in counted:
        assert numbers_in(row[1])[-1] == sum(int(row[i]) for i in range(2, 6)) + sum(numbers_in(row[6])), row


def test_every_group_of_claims_has_a_row_of_its_own(table: str):
    groups = ["the paper's claims", "the authors' numbers", "own checks", "sanity checks", "made or changed after"]
    assert all(group in table for group in groups)


def test_papers_without_claims_share_a_row_without_numbers(report: Report, table: str):
    planned = [paper.short for paper in sorted(report.papers, key=lambda paper: paper.name) if not paper.claims]
    assert planned[-2:] == ["Paulo et al. 2025", "Song et al. 2025"]
    assert table.splitlines()[-1] == f"| {', '.join(planned)} | planned |  |  |  |  |  |  |"


def test_only_the_text_between_the_markers_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "read", lambda kept: None)
    monkeypatch.setattr(module, "scoreboard", lambda report, kept: f"| kept in | {kept.name} |")
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert main(["--page", str(page)]) == 0
    assert page.read_text() == f"above\n{BEGIN}\n| kept in | results |\n{END}\nbelow\n"
    again = page.read_text()
    assert main(["--page", str(page)]) == 0 and page.read_text() == again
    page.write_text("no markers")
    assert main(["--page", str(page)]) == 1 and "needs a line <!-- scoreboard -->" in capsys.readouterr().err
    with pytest.raises(UserError):
        updated(f"{END}\n{BEGIN}", "table")


def test_the_readmes_scoreboard_is_up_to_date(table: str):
    page = README.read_text()
    assert updated(page, table) == page, "after a change of claims or kept results: python -m reports.scoreboard"


def test_the_tables_in_the_pages_of_results_are_up_to_date(report: Report):
    pages = result_pages()
    assert [page.name for page in pages] == ["results-leask.md", "results-minder.md", "results-oneill.md"]
    for page in pages:
        text = page.read_text()
        assert text.count("<!-- claims: ") >= 2 and text.count("<!-- counts: ") == 1
        assert filled(text, report) == text, "after a change of claims or kept results: python -m reports.scoreboard"


def test_a_marked_table_is_written_anew_and_nothing_else(report: Report):
    page = "a\n<!-- claims: oneill/unknown-16 -->\nold\n<!-- /claims -->\nb\n"
    written = filled(page, report)
    assert written.startswith("a\n<!-- claims: oneill/unknown-16 -->\n| claim | here | verdict |")
    assert written.endswith("\n<!-- /claims -->\nb\n") and "old" not in written
    assert "disagrees (one value)" in written and "7.1e+11" in written and filled(written, report) == written


@pytest.mark.parametrize(
    "page",
    [
        "<!-- claims: oneill/no-such -->\n<!-- /claims -->",
        "<!-- counts: nobody -->\n<!-- /counts -->",
        "<!-- claims: oneill/unknown-16 -->\n",
        "<!-- claims: oneill/unknown-16 -->\n<!-- /counts -->",
    ],
)
def test_a_wrong_mark_is_refused(page: str, report: Report):
    with pytest.raises(UserError, match=r"There is no claim or paper|needs its end"):
        filled(page, report)
