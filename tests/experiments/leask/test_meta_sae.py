"""leask_meta_sae: what its grid asks for, what a cell leaves behind, what is refused, and the figures."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

import tests.composing
from core import preflight
from core.analysis.meta_sae import decompose, score
from core.errors import UserError
from core.methods.base import DictionaryMethod
from core.methods.batchtopk import BatchTopK
from core.methods.saved import load_dictionary
from core.streams.decoder_rows import directions
from experiments.leask.meta_sae import check_family, dictionaries, excess, member, needed
from experiments.leask.meta_words import common_tokens, meta_latents_of
from hydra_plugins.blocks_sweeper.sweeper import cells_of
from reports.claims import PAPERS, load_paper, unknown_metrics
from reports.collect import Cell
from reports.figures import draw
from reports.verdicts import judge

SMALL = ["method.k=4", "base=2", "small=0", "n_replacing=2"]


composed = partial(tests.composing.composed, "experiment=leask_meta_sae")


def grid(scale: str) -> list[dict[str, str]]:
    """The overrides of every cell."""
    return [dict(pair.split("=", 1) for pair in cell) for cell in cells_of(composed(f"scale={scale}").grid[scale], [])]


def cell_of(scale: str, overrides: dict[str, str]) -> DictConfig:
    return composed(f"scale={scale}", *(f"{key}={value}" for key, value in overrides.items()))


def test_the_paper_grid_has_both_presets_and_both_auxiliary_losses_on_the_published_dictionary():
    cells = grid("paper")
    main = [cell_of("paper", cell) for cell in cells if "detail" in cell]
    assert {(cfg.meta.preset, cfg.meta.method.aux) for cfg in main} == {
        (preset, aux) for preset in ("iclr", "lw") for aux in ("r1", "r2_compat")
    }
    for cfg in main:
        m = cfg.meta.method
        assert (m.dict_size, m.k, m.d_model, m.aux_coefficient, cfg.seed) == (2304, 4, 768, 1 / 16, 49)
        assert member(cfg, cfg.base)["path"] == "blocks.8.hook_resid_pre_49152" and len(needed(cfg)) == 8
        lr, batch, steps = (1e-4, 4096, 24_000) if cfg.meta.preset == "iclr" else (1e-3, 16_384, 2000)
        assert (m.lr, cfg.meta.batch_size, cfg.meta.n_steps, m.dead_after_tokens) == (lr, batch, steps, 100 * batch)
    assert [cell.get("meta.sampling") for cell in cells].count("frequency") == 1
    assert [cell.get("rows") for cell in cells].count("family") == 1


def test_a_cell_asks_for_the_dictionaries_that_it_looks_at():
    kinds = {(cell.get("detail"), cell.get("rows"), cell["meta"]): cell for cell in grid("demo")}
    for cfg in (cell_of("demo", cell) for cell in kinds.values()):
        asked = [request.method["dict_size"] for request in dictionaries(cfg)]
        assert asked == ([192, 384, 768, 1536] if cfg.detail or cfg.rows == "family" else [1536])
        assert cfg.meta.batch_size <= 1536 and cfg.seed not in {cfg.family[i].seed for i in range(4)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rows=all"], "rows: 'all' must be one of base, family"),
        (["base=4"], "base=4 is no place"),
        (["detail=true", "base=0"], "the small one comes before"),
        (["rows=family", "family=[{dict_size: 64}]", "base=0"], "family has 1 dictionary"),
        (["detail=true", "n_replacing=3", "base=2"], "n_replacing=3"),
    ],
)
def test_families_and_places_that_do_not_fit_are_refused_before_anything_is_trained(overrides, message):
    with pytest.raises(UserError, match=message):
        preflight.check([composed("scale=demo", *overrides)])


def test_one_dictionary_is_enough_where_no_other_is_looked_at():
    cfg = composed("scale=demo", "family=[{dict_size: 64}]", "base=0")
    assert [request.method["dict_size"] for request in dictionaries(cfg)] == [64]


def test_dictionaries_of_different_width_or_falling_size_are_refused():
    def like(d_model: int, dict_size: int) -> Any:
        return SimpleNamespace(d_model=d_model, dict_size=dict_size)

    with pytest.raises(UserError, match="widths differ: 8, 16"):
        check_family({0: like(8, 4), 1: like(16, 8)})
    for sizes in ((8, 4), (8, 8)):
        with pytest.raises(UserError, match="sizes must grow"):
            check_family({i: like(8, size) for i, size in enumerate(sizes)})


def test_the_excess_over_the_null_by_hand():
    assert excess({"ve": 0.5, "ve_null": 0.2, "ve_uncentred": 0.6, "ve_uncentred_null": 0.1, "l0": 3.0}) == {
        "ve_excess": pytest.approx(0.3), "ve_uncentred_excess": pytest.approx(0.5),
    }  # fmt: skip


def test_common_tokens_are_those_of_most_lists():
    assert common_tokens([["a", "b"], ["b", "c"], ["b", "a"]], 3) == ["b", "a"]


# ---- cells, on a tiny model


@pytest.fixture(scope="module")
def cells(smoke_cells: Any) -> list[Cell]:
    return smoke_cells("leask_meta_sae")


def dictionary(cell: Cell, name: str) -> DictionaryMethod:
    return load_dictionary(json.loads((cell.folder / name).read_text())["folder"])


def test_a_cells_numbers_are_those_of_the_stored_meta_dictionary(cells: list[Cell]):
    for cell in (cell for cell in cells if cell.get("rows") == "base"):
        meta = dictionary(cell, "meta_dictionary.json")
        assert isinstance(meta, BatchTopK) and meta.dict_size == 6
        largest = [dictionary(cell, path.name) for path in cell.folder.glob("dictionary_*.json")]
        base = max(largest, key=lambda method: method.dict_size)
        found = score(meta, directions(base.W_dec, "base"))
        assert found.batch.centred == pytest.approx(cell.metrics["ve"], abs=1e-6)
        assert found.l0_threshold == pytest.approx(cell.metrics["l0_threshold"])
        assert cell.metrics["ve_excess"] == pytest.approx(cell.metrics["ve"] - cell.metrics["ve_null"])


def test_a_detailed_cell_writes_its_tables_and_the_page(cells: list[Cell]):
    detailed = [cell for cell in cells if cell.get("detail")]
    assert {cell.get("meta.preset") for cell in detailed} == {"iclr", "lw"}
    for cell in detailed:
        metas = pd.read_parquet(cell.folder / "meta_latents.parquet")
        cosines = pd.read_parquet(cell.folder / "cosines.parquet")
        assert len(metas) == 6 and cosines.groupby("series")["count"].sum()["meta-latents to 32"] == 6
        page = (cell.folder / "browse.html").read_text()
        data = json.loads(page.split('id="data">')[1].split("</script>")[0])
        assert len(data["latents"]) == 128 and len(data["metas"]) == 6
        meta = dictionary(cell, "meta_dictionary.json")
        base = max((dictionary(cell, p.name) for p in cell.folder.glob("dictionary_*.json")), key=lambda m: m.dict_size)
        codes = decompose(meta, directions(base.W_dec, "base"))
        for latent, (ids, weights) in ((row, meta_latents_of(codes, row)) for row in (0, 50, 127)):
            assert data["latents"][latent][0] == latent
            assert data["latents"][latent][4] == [
                [int(i), pytest.approx(float(w), abs=1e-4)] for i, w in zip(ids, weights, strict=True)
            ]
        table = json.loads((cell.folder / "table.json").read_text())
        assert len(table["rows"]) == 6 and "browse.html" in table["notes"][0]


def test_rows_of_a_whole_family_tell_sizes_apart(cells: list[Cell]):
    (cell,) = [cell for cell in cells if cell.get("rows") == "family"]
    m = cell.metrics
    assert m["n_rows"] == 32 + 64 + 128 and cell.get("meta.sampling") == "replacement"
    mean = (32 * m["meta_latents_of_32"] + 64 * m["meta_latents_of_64"] + 128 * m["meta_latents_of_128"]) / 224
    assert mean == pytest.approx(m["l0_threshold"])
    assert m["meta_latents_smallest"] == m["meta_latents_of_32"]


def test_the_figures_are_drawn_from_the_cells_and_twice_the_same(cells: list[Cell], tmp_path: Path):
    first, second = (draw("leask_meta_sae", cells, tmp_path / name) for name in "ab")
    assert [path.stem.rpartition("_")[2] for path in first[::2]] == ["variance", "cosines", "decoders"]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True) if a.suffix == ".svg")


def test_claims_are_judged_on_cells_that_bear_them_out_and_on_cells_that_do_not(cells: list[Cell]):
    paper = load_paper(PAPERS / "leask")
    assert unknown_metrics(paper, "leask_meta_sae", cells) == {}
    detailed = [cell for cell in cells if cell.get("detail") and cell.get("meta.preset") == "lw"]
    good = {
        "ve": 0.55, "ve_excess": 0.4, "dead_meta_fraction": 0.0, "p_small_above_base": 1e-9, "ve_pursuit": 0.4,
        "replaced_above_random": 0.2, "replaced_below_meta": 0.05, "token_overlap": 0.3, "token_overlap_random": 0.01,
    }  # fmt: skip
    bad = {
        "ve": 0.55, "ve_excess": -0.1, "dead_meta_fraction": 0.4, "p_small_above_base": 0.5, "ve_pursuit": 0.6,
        "replaced_above_random": -0.1, "replaced_below_meta": -0.1, "token_overlap": 0.01, "token_overlap_random": 0.01,
    }  # fmt: skip
    settings = {"meta.method.dict_size": 73, "meta.method.k": 4}
    for metrics, verdict in ((good, "agrees"), (bad, "disagrees")):
        shown = [replace(cell, metrics=metrics, settings={**cell.settings, **settings}) for cell in detailed]
        for number in ("2a", "4", "5", "6a", "6b", "8", "10"):
            found = judge(paper, paper.claim(f"leask/meta-{number}"), "demo", shown, 0)
            assert found.word == verdict, number


def test_random_weights_of_rows_are_read_largest_first():
    from core.kernels.codes import SparseCodes

    codes = SparseCodes(torch.tensor([0, 0, 1]), torch.tensor([1, 3, 0]), torch.tensor([0.1, 0.7, 0.2]), (2, 4))
    ids, weights = meta_latents_of(codes, 0)
    assert ids.tolist() == [3, 1] and np.allclose(weights, [0.7, 0.1])
