"""The table of the papers in the README."""

from pathlib import Path

import pytest

from core.errors import UserError
from reports import scoreboard as module
from reports.scoreboard import BEGIN, END, README, main, scoreboard, updated


@pytest.fixture(scope="module")
def table() -> str:
    return scoreboard()


def test_the_scoreboard_counts_the_verdicts_of_the_kept_results(table: str):
    """The counts of reports/results/README.md, whose last row of the overview adds up its verdicts."""
    lines = table.splitlines()
    assert lines[0] == "| paper | experiments built | agree | partly | disagree | scale |"
    rows = [line for line in lines if line.endswith("experiments |")]
    assert [row.rpartition(" | ")[2] for row in rows] == ["demo, 4 of 4 experiments |", "paper, 9 of 10 experiments |"]
    [total] = [line for line in (module.KEPT / "README.md").read_text().splitlines() if line.startswith("| all |")]
    agrees, direction, partly, disagrees = (int(cell) for cell in total.strip("| ").split(" | ")[-4:])
    counts = [[int(cell) for cell in row.split(" | ")[2:5]] for row in rows]
    assert [sum(column) for column in zip(*counts, strict=True)] == [agrees + direction, partly, disagrees]


def test_papers_without_claims_have_a_row_without_numbers(table: str):
    lines = table.splitlines()
    assert len(lines) == 2 + 5
    assert sum(line.endswith("| planned |  |  |  |  |") for line in lines) == 3


def test_only_the_text_between_the_markers_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "scoreboard", lambda kept: f"| kept in | {kept.name} |")
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
