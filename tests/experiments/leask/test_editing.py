"""leask_editing: what its grid asks for, which pairs it takes, what a cell leaves behind, and the figure."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig, OmegaConf

import run as runner
import tests.composing
from core.errors import UserError
from core.text.facts import Facts
from experiments.common import build
from experiments.leask.editing import check, summary, trios
from hydra_plugins.blocks_sweeper.sweeper import cells_of
from reports.claims import PAPERS, load_paper, unknown_metrics
from reports.collect import read_cells
from reports.figures import draw

composed = partial(tests.composing.composed, "experiment=leask_editing")


def grid(scale: str, every: int = 1) -> list[DictConfig]:
    cells = cells_of(composed(f"scale={scale}").grid[scale], [])
    return [composed(f"scale={scale}", *cell) for cell in cells[::every]]


def test_the_paper_grid_edits_the_papers_cities_in_the_published_dictionary():
    for cfg in grid("paper", every=5):
        OmegaConf.resolve(cfg)
        assert (cfg.model.name, cfg.stream.site, cfg.method.dict_size) == ("gpt2_small", "resid_pre.8", 49152)
        assert cfg.method._target_.startswith("core.interop") and cfg.method.path == "blocks.8.hook_resid_pre_49152"
        assert (cfg.meta.method.dict_size, cfg.meta.method.k) == (2304, 4)
        assert build(cfg.facts).entities == ["Tokyo", "Paris", "Cairo"] and not build(cfg.facts).statements


def test_the_paper_grid_has_every_preset_for_tokyo_and_paris():
    cells = [dict(pair.split("=", 1) for pair in cell) for cell in cells_of(composed("scale=paper").grid.paper, [])]
    keys = ("meta", "editing.preset", "editing.splice")
    table = [tuple(cell[key] for key in keys) for cell in cells if cell.get("editing.pairs") == "[[Tokyo,Paris]]"]
    presets, splices = ("rebuild", "difference", "script_compat"), ("error_kept", "reconstruction")
    assert set(table) == set(product(("iclr", "lw"), presets, splices)) and len(table) == 12


@pytest.mark.parametrize("scale", ["demo", "smoke"])
def test_every_other_cell_plants_its_facts_in_the_bundled_model(scale: str):
    for cfg in grid(scale, every=3):
        OmegaConf.resolve(cfg)
        assert cfg.model.name == "bundled" and build(cfg.facts).statements == build(cfg.data).facts.statements


def facts(*values: str) -> Facts:
    """Entities e0, e1, ... with one letter for each of two attributes."""
    answers = {f"e{i}": {"a": pair[0], "b": pair[1]} for i, pair in enumerate(values)}
    return Facts(answers=answers, prompts={"a": ["{entity} a"], "b": ["{entity} b"]})


def test_pairs_and_their_third_entity_share_no_value():
    cfg = composed("editing.n_pairs=null")
    world = facts("xx", "yy", "zz", "xy")  # e3 shares a value with e0 and with e1
    found = trios(cfg, world, world.entities, set(world.entities))
    assert {(a, b) for a, b, _ in found} == {(a, b) for a in "012" for b in "012" if a != b} or len(found) == 6
    assert all({a, b, c} == {"e0", "e1", "e2"} for a, b, c in found)
    assert trios(composed("editing.n_pairs=2"), world, world.entities, set(world.entities)) == found[:2]


def test_entities_without_a_latent_or_with_a_wrong_answer_are_left_out_or_refused():
    world = facts("xx", "yy", "zz")
    with pytest.raises(UserError, match=r"2 of 3 entities have a latent of their own.*No three of them differ"):
        trios(composed(), world, ["e0", "e1"], set(world.entities))
    with pytest.raises(UserError, match="the model knows 2 of these"):
        trios(composed(), world, world.entities, {"e0", "e1"})
    assert trios(composed("editing.only_known=false"), world, world.entities, {"e0", "e1"})
    with pytest.raises(UserError, match="'e1' has no latent of its own"):
        trios(composed("editing.pairs=[[e0,e1]]"), world, ["e0", "e2"], set(world.entities))
    with pytest.raises(UserError, match="'e2' has an attribute that the model gets wrong"):
        trios(composed("editing.pairs=[[e0,e2]]"), world, world.entities, {"e0", "e1"})


def test_rows_weighed_by_frequency_are_refused():
    with pytest.raises(UserError, match="all decoder rows alike"):
        check(composed("meta.sampling=frequency"))


def test_facts_that_do_not_fit_are_refused_in_words():
    with pytest.raises(UserError, match="contains a name twice"):
        build(composed("facts.entities=[mag,mag]").facts)


def test_the_summary_has_means_intervals_and_differences_over_pairs():
    kinds = ("meta", "random", "third", "swap", "swap_at_entity")
    pairs = [{kind: {"reached": float(i + (kind == "meta"))} for kind in kinds} for i in range(3)]
    found = summary(pairs)
    assert found["reached_meta"] == 2 and found["reached_random"] == 1
    assert found["reached_meta_minus_third"] == found["reached_meta_minus_third_low"] == 1
    assert found["reached_meta_low"] <= 2 <= found["reached_meta_high"]
    assert "reached_meta_low" not in summary(pairs[:1])


def test_a_cell_writes_the_tables_and_metrics_that_claims_and_figure_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["experiment=leask_editing", "scale=smoke", "editing.preset=difference", "logging=none"]
    arguments += [f"output_dir={tmp_path / 'outputs'}", f"artifacts_dir={tmp_path / 'artifacts'}"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    assert runner.main() == 0
    [cell] = read_cells(tmp_path / "outputs")
    assert {path.name for path in cell.folder.glob("*.parquet")} == {
        "answers.parquet",
        "latents.parquet",
        "pairs.parquet",
    }
    answers = pd.read_parquet(cell.folder / "answers.parquet")
    assert set(answers.kind) == {"clean", "meta", "random", "third", "swap", "swap_at_entity"}
    assert (answers.log_prob < 0).all()
    assert json.loads((cell.folder / "dictionary.json").read_text())["class"].endswith("BatchTopK")
    assert unknown_metrics(load_paper(PAPERS / "leask"), "leask_editing", [cell]) == {}
    written = draw("leask_editing", [cell, replace(cell, seed=1)], tmp_path / "figures")
    assert len(written) == 2 and all(path.stat().st_size > 1000 for path in written)
