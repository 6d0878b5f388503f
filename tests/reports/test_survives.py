"""The whole report survives any one file, any text in it, and a disk that cannot be written."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib.figure import Figure

from core import artifacts
from reports import compare, keep, looks, scoreboard
from reports.claims import Paper, load_papers
from reports.collect import Cell, read_cells
from reports.render import inline
from reports.safe_text import plain
from reports.verdicts import Judgement
from tests.reports.test_render import INJECTIONS, Elements
from tests.reports.trees import batchtopk, damage, stacks, write_cell

CHEAP = {"png": b"\x89PNG", "svg": b"<svg/>"}


@pytest.fixture(scope="module")
def papers() -> list[Paper]:
    return load_papers()


@pytest.fixture(autouse=True)
def _claims_are_read_once(papers: list[Paper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "load_papers", lambda: papers)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and their texts tamed, but no picture is drawn. The terminal shows no table of claims."""

    def rendered(figure: Figure) -> dict[str, bytes]:
        looks.tame(figure)
        return CHEAP

    monkeypatch.setattr(looks, "rendered", rendered)
    monkeypatch.setattr(compare, "print_claims", lambda report, console: None)


def rows(text: str) -> set[str]:
    """The lines of a report that hold numbers."""
    return {line for line in text.splitlines() if line.startswith("|")}


QUICK = range(0, 336, 28)


@pytest.mark.parametrize("make", [batchtopk, stacks])
def test_whatever_one_cell_holds_all_others_are_read_with_the_same_numbers(
    make: Callable[[Path], list[Path]], tmp_path: Path
):
    folders = make(tmp_path)
    before = {cell.folder: cell for cell in read_cells(tmp_path)}
    for number in range(170):
        dice = random.Random(number)
        victim = dice.choice(folders)
        shutil.copytree(victim, tmp_path / "saved")
        path = damage(victim, dice)
        started = time.process_time()
        cells = {cell.folder: cell for cell in read_cells(tmp_path)}
        assert time.process_time() - started < 5, (number, path)
        assert all(same(one, cells[place]) for place, one in before.items() if place != victim), (number, path)
        shutil.rmtree(victim)
        (tmp_path / "saved").rename(victim)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow, id=str(n)) for n in range(336)]
)
def test_whatever_one_cell_holds_the_report_is_made_and_names_what_it_lacks(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    dice = random.Random(number)
    folders = dice.choice([batchtopk, stacks])(tmp_path)
    path = damage(dice.choice(folders), dice)
    started = time.process_time()
    assert compare.main(["--outputs", str(tmp_path), "--no-kept"]) == 0, path
    assert time.process_time() - started < 5, path
    text = (tmp_path / "report" / "report.md").read_text()
    for omission in re.findall(r"^left out: (.*?): ", capsys.readouterr().err, re.MULTILINE):
        assert inline(omission) in text, path
    assert "<script" not in text + (tmp_path / "report" / "report.html").read_text()
    json.loads((tmp_path / "report" / "claims.json").read_text(), parse_constant=pytest.fail)


def same(one: Cell, other: Cell) -> bool:
    return (one.metrics, one.settings, one.seed) == (other.metrics, other.settings, other.seed)


@pytest.mark.usefixtures("cheap")
def test_a_damaged_cell_changes_no_row_of_the_others(tmp_path: Path):
    """A cell of a size of its own beside a grid: with its file damaged, every row is there but its own."""
    for name in ("without", "with"):
        batchtopk(tmp_path / name)
    settings = {"method": {"_target_": "core.methods.topk.TopK", "dict_size": 64, "k": 8}}
    extra = write_cell(tmp_path / "with", "leask_batchtopk", {"nmse_token_std": 0.25}, settings)
    (extra / "results.json").write_text("{")
    texts = {}
    for name in ("without", "with"):
        assert compare.main(["--outputs", str(tmp_path / name), "--no-kept"]) == 0
        texts[name] = (tmp_path / name / "report" / "report.md").read_text()
    [new] = rows(texts["with"]) - rows(texts["without"]) - {"| what | why |", "| --- | --- |"}
    assert rows(texts["without"]) <= rows(texts["with"]) and "not JSON" in new


def hostile_tree(outputs: Path, text: str) -> None:
    """Cells in which a text stands wherever models, data and results can write one."""
    for folder in batchtopk(outputs, name=text, source=text, revision=text)[:8]:
        path = folder / "results.json"
        record = json.loads(path.read_text())
        record |= {"commit": text, "device": text, "versions": {text: text}}
        record["config"]["stream"]["site"] = text
        record["config"][text] = text
        path.write_text(json.dumps(record))
    for folder in stacks(outputs):
        path = folder / "results.json"
        record = json.loads(path.read_text())
        record["config"] |= {"profile": text, "part": text}
        path.write_text(json.dumps(record))
        runs = pd.read_parquet(folder / "runs.parquet")
        if "\ud83d" not in text:  # no Parquet file holds half a character
            runs.assign(**{"coder.name": [f"SC {text}", text]}).to_parquet(folder / "runs.parquet")
    plain_cell = {"method": {"_target_": f"core.methods.x.{text}"}, "coder": {"name": text}}
    folder = write_cell(outputs, "bundled_lm", {text: 1.0, f"{text} nan": float("nan")}, plain_cell)
    (folder / "table.json").write_text(json.dumps({"rows": [{text: text, "n": 1}], "notes": [text]}))
    failed = outputs / "leask_batchtopk" / "demo" / "failed"
    failed.mkdir()
    record = {"experiment": "leask_batchtopk", "scale": "demo", "error": text, "message": text}
    (failed / "failed.json").write_text(json.dumps(record))
    for which, content in (("metrics", {text: text}), ("scale", text)):
        folder = write_cell(outputs, "bundled_lm", {"a": 1.0}, {})
        record = json.loads((folder / "results.json").read_text()) | {which: content}
        (folder / "results.json").write_text(json.dumps(record))


QUICK_TEXTS = (INJECTIONS[0], INJECTIONS[4], INJECTIONS[7], INJECTIONS[8], INJECTIONS[12])


@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=[] if text in QUICK_TEXTS else pytest.mark.slow) for text in INJECTIONS]
)
def test_no_text_of_a_model_or_a_result_is_more_than_text(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
):
    if "frac" not in text:
        request.getfixturevalue("cheap")  # pictures are drawn for the formulas alone
    hostile_tree(tmp_path, text)
    assert compare.main(["--outputs", str(tmp_path), "--no-kept"]) == 0
    printed = capsys.readouterr()
    assert "\x1b[31m" not in printed.out + printed.err and "\x00" not in printed.out + printed.err
    report = tmp_path / "report"
    elements = Elements((report / "report.html").read_text())
    assert plain(text) in elements.text or plain(text)[:20] in elements.text
    assert {tag for tag, _ in elements.found} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "ul", "li", "div", "table", "thead",
        "tbody", "tr", "th", "td", "figure", "img", "figcaption", "span",
    }  # fmt: skip
    for _, attributes in elements.found:
        assert attributes.keys() <= {
            "lang", "charset", "http-equiv", "content", "name", "class", "alt", "src", "title"
        }  # fmt: skip
        assert (attributes.get("src") or "data:image/png").startswith("data:image/png")
    markdown = (report / "report.md").read_text()
    assert inline(text) in markdown
    if inline(text) != text:
        assert not any(line for line in markdown.splitlines() if text in line)
    claims = (report / "claims.json").read_text()
    assert not set("<>&") & set(claims) and json.loads(claims)
    names = [path.name for path in (report / "figures").iterdir()]
    assert len(names) >= 8 and all(re.fullmatch(r"[A-Za-z0-9._,=+\-\[\]@]+", name) for name in names)


def test_a_picture_shows_texts_as_they_are_and_its_svg_holds_no_other_elements(tmp_path: Path):
    figure = Figure()
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.plot([1, 2], [1, 100], label="$x_1$ <script>alert(1)</script>")
    axes.set_xticks([1, 2], ["$\\frac{", "half \ufffd"])
    axes.legend()
    figure.suptitle("a\x00b \ud83d $\\notacommand{ $ --> <!-- " + "x" * 500)
    files = looks.rendered(figure)
    root = ElementTree.fromstring(files["svg"])
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= {
        "svg", "metadata", "RDF", "Work", "type", "date", "format", "creator", "Agent", "title", "defs", "style", "g",
        "path", "use", "clipPath", "rect",
    }  # fmt: skip
    assert files["png"].startswith(b"\x89PNG") and len(figure.get_suptitle()) < 250
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$\\frac{", "half \ufffd"]
    assert axes.get_yticklabels()[0].get_parse_math()  # powers of ten


def test_names_of_300_characters_stay_within_a_figure_and_a_file_name(tmp_path: Path):
    batchtopk(tmp_path, name="m" * 300)
    cells = read_cells(tmp_path)
    made = list(compare.figures.drawn("leask_batchtopk", cells))
    assert len(made) == 4 and all(len(name) < 200 for name, _ in made)


def run_command(*arguments: str, limit: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{limit} exec {sys.executable} -m reports.compare {' '.join(arguments)}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=Path(compare.__file__).parents[1]
    )


GOOD = ["--outputs", "good", "--no-kept"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outputs", "typo"], "error: --outputs: typo does not exist. Name the folder with the results.\n"),
        (["--outputs", "a_file"], "error: --outputs: a_file is not a folder. Name the folder with the results.\n"),
        (["--outputs", ".", "--kept", "typo"], "error: --kept: typo does not exist."),
        ([*GOOD, "--to", "a_file"], "error: --to: the folder a_file cannot be made: File exists."),
        ([*GOOD, "--to", "a_file/b"], "error: --to: the folder a_file/b cannot be made: Not a directory."),
        ([*GOOD, "--to", "/proc/x/y"], "error: --to: the folder /proc/x/y cannot be made: No such file or directory."),
        (["--outputs", "empty", "--no-kept"], "error: empty holds no results."),
    ],
)  # fmt: skip
def test_folders_that_are_none_are_named_and_none_is_made(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("x")
    Path("empty").mkdir()
    write_cell(Path("good"), "bundled_lm", {"a": 1.0}, {})
    before = sorted(tmp_path.rglob("*"))
    assert compare.main(arguments) == 1
    assert capsys.readouterr().err.startswith(message) and sorted(tmp_path.rglob("*")) == before


def test_without_outputs_the_kept_results_are_reported_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_cell(tmp_path / "kept", "bundled_lm", {"a": 1.0}, {})
    assert compare.main(["--kept", "kept"]) == 0
    assert "there is no folder outputs yet" in capsys.readouterr().err
    assert "kept results: 1 of 1 cells" in (tmp_path / "outputs" / "report" / "report.md").read_text()


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("lost", ["figures", "report.md", "report.html", "claims.json"])
def test_on_a_full_disk_what_could_be_written_stays_and_the_rest_is_named(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    batchtopk(tmp_path)
    write = artifacts.write_atomically

    def full(path: Path, content: str | bytes) -> None:
        if lost in path.parts:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(compare, "write_atomically", full)
    assert compare.main(["--outputs", str(tmp_path), "--no-kept"]) == 1
    printed = capsys.readouterr()
    report = tmp_path / "report"
    pages = {"report.md", "report.html", "claims.json"}
    assert {path.name for path in report.glob("*.*")} == pages - {lost}
    problems = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(problems) == (4 if lost == "figures" else 1)
    assert all(str(report / lost) in line and line.endswith("No space left on device.") for line in problems)
    assert ("![" in (report / "report.md").read_text()) == (lost != "figures") if lost != "report.md" else True
    assert (f"report: {report / 'report.md'}" in printed.out) == (lost != "report.md")


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_leaves_the_small_ones(tmp_path: Path):
    """Nothing larger than 8 KB can be written: claims.json and the tables of one small cell."""
    write_cell(tmp_path, "bundled_lm", {"a": 1.0}, {})
    done = run_command("--outputs", str(tmp_path), "--no-kept", limit="ulimit -f 8;")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / 'report' / 'claims.json'} could not be written: File too large." in done.stderr
    assert not list((tmp_path / "report").glob(".*"))


def test_pages_of_kept_results_are_not_written_from_a_part_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kept, page = tmp_path / "kept", tmp_path / "page.md"
    folders = batchtopk(kept)
    page.write_text(f"{scoreboard.BEGIN}\nold\n{scoreboard.END}\n")
    (folders[0] / "results.json").write_text("{}")
    assert scoreboard.main(["--page", str(page), "--kept", str(kept)]) == 1
    assert keep.main(["--redraw", "--scale", "demo", "--kept", str(kept)]) == 1
    assert capsys.readouterr().err.count(f"would lack {folders[0]} (") == 2
    assert "old" in page.read_text() and not (kept / "README.md").exists()
    assert scoreboard.main(["--page", str(page), "--kept", str(tmp_path / "typo")]) == 1
    assert keep.main(["--redraw", "--kept", str(tmp_path / "typo")]) == 1
    assert capsys.readouterr().err.count("typo does not exist") == 2 and not (tmp_path / "typo").exists()


def test_the_report_says_what_it_lacks_before_the_claims(tmp_path: Path):
    folders = batchtopk(tmp_path)
    (folders[0] / "l0_histogram.parquet").write_bytes(b"PAR1")
    assert compare.main(["--outputs", str(tmp_path), "--no-kept"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.index("## Left out") < text.index("oneill/theorem-1") and "| what | why |" in text
    html = (tmp_path / "report" / "report.html").read_text()
    assert "<h2>Left out</h2>" in html and "l0_histogram.parquet" in html


def test_without_anything_left_out_the_report_has_no_such_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_cell(tmp_path, "bundled_lm", {"a": 1.0}, {})
    assert compare.main(["--outputs", str(tmp_path), "--no-kept"]) == 0
    assert "Left out" not in (tmp_path / "report" / "report.md").read_text() and not capsys.readouterr().err


def test_the_terminal_shows_texts_and_obeys_none_of_them():
    shown = compare._terminal(Judgement(verdict="agrees", ours="[red]a[/] \x1b[31m; b"))
    assert shown.plain == "agrees\n[red]a[/] \ufffd[31m" and str(shown.spans[0].style) == "green"


def test_numbers_that_are_none_are_null_in_claims_json():
    content: Any = {"a": [float("nan"), 1.5, (float("inf"),)], "b": "<x>"}
    assert compare._finite(content) == {"a": [None, 1.5, [None]], "b": "<x>"}
