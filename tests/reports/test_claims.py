"""Claims files are checked when they are loaded; papers are folders that the report finds."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import UserError
from reports import compare, figures, papers
from reports.claims import PAPERS, load_paper, load_papers, with_derived
from reports.collect import CONF, KEPT, read_cells

ROW = "{id: toy/1, statement: s, where: w, source: s, confidence: high, paper_note: lower, check: {CHECK}}"
CHECK = "kind: within, metric: nmse, methods: [TopK], at_most: 0.3"


def write_paper(
    folder: Path, row: str = ROW.replace("CHECK", CHECK), rows: str = "match: [method.k]\nmetrics: [nmse]"
) -> Path:
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
    ({"row": VALID.replace("nmse", "nsme")}, r"toy_sizes.yaml: nothing emits the metric nsme \(read by toy/1\)"),
    (
        {"row": VALID.replace("methods", "reference: metrics.l0, methods")},
        r"toy_sizes.yaml: nothing emits the metric l0 \(read by toy/1\)",
    ),
    ({"rows": "match: [method.k]"}, r"toy_sizes.yaml: nothing emits the metric nmse \(read by toy/1\)"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_key_or_check_is_an_error_that_names_the_file(change: dict[str, str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_paper(write_paper(tmp_path, **change))


def test_a_metric_that_nothing_emits_is_an_error_for_every_experiment_and_all_are_named(tmp_path: Path):
    """A name that nothing emits is planted among the columns of every claims file of the repository."""
    planted = tmp_path / "papers"
    shutil.copytree(PAPERS, planted)
    paths = sorted(planted.glob("*/claims/*.yaml"))
    for path in paths:
        path.write_text(path.read_text().replace("columns: [", f"columns: [no_such_{path.stem}, ", 1))
    with pytest.raises(UserError) as error:
        load_papers(planted)
    assert len(paths) == 14
    assert str(error.value).splitlines() == [
        f"{path}: nothing emits the metric no_such_{path.stem} (read by columns). Correct or declare it."
        for path in paths
    ]


def test_all_errors_of_a_file_are_named_together(tmp_path: Path):
    rows = "match: [method.k]\nmetrics: [mse]\ncolumns: [nsme, mse, l00]"
    with pytest.raises(UserError) as error:
        load_paper(write_paper(tmp_path, VALID.replace("within", "wihtin"), rows))
    found = [line.split("toy_sizes.yaml: ")[1].split(" (read")[0] for line in str(error.value).splitlines()]
    assert found[0].startswith("toy/1: kind: 'wihtin' is not one of")
    assert found[1:] == ["nothing emits the metric nsme", "nothing emits the metric l00"]


def test_a_claim_that_needs_something_may_name_a_metric_that_nothing_emits_yet(tmp_path: Path):
    row = VALID.replace("id: toy/1", "id: toy/1, needs: a probe").replace("nmse", "probe_accuracy")
    assert load_paper(write_paper(tmp_path, row)).claims[0].needs == "a probe"


def test_the_kept_results_have_every_metric_that_is_declared():
    everything = load_papers()
    cells = with_derived(everything, read_cells(KEPT))
    kept = sorted({cell.experiment for cell in cells})
    assert len(kept) == 13
    for experiment, rows in [item for paper in everything for item in paper.experiments.items() if item[0] in kept]:
        emitted = {name for cell in cells if cell.experiment == experiment for name in cell.metrics}
        assert {*rows.metrics, *rows.derived} - emitted == set(), experiment


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A paper that is a folder outside the repository, with a derived metric and a figure."""
    folder = write_paper(tmp_path / "papers", ROW.replace("CHECK", CHECK.replace("metric: nmse", "metric: halved")))
    (folder / "derived.py").write_text(
        "from dataclasses import replace\n"
        "METRICS = {'toy_sizes': ['halved']}\n"
        "def derive(cells):\n"
        "    return [replace(c, metrics={**c.metrics, 'halved': c.metrics['nmse'] / 2}) for c in cells]\n"
    )
    (folder / "figures").mkdir()
    (folder / "figures" / "toy_sizes.py").write_text(
        "from matplotlib.figure import Figure\n"
        "from reports.figures import Drawing\n"
        "def drawings(cells):\n"
        "    yield Drawing('toy', cells, lambda own: Figure())\n"
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
    assert (toy / "outputs" / "report" / "figures" / "toy.svg").read_text().startswith("<?xml")
