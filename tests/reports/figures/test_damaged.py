"""Every figure is drawn without the cells whose side file is missing or damaged, and those are named."""

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from core.bench import TABLE
from reports import figures, looks
from reports.claims import load_papers, with_derived
from reports.collect import KEPT, Cell, read_cells
from reports.left_out import Omission, noting
from tests.reports.trees import CONTENTS, stacks, write_cell

# experiment -> its side files, and how the names of the figures end that need them
SIDE_FILES = {
    "leask_batchtopk": {"l0_histogram.parquet": ["l0_histogram"]},
    "leask_editing": {},
    "leask_meta_sae": {"cosines.parquet": ["cosines", "decoders"]},
    "leask_stitching": {
        "latents.parquet": ["latents"], "interpolation.parquet": ["interpolation"], "frankenstein.parquet": ["grown"],
    },
    "minder_planted": {"latents.parquet": ["nu"]},
    "minder_tools": {},
    "oneill_ablations": {"atoms.parquet": ["geometry"]},
    "oneill_classical": {},
    "oneill_known_codes": {"curves.parquet": ["curves"]},
    "oneill_known_dictionary": {"curves.parquet": ["curves", "starts"]},
    "oneill_large_scale": {"curves.parquet": ["paper"]},
    "oneill_regimes": {},
    "oneill_sparsity": {},
    "oneill_theorem": {"illustration.parquet": ["base"]},
    "oneill_unknown": {"curves.parquet": ["curves", "starts"]},
    "bench_scaling": {"scaling.parquet": ["=0"]},
    "bench_train_step": {TABLE: ["=0"]},
}  # fmt: skip
STACKED = ("oneill_known_codes", "oneill_known_dictionary", "oneill_unknown")
DAMAGED = {"missing": None, "empty": b"", "an object": b"{}", "half": b"half", "deep": CONTENTS[4]}


@pytest.fixture(autouse=True)
def _no_picture_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def rendered(figure: Figure) -> dict[str, bytes]:
        looks.tame(figure)
        return {"png": b""}

    monkeypatch.setattr(looks, "rendered", rendered)


def tree(experiment: str, folder: Path, n_cells: int = 40) -> Path:
    """Kept cells of an experiment, small ones where the kept are large, or a made one of a benchmark."""
    if experiment in STACKED:
        stacks(folder, experiment)
        return folder
    if experiment.startswith("bench"):
        cell = write_cell(folder, experiment, {"a": 1.0}, {})
        row = {"who": "ours", "method": "topk", "dict_size": 64, "version": "1"}
        row |= {"step over product": 2.0, "quartile 1": 1.0, "quartile 3": 3.0}
        (cell / TABLE).write_text(json.dumps({"rows": [row], "notes": ["a CPU"]}))
        axes = ("dict_size", "k", "batch_size", "n_dictionaries")
        points = [{"axis": axis, "value": 2, "over_product": 2.0, "quartile1": 1.0, "quartile3": 3.0} for axis in axes]
        pd.DataFrame(points).assign(rows_per_second=5.0).to_parquet(cell / "scaling.parquet")
        return folder
    for cell in sorted((KEPT / experiment).glob("*/*"))[:n_cells]:
        shutil.copytree(cell, folder / cell.relative_to(KEPT), ignore=shutil.ignore_patterns("answers*"))
    return folder


papers = cache(load_papers)


def drawn(experiment: str, folder: Path) -> tuple[list[str], list[Omission]]:
    with noting() as omissions:
        cells: Sequence[Cell] = with_derived(papers(), read_cells(folder))
        names = [name.removesuffix(".png") for name, _ in figures.drawn(experiment, cells)]
    return names, omissions


def test_every_figure_module_is_in_the_table():
    modules = {path.stem for path in KEPT.parent.glob("papers/*/figures/*_*.py")}
    modules |= {path.stem for path in KEPT.parent.glob("figures/*_*.py")} - {"__init__"}
    assert modules - {"__init__"} == {*SIDE_FILES, "oneill_llm", "bench_quality"}  # these read none


SLOW = ("leask_stitching", "oneill_ablations", "oneill_classical", "oneill_large_scale", "oneill_regimes")
CASES = [
    pytest.param(experiment, name, marks=pytest.mark.slow if experiment in SLOW else [])
    for experiment, names in SIDE_FILES.items()
    for name in names
]


@pytest.mark.parametrize(("experiment", "name"), CASES)
def test_a_side_file_that_is_missing_or_damaged_costs_its_cell_alone(experiment: str, name: str, tmp_path: Path):
    """Where one cell's file is damaged, the figures are those without the cell; no other figure is lost."""
    whole, _ = drawn(experiment, tree(experiment, tmp_path))
    paths = sorted(tmp_path.rglob(name))
    kept, without = paths[0].read_bytes(), list[str]()
    listed = name in json.loads((paths[0].parent / "results.json").read_text()).get("files", {})  # newer results say so
    for how, content in DAMAGED.items():
        paths[0].unlink(missing_ok=True)
        if content is not None:
            paths[0].write_bytes(kept[: len(kept) // 2] if content == b"half" else content)
        names, omissions = drawn(experiment, tmp_path)
        if how == "missing":
            without = names
            assert all(one.endswith(tuple(SIDE_FILES[experiment][name])) for one in set(whole) - set(names))
        assert names == without, how
        expected = {str(paths[0])} if listed or how != "missing" else set()
        assert {omission.what for omission in omissions} == expected, how


@pytest.mark.parametrize(("experiment", "name"), CASES)
def test_without_any_side_file_the_other_figures_are_drawn(experiment: str, name: str, tmp_path: Path):
    whole, _ = drawn(experiment, tree(experiment, tmp_path))
    for path in tmp_path.rglob(name):
        path.write_bytes(b"PAR1")
    names, omissions = drawn(experiment, tmp_path)
    assert names == [one for one in whole if not one.endswith(tuple(SIDE_FILES[experiment][name]))]
    assert len(omissions) == len(list(tmp_path.rglob(name)))


@pytest.mark.parametrize(
    "experiment", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else []) for one in SIDE_FILES]
)
def test_a_cell_without_metrics_or_settings_costs_no_figure(experiment: str, tmp_path: Path):
    """Beside whole cells stand one without any metric, and one without any setting but its seed."""
    if experiment.startswith("bench"):
        pytest.skip("each cell of a benchmark has a figure of its own")
    whole, _ = drawn(experiment, tree(experiment, tmp_path))
    scale = next((tmp_path / experiment).iterdir()).name
    source = sorted(tmp_path.rglob("results.json"))[0]
    for name, change in (("no_metrics", {"metrics": {}}), ("no_settings", {"config": {}})):
        place = tmp_path / experiment / scale / name
        shutil.copytree(source.parent, place)
        record = json.loads((place / "results.json").read_text()) | change
        (place / "results.json").write_text(json.dumps(record))
        runs = place / "runs.parquet"
        if name == "no_metrics" and runs.exists():
            table = pd.read_parquet(runs)
            table[[column for column in table if not column.startswith("metrics.")]].to_parquet(runs)
    names, _ = drawn(experiment, tmp_path)
    assert set(whole) <= set(names)
