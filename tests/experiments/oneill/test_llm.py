"""oneill_llm: what its grid asks for, and what a cell measures beyond the evaluation."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

import tests.composing
from core.errors import UserError
from core.methods.decoder import unit_rows_
from core.methods.saved import load_dictionary
from experiments.oneill.llm import atom_norms
from hydra_plugins.blocks_sweeper.sweeper import cells_of
from reports.claims import PAPERS, load_paper, unknown_metrics
from reports.collect import Cell
from reports.figures import draw

composed = partial(tests.composing.composed, "experiment=oneill_llm")


def small(method: str, **changes: Any) -> DictConfig:
    overrides = [f"method.{key}={value}" for key, value in {"dict_size": 64, **changes}.items()]
    return composed(f"method={method}", *overrides).method


def grid(scale: str) -> list[DictConfig]:
    """One cell of the grid for each part and method."""
    cells = cells_of(composed(f"scale={scale}").grid[scale], [])
    settings = [dict(pair.split("=", 1) for pair in cell) for cell in cells]
    chosen = {(cell["profile"], cell["method"]): cell for cell in reversed(settings)}
    return [composed(f"scale={scale}", *[f"{key}={value}" for key, value in cell.items()]) for cell in chosen.values()]


def test_the_paper_grid_has_the_papers_sizes_and_settings():
    for cfg in grid("paper"):
        assert (cfg.model.name, cfg.data.path, cfg.stream.site) == (
            "gpt2_small",
            "Skylion007/openwebtext",
            "resid_pre.9",
        )
        assert cfg.method.dict_size == 16_896 and cfg.stream.batch_size == 64 * 127
        if cfg.profile == "paper_text" and "lca" not in cfg.method._target_:
            assert (cfg.method.lr, cfg.method.l1_coefficient, cfg.method.resample_every) == (3e-4, 1e-4, 15_000)
        if "mlp" in cfg.method._target_:
            assert cfg.method.hidden_per_latent * cfg.method.dict_size == 8448
        if cfg.profile != "matched_flops" or "mlp" in cfg.method._target_:
            assert cfg.stream.n_tokens == 50_000 * 64 * 127


@pytest.mark.parametrize("scale", ["paper", "demo"])
def test_matched_cells_have_one_decoder_norm_and_the_flops_are_equal_where_they_should_be(scale: str):
    flops: dict[str, dict[str, float]] = {"matched_steps": {}, "matched_flops": {}}
    norms = set()
    for cfg in grid(scale):
        if cfg.profile in flops:
            norms.add(cfg.method.decoder_norm)
            n_steps = -(-cfg.stream.n_tokens // cfg.stream.batch_size)
            name = cfg.method._target_.rpartition(".")[2]
            flops[cfg.profile][name] = n_steps * flops_of(cfg, cfg.model.d_model, cfg.method.dict_size)
    assert norms == {"after_step"}
    assert flops["matched_flops"]["ReluL1"] == pytest.approx(flops["matched_flops"]["MLPEncoder"], rel=5e-3)
    assert flops["matched_steps"]["ReluL1"] < 0.5 * flops["matched_steps"]["MLPEncoder"]


def flops_of(cfg: DictConfig, d: int, m: int) -> float:
    """Without building the method: products alone, 10 d m or 6 (d h + h m + m d) - 2 d h per token."""
    if "mlp" in cfg.method._target_:
        h = round(m * cfg.method.hidden_per_latent)
        return float(cfg.stream.batch_size * (6 * (d * h + h * m + m * d) - 2 * d * h))
    return float(cfg.stream.batch_size * 10 * d * m)


@pytest.mark.parametrize("method", ["oneill_sae", "oneill_mlp"])
def test_a_steps_flops_are_those_of_its_products_and_a_little(method: str):
    cfg = composed(f"method={method}", "method.dict_size=512")
    built = instantiate(cfg.method)
    products = flops_of(cfg, built.d_model, 512)
    assert products < built.train_step_flops(cfg.stream.batch_size) < 1.05 * products


def test_the_flops_of_lca_are_three_products_an_iteration_on_the_rows_it_looks_at():
    built = instantiate(small("lca", n_iterations=7, rows_per_step=16))
    product = 2 * 16 * built.d_model * 64
    assert built.train_step_flops(512) == product * (3 * 7 + 2)
    assert built.train_step_flops(8) == product / 2 * (3 * 7 + 2)
    unrolled = instantiate(small("lca", n_iterations=7, rows_per_step=16, dictionary_gradient="unrolled"))
    assert unrolled.train_step_flops(512) == product * (9 * 7 + 2)


def test_another_method_is_refused_by_name():
    with pytest.raises(UserError, match="step of TopK are not counted"):
        instantiate(small("topk", k=4, k_aux=8)).train_step_flops(64)


def test_atom_norms_by_hand():
    method = instantiate(small("oneill_sae"))
    with torch.no_grad():
        unit_rows_(method.W_dec)
        method.W_dec[0] *= 3.0
        method.W_dec[1] *= 0.5
    found = atom_norms(method)
    assert found["atom_norm_max"] == pytest.approx(3.0) and found["atom_norm_min"] == pytest.approx(0.5)
    assert found["atom_norm_mean"] == pytest.approx((62 + 3.5) / 64)


@pytest.fixture(scope="module")
def cells(smoke_cells: Any) -> list[Cell]:
    return smoke_cells("oneill_llm")


def test_every_method_reports_the_metrics_that_claims_need(cells: list[Cell]):
    assert sorted({cell.method or "" for cell in cells}) == ["LCA", "MLPEncoder", "ReluL1"]
    assert unknown_metrics(load_paper(PAPERS / "oneill"), "oneill_llm", cells) == {}
    for cell in cells:
        m = cell.metrics
        assert m["fvu"] > 0 and m["l0_mean"] > 0 and m["train_flops"] > 0 and 0 < m["alive_fraction"] <= 1
        norms = m["atom_norm_min"], m["atom_norm_mean"], m["atom_norm_max"]
        if cell.get("method.decoder_norm") == "rows_compat":  # 64 atoms in R^32: their mean square is 1/2
            assert norms[1] == pytest.approx(0.5**0.5, rel=0.05) and norms[0] < norms[1] < norms[2]
        else:
            assert norms == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)


def test_the_figure_is_drawn_from_the_cells_and_twice_the_same(cells: list[Cell], tmp_path: Path):
    more = [replace(cell, seed=seed) for cell in cells for seed in (0, 1)]
    for chosen in (cells, more):
        first, second = (draw("oneill_llm", chosen, tmp_path / name) for name in "ab")
        assert [path.suffix for path in first] == [".png", ".svg"]
        assert first[1].read_bytes() == second[1].read_bytes()


def test_a_cells_dictionary_is_the_stored_one(cells: list[Cell]):
    for cell in cells:
        method = load_dictionary(json.loads((cell.folder / "dictionary.json").read_text())["folder"])
        assert type(method).__name__ == cell.method and method.dict_size == 64
        assert atom_norms(method).items() <= cell.metrics.items()
