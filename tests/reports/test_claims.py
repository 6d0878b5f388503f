"""Claims files are checked when they are loaded; papers are folders that the report finds."""

import json
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from core.errors import UserError
from reports import compare, figures, papers
from reports.checks.outcomes import ROUNDING, range_of
from reports.claims import PAPERS, load_paper, load_papers, with_derived
from reports.collect import CONF, KEPT, Cell, read_cells
from tests.composing import composed

ROW = "{id: toy/1, origin: own, statement: s, where: w, source: s, confidence: high, paper_note: lower, check: {CHECK}}"
DRAWS = "draws: {data: none, initialisation: seed}"
CHECK = "kind: within, metric: nmse, methods: [TopK], at_most: 0.3"


def write_paper(
    folder: Path, row: str = ROW.replace("CHECK", CHECK), rows: str = "match: [method.k]\nmetrics: [nmse]\n" + DRAWS
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


def test_the_five_papers_have_a_folder_and_two_of_them_are_planned():
    papers = load_papers()
    assert [paper.name for paper in papers] == ["leask", "minder", "oneill", "paulo", "song"]
    planned = [paper.name for paper in papers if not paper.claims]
    assert planned in (["minder", "paulo", "song"], ["paulo", "song"])


VALID = ROW.replace("CHECK", CHECK)
ROWS = "match: [method.k]\nmetrics: [nmse]\n" + DRAWS
ANCHORED = VALID.replace("check:", "cells: {paper: {}}, anchors: [ANCHOR], check:")
NEAR = "kind: near, metric: nmse, over: [method], points: [[TopK, 0.3]], margin: 0.1, because: ours"
WRONG = [
    ({"row": VALID.replace("where:", "were:")}, "toy_sizes.yaml: .*unexpected keyword .*were"),
    ({"rows": ROWS + "\ncolums: [nmse]"}, "toy_sizes.yaml: .*unexpected keyword .*colums"),
    ({"row": VALID.replace("within", "wihtin")}, "toy/1: kind: 'wihtin'"),
    ({"row": VALID.replace("at_most", "at_moist")}, "toy/1: check within: .*at_moist"),
    ({"row": VALID.replace("0.3", "3e1")}, "toy/1: at_least, at_most: .*'3e1' are not two numbers"),
    ({"row": VALID.replace("at_most: 0.3", "at_most: 0.3, at_least: 0.4")}, "toy/1: at_least: 0.4 is above at_most"),
    ({"row": VALID.replace(", at_most: 0.3", "")}, "toy/1: at_least or at_most is needed"),
    ({"row": VALID.replace("methods: [TopK]", "methods: TopK")}, "toy/1: methods: 'TopK' is not a list"),
    ({"row": VALID.replace("methods: [TopK]", "methods: []")}, r"toy/1: methods: \(\) is not a list"),
    ({"row": VALID.replace("paper_note: lower", "paper: 0.3")}, "toy/1.*never compared with demo"),
    ({"row": VALID.replace("paper_note: lower, ", "")}, "toy/1: paper: null needs a paper_note"),
    ({"row": VALID.replace("origin: own", "origin: mine")}, "toy/1: origin: 'mine' is not one of paper, authors, own"),
    ({"row": VALID.replace("origin: own, ", "")}, "toy/1: .*origin"),
    ({"row": VALID.replace("confidence: high", "confidence: sure")}, "toy/1: confidence: 'sure' is not one of"),
    ({"row": VALID.replace("check:", "after_results: true, check:")}, "toy/1: after_results: True is not a text"),
    ({"row": VALID.replace("check:", "cells: {papr: {}}, check:")}, "toy/1: cells: papr is not one of paper, demo"),
    ({"row": VALID.replace("check:", "cells: {paper: TopK}, check:")}, "toy/1: cells: 'TopK' is not settings"),
    ({"row": VALID.replace("check:", "cells: [paper], check:")}, "toy/1: cells: .* is not a mapping"),
    ({"row": VALID.replace("statement: s", "statement: 3")}, "toy/1: statement: 3 is not a text"),
    ({"row": ANCHORED.replace("ANCHOR", "{value: 1, what: 900, mark: m}")}, "toy/1: anchors: what, mark: 900"),
    ({"row": ANCHORED.replace("ANCHOR", "{value: 1, what: after 1,000 steps, mark: m}")}, "toy/1: .*needs quotes"),
    ({"row": ANCHORED.replace("ANCHOR", "{value: 1, what: w}")}, r"toy/1: anchors: \['value', 'what'\] is not mark"),
    ({"row": ANCHORED.replace("ANCHOR", "{value: 1, what: w, mark: m, note: n}")}, "toy/1: anchors: .*'note'"),
    ({"row": ANCHORED.replace("ANCHOR", "{value: [1, 2, 3], what: w, mark: m}")}, "toy/1: anchors: value"),
    ({"row": ANCHORED.replace("ANCHOR", "300")}, "toy/1: anchors: 300 is not"),
    ({"row": ROW.replace("CHECK", NEAR.replace(", because: ours", ""))}, "toy/1: check near: .*because"),
    ({"row": ROW.replace("CHECK", NEAR.replace("ours", "''"))}, "toy/1: because: says where the margin comes from"),
    ({"row": ROW.replace("CHECK", NEAR.replace("0.3]", "0.3, 0.1, 0.02]"))}, "toy/1: points: .*`runs` must say"),
    ({"row": VALID.replace("id: toy/1", "id: toy/1, id: toy/2")}, "toy_sizes.yaml: .*the key id stands twice"),
    ({"rows": ROWS + "\nmatch: [method.m]"}, "toy_sizes.yaml: .*the key match stands twice"),
    ({"rows": "match: [method.k\nmetrics: [nmse]"}, "toy_sizes.yaml: .*line"),
    ({"rows": "match: [method.k]\nmetrics: [nmse]"}, "toy_sizes.yaml: draws: None does not say what a seed draws"),
    ({"rows": ROWS.replace("data: none", "date: none")}, "toy_sizes.yaml: draws: .* does not say"),
    ({"rows": ROWS.replace("data: none", "data: 3")}, "toy_sizes.yaml: draws: data: 3 is not `seed`"),
    ({"rows": ROWS.replace("data: none", "data: seed if x")}, "toy_sizes.yaml: draws: data: 'seed if x' is not"),
    ({"rows": ROWS.replace("[nmse]", "nmse")}, "toy_sizes.yaml: metrics: is not a list"),
    ({"rows": ROWS + "\nclustered: {nsme: why}"}, "toy_sizes.yaml: clustered: nsme is not among the metrics"),
    ({"rows": ROWS + "\nclustered: [nmse]"}, "toy_sizes.yaml: clustered: is not metrics with the reason"),
    ({"row": VALID.replace("nmse", "nsme")}, r"toy_sizes.yaml: nothing emits the metric nsme \(read by toy/1\)"),
    (
        {"row": VALID.replace("methods", "reference: metrics.l0, methods")},
        r"toy_sizes.yaml: nothing emits the metric l0 \(read by toy/1\)",
    ),
    (
        {"row": ROW.replace("CHECK", NEAR + ", chance: luck")},
        r"toy_sizes.yaml: nothing emits the metric luck \(read by toy/1\)",
    ),
    ({"rows": "match: [method.k]\n" + DRAWS}, r"toy_sizes.yaml: nothing emits the metric nmse \(read by toy/1\)"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_key_or_check_is_an_error_that_names_the_file(change: dict[str, str], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        load_paper(write_paper(tmp_path, **change))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("title: Toy\nshort: Toy\nrange: {}", "unexpected keyword .*range"),
        ("title: Toy\nshort: Toy\nranges: {nmse: 3}", "ranges: nmse: 3 is not"),
        ("title: Toy\nshort: Toy\nranges: {nmse: [0, one]}", "ranges: nmse: .*'one'"),
        ("[title, short]", "is not a mapping"),
        ("title: [", "line"),
    ],
)
def test_what_is_wrong_about_a_paper_is_an_error_that_names_its_file(about: str, message: str, tmp_path: Path):
    folder = write_paper(tmp_path)
    (folder / "paper.yaml").write_text(about)
    with pytest.raises(UserError, match=rf"paper.yaml: .*{message}"):
        load_paper(folder)


def test_two_claims_of_one_id_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="two claims have the id toy/1"):
        load_paper(write_paper(tmp_path, f"{VALID}\n  - {VALID}"))


MUTATIONS = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(list("{}[],:&*!|>'\"%@ \n\t-#1a\0"))), max_size=4
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(MUTATIONS, st.booleans())
def test_a_damaged_claims_file_is_read_or_refused_by_name(changes: list[tuple[int, str]], insert: bool):
    with TemporaryDirectory() as scratch:
        folder = write_paper(Path(scratch), ANCHORED.replace("ANCHOR", "{value: 1, what: w, mark: m}"))
        path = folder / "claims" / "toy_sizes.yaml"
        text = path.read_text()
        for at, character in changes:
            at %= len(text)
            text = text[:at] + character + text[at + (not insert) :]
        path.write_text(text)
        try:
            load_paper(folder)
        except UserError as error:
            assert "toy_sizes.yaml" in str(error) or "two claims" in str(error)


def test_claims_are_counted_by_whose_they_are_and_those_after_the_result_by_themselves():
    claims = [claim for paper in load_papers() for claim in paper.claims]
    marked = {claim.id for claim in claims if claim.group == "after"}
    named = ("dictionary-15", "theorem-8", "codes-10", "codes-11", "regimes-7b", "sparsity-9b", "unknown-16b")
    assert {f"oneill/{name}" for name in named} <= marked
    sanity = {claim.id for claim in claims if claim.origin == "sanity"}
    hardly = [f"oneill/theorem-{n}" for n in (1, 2, 4, 6, 9)] + ["oneill/dictionary-11", "oneill/large-6"]
    assert {*hardly, "leask/batchtopk-5c", *(f"leask/stitching-{n}" for n in ("1a", "3d", "3e"))} <= sanity
    assert all(claim.kind.startswith(("the paper", "the authors", "own check", "sanity check")) for claim in claims)


@pytest.fixture(scope="module")
def kept() -> list[Cell]:
    return with_derived(load_papers(), read_cells(KEPT))


def test_every_metric_that_is_read_has_a_range_and_kept_results_lie_in_it(kept: list[Cell]):
    for paper in load_papers():
        cells = [cell for cell in kept if cell.experiment in paper.experiments]
        for experiment in paper.experiments:
            for metric in paper.metrics(experiment):
                assert any(fnmatchcase(metric, pattern) for pattern in paper.ranges), metric
                low, high = range_of(metric, paper.ranges)
                values = [c.metrics[metric] for c in cells if c.experiment == experiment and metric in c.metrics]
                assert all(low - ROUNDING <= value <= high + ROUNDING for value in values), (experiment, metric)


def dotted(config: Any, prefix: str = "") -> set[str]:
    """Every key of nested settings, `a.b`."""
    if not isinstance(config, dict):
        return {prefix.removesuffix(".")}
    return {key for name, value in config.items() for key in dotted(value, f"{prefix}{name}.")}


def test_the_settings_that_claims_name_are_settings_of_their_experiments(kept: list[Cell]):
    """A condition on a setting that no cell has would let every cell pass."""
    for paper in load_papers():
        for experiment, rows in paper.experiments.items():
            known = {key for cell in kept if cell.experiment == experiment for key in cell.settings}
            if not known:
                known = dotted(OmegaConf.to_container(composed(f"experiment={experiment}"), resolve=False))
            claims = [claim for claim in paper.claims if claim.experiment == experiment]
            asked = {
                key
                for claim in claims
                for where in claim.cells.values()
                for one in (where if isinstance(where, list) else [where])
                for key in one
            }
            exceptions = {"seed", "none", "coder.solver.kind"}
            assert (asked | rows.draws.settings) - exceptions <= known, experiment


def test_a_metric_that_nothing_emits_is_an_error_for_every_experiment_and_all_are_named(tmp_path: Path):
    """A name that nothing emits is planted among the columns of every claims file of the repository."""
    planted = tmp_path / "papers"
    shutil.copytree(PAPERS, planted)
    paths = sorted(planted.glob("*/claims/*.yaml"))
    for path in paths:
        path.write_text(path.read_text().replace("columns: [", f"columns: [no_such_{path.stem}, ", 1))
    with pytest.raises(UserError) as error:
        load_papers(planted)
    assert len(paths) >= 15
    assert str(error.value).splitlines() == [
        f"{path}: nothing emits the metric no_such_{path.stem} (read by columns). Correct or declare it."
        for path in paths
    ]


def test_all_errors_of_a_file_are_named_together(tmp_path: Path):
    rows = f"match: [method.k]\nmetrics: [mse]\ncolumns: [nsme, mse, l00]\n{DRAWS}"
    with pytest.raises(UserError) as error:
        load_paper(write_paper(tmp_path, VALID.replace("within", "wihtin"), rows))
    found = [line.split("toy_sizes.yaml: ")[1].split(" (read")[0] for line in str(error.value).splitlines()]
    assert found[0].startswith("toy/1: kind: 'wihtin' is not one of")
    assert found[1:] == ["nothing emits the metric nsme", "nothing emits the metric l00"]


def test_a_claim_that_needs_something_may_name_a_metric_that_nothing_emits_yet(tmp_path: Path):
    row = VALID.replace("id: toy/1", "id: toy/1, needs: a probe").replace("nmse", "probe_accuracy")
    assert load_paper(write_paper(tmp_path, row)).claims[0].needs == "a probe"


def test_the_kept_results_have_every_metric_that_is_declared(kept: list[Cell]):
    names = sorted({cell.experiment for cell in kept})
    assert len(names) >= 14
    for experiment, rows in [item for paper in load_papers() for item in paper.experiments.items() if item[0] in names]:
        emitted = {name for cell in kept if cell.experiment == experiment for name in cell.metrics}
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
    judged = claim["scales"]["paper"]
    assert judged["verdict"] == "agrees (one value)" and judged["ours"].startswith("0.25")
    assert judged["settings"][0]["n"] == 1 and judged["settings"][0]["interval"] == [None, None]
    assert (toy / "outputs" / "report" / "figures" / "toy.svg").read_text().startswith("<?xml")
