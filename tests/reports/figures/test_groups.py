"""Cells of different language models or sites in one outputs folder are never drawn into one figure."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from reports.collect import Cell
from reports.figures import draw
from reports.figures.groups import by_model

METHOD = {"method._target_": "core.methods.batchtopk.BatchTopK", "method.k": 8, "method.dict_size": 64}
META = {"rows": "base", "meta.preset": "lw", "meta.method.k": 4, "meta.method.dict_size": 6, "meta.method.aux": "r1"}
KINDS = ("meta", "third", "random", "swap", "swap_at_entity")
PANELS = ("reached_proper_fraction", "reached_all", "target_change_nats", "other_change_nats")
EXPERIMENTS = {
    "leask_batchtopk": (METHOD, ("nmse_token_std", "ce_degradation", "l0_mean")),
    "leask_meta_sae": (META, ("ve", "ve_null", "n_rows")),
    "leask_stitching": ({**METHOD, "part": "frankenstein"}, ()),
    "leask_editing": ({}, [f"{metric}_{kind}" for metric in PANELS for kind in KINDS]),
    "oneill_llm": ({"profile": "paper_text", "method._target_": "core.methods.lca.LCA"},
                   ("fvu", "alive_fraction", "l0_mean")),
}  # fmt: skip


def cell(experiment: str, folder: Path, model: str, site: str, source: str, value: float) -> Cell:
    """Its metrics are all `value`; the error of what is grown too."""
    own, metrics = EXPERIMENTS[experiment]
    place = folder / f"{model}_{site}_{source}"
    place.mkdir(parents=True)
    table = pd.DataFrame({"kind": ["family", "family", "grown"], "n_latents": [8, 16, 16]})
    table.assign(mse=value, mse_refit=value, l0=value).to_parquet(place / "frankenstein.parquet")
    settings = {"model.name": model, "model.source": source, "stream.site": site, **own}
    return Cell(experiment, "demo", 0, place, dict.fromkeys(metrics, value), settings, {})


@pytest.fixture(autouse=True)
def _files_hold_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The title, lines and bars of a figure, in place of a picture: seconds less."""

    def write(figure: Figure, file: BytesIO, **_: object) -> None:
        lines = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
        bars = [patch.get_bbox().bounds for axes in figure.axes for patch in axes.patches]
        file.write(f"{figure.get_suptitle()} {lines} {bars}".encode())

    monkeypatch.setattr(Figure, "savefig", write)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_model_and_site_has_figures_of_its_own_as_if_it_were_alone(experiment: str, tmp_path: Path):
    models = [("bundled", "resid_pre.4"), ("gpt2_small", "resid_pre.4"), ("gpt2_small", "resid_pre.8")]
    cells = [cell(experiment, tmp_path, *model, model[0], 0.2 * (i + 1)) for i, model in enumerate(models)]
    together = draw(experiment, cells, tmp_path / "together")
    alone = [path for i, one in enumerate(cells) for path in draw(experiment, [one], tmp_path / str(i))]
    assert len(together) == len(set(together)) > 0
    assert {path.name: path.read_text() for path in together} == {path.name: path.read_text() for path in alone}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_models_from_different_places_are_told_apart_where_their_names_are_the_same(experiment: str, tmp_path: Path):
    cells = [cell(experiment, tmp_path, "local", "resid_pre.4", source, 0.5) for source in ("a", "b")]
    one = draw(experiment, cells[:1], tmp_path / "one")
    assert len(draw(experiment, cells, tmp_path / "both")) == 2 * len(one) > 0


def test_groups_say_what_they_hold_and_keep_seeds_together(tmp_path: Path):
    one = cell("leask_batchtopk", tmp_path, "hub", "resid_pre.4", "lab/lm", 1.0)
    [group] = by_model([one, replace(one, seed=1)], "method")
    assert group.title == "hub, resid_pre.4, BatchTopK, demo scale" and len(group.cells) == 2
    assert group.name == "demo_hub_resid_pre.4_BatchTopK"
    later = replace(one, settings={**one.settings, "model.revision": "step1000"})
    assert [(group.title, group.name) for group in by_model([one, later])] == [
        ("hub lab/lm, resid_pre.4, demo scale", "demo_hub-1_resid_pre.4"),
        ("hub lab/lm at step1000, resid_pre.4, demo scale", "demo_hub-2_resid_pre.4"),
    ]
