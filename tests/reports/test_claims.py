"""Claims files are checked when they are loaded; papers are folders that the report finds."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.errors import UserError
from reports import compare, figures, papers
from reports.claims import PAPERS, load_paper, load_papers, unknown_metrics, validate_metrics, with_derived
from reports.collect import CONF, KEPT, Cell, read_cells

ROW = "{id: toy/1, statement: s, where: w, source: s, confidence: high, paper_note: lower, check: {CHECK}}"
CHECK = "kind: within, metric: nmse, methods: [TopK], at_most: 0.3"


def write_paper(folder: Path, row: str = ROW.replace("CHECK", CHECK), rows: str = "match: [method.k]") -> Path:
    (folder / "toy" / "claims").mkdir(parents=True)
    (folder / "toy" / "paper.yaml").write_text("title: Toy\nshort: Toy")
    (folder / "toy" / "claims" / "toy_sizes.yaml").write_text(f"{rows}\nclaims:\n  - {row}\n")
    return folder / "toy"


def test_every_claim_in_the_repository_can_be_checked_and_has_an_id_of_its_own():
    claims = [claim for paper in load_papers() for claim in paper.claims]
    assert len({claim.id for claim in claims}) == len(claims) > 20


def test_every_claims_experiment_exists_and_every_claim_has_its_papers_name():
    experiments = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    for paper in load_papers():
        assert set(paper.experiments) <= experiments
        assert all(claim.id.startswith(f"{paper.name}/") for claim in paper.claims)


def test_the_five_papers_have_a_folder_and_three_of_them_are_planned():
    assert [paper.name for paper in load_papers() if paper.claims] == ["leask", "oneill"]
    assert [paper.name for paper in load_papers() if not paper.claims] == ["minder", "paulo", "song"]


VALID = ROW.replace("CHECK", CHECK)
WRONG = [
    ({"row": VALID.replace("where:", "were:")}, "toy_sizes.yaml: .*unexpected keyword .*were"),
    ({"rows": "match: [method.k]\ncolums: [nmse]"}, "toy_sizes.yaml: .*unexpected keyword .*colums"),
    ({"row": VALID.replace("within", "wihtin")}, "toy/1: kind: 'wihtin'"),
    ({"row": VALID.replace("paper_note: lower", "paper: 0.3")}, "toy/1.*never compared with demo"),
    ({"row": VALID.replace("paper_note: lower, ", "")}, "toy/1: paper: null needs a paper_note"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_key_or_check_is_an_error_that_names_the_file(change: dict[str, str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_paper(write_paper(tmp_path, **change))


def test_the_kept_results_have_every_metric_that_the_claims_and_tables_read():
    everything = load_papers()
    cells = with_derived(everything, read_cells(KEPT))
    kept = {cell.experiment for cell in cells}
    unknown = {
        experiment: unknown_metrics(paper, experiment, cells)
        for paper in everything
        for experiment in paper.experiments
        if experiment in kept
    }
    assert len(unknown) == 9 and not any(unknown.values()), unknown


def test_the_smoke_cells_of_leask_batchtopk_have_every_metric(smoke_cells: Callable[..., list[Cell]]):
    """The other experiments without kept results are compared with their claims in their own tests."""
    cells = smoke_cells("leask_batchtopk", "evaluation.compat_tokens=64")
    assert unknown_metrics(load_paper(PAPERS / "leask"), "leask_batchtopk", cells) == {}


def test_a_column_that_a_finished_grid_lacks_is_an_error_and_a_part_of_a_grid_is_not(tmp_path: Path):
    paper = load_paper(write_paper(tmp_path, rows="match: [method.k]\ncolumns: [nsme]"))
    cell = Cell("toy_sizes", "paper", 0, tmp_path, {"nmse": 0.2}, {"method._target_": "core.TopK"}, {})
    assert unknown_metrics(paper, "toy_sizes", [cell]) == {"nsme": ["columns"]}
    with pytest.raises(UserError, match=r"toy_sizes.yaml: .* nsme \(read by columns\)"):
        validate_metrics([paper], [cell])
    validate_metrics([paper], [])


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A paper that is a folder outside the repository, with a derived metric and a figure."""
    folder = write_paper(tmp_path / "papers", ROW.replace("CHECK", CHECK.replace("metric: nmse", "metric: halved")))
    (folder / "derived.py").write_text(
        "from dataclasses import replace\n"
        "def derive(cells):\n"
        "    return [replace(c, metrics={**c.metrics, 'halved': c.metrics['nmse'] / 2}) for c in cells]\n"
    )
    (folder / "figures").mkdir()
    (folder / "figures" / "toy_sizes.py").write_text(
        "def draw(cells, folder):\n    path = folder / 'toy.svg'\n    path.write_text('a figure')\n    return [path]\n"
    )
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(folder.parent)])
    for module in (compare, figures):
        monkeypatch.setattr(module, "PAPERS", folder.parent, raising=False)
    monkeypatch.setattr(compare, "load_papers", lambda: load_papers(folder.parent))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("reports.papers.toy")]:
        del sys.modules[name]


def test_adding_a_paper_is_adding_a_folder(toy: Path):
    cell = toy / "outputs" / "toy_sizes" / "paper" / "base"
    cell.mkdir(parents=True)
    record = {"experiment": "toy_sizes", "scale": "paper", "seed": 0, "commit": "0", "device": "cpu", "seconds": 1.0}
    config = {"method": {"_target_": "core.methods.topk.TopK", "k": 4}}
    record |= {"versions": {}, "metrics": {"nmse": 0.5}, "config": config}
    (cell / "results.json").write_text(json.dumps(record))
    assert compare.main(["--outputs", str(toy / "outputs"), "--no-kept"]) == 0
    [claim] = json.loads((toy / "outputs" / "report" / "claims.json").read_text())
    assert claim["scales"]["paper"]["verdict"] == "agrees" and claim["scales"]["paper"]["ours"].startswith("0.25")
    assert (toy / "outputs" / "report" / "figures" / "toy.svg").read_text() == "a figure"
