"""leask_stitching: what its cells ask for and write, and losses along a path between two dictionaries."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

import tests.composing
from core import preflight
from core.analysis.evaluate import evaluate_dictionary
from core.analysis.stitch_path import interpolation, losses_along, walk
from core.analysis.stitching import components, error_and_bias, nearest
from core.errors import UserError
from core.methods.base import DictionaryMethod
from core.methods.pretrained import Pretrained
from core.models.language_model import load_language_model
from core.text.tokenizing import bos_token_id
from experiments.bench import stitching as bench_stitching
from experiments.common import held_out, held_out_rows, trained
from experiments.leask import stitching as leask_stitching
from experiments.leask.stitching import activations, dictionaries, members, of_family, run
from hydra_plugins.blocks_sweeper.sweeper import cells_of
from reports.claims import PAPERS, load_paper, unknown_metrics
from reports.collect import Cell
from reports.figures import draw

composed = partial(tests.composing.composed, "experiment=leask_stitching")


def cells(scale: str) -> list[DictConfig]:
    grid = cells_of(composed(f"scale={scale}").grid[scale], [])
    return [composed(f"scale={scale}", *cell) for cell in grid]  # a second each


# ---- what cells ask for


def test_the_demo_trains_two_families_on_one_stream_and_every_neighbouring_pair_is_a_cell():
    chosen = cells("demo")
    wanted = {request.key: request for cfg in chosen for request in dictionaries(cfg)}
    sizes = sorted((r.method["_target_"].rpartition(".")[2], r.method["dict_size"]) for r in wanted.values())
    assert sizes == [(name, 192 * 2**i) for name, n in (("BatchTopK", 4), ("ReluL1", 3)) for i in range(n)]
    assert len({json.dumps(r.group_spec, sort_keys=True) for r in wanted.values()}) == 1
    assert len({(r.method["_target_"], r.method["seed"]) for r in wanted.values()}) == 7, "a seed for each member"
    assert [cfg.part for cfg in chosen].count("frankenstein") == 2
    pairs = [(cfg.small.dict_size, cfg.large.dict_size) for cfg in chosen if cfg.part == "pair"]
    assert sorted(pairs) == sorted([(192, 384), (384, 768)] * 2 + [(768, 1536)])


def test_the_paper_grid_has_the_published_pairs_and_trains_nothing():
    chosen = cells("paper")
    assert all(dictionaries(cfg) == [] for cfg in chosen)
    gpt2 = [cfg for cfg in chosen if cfg.model.name == "gpt2_small" and cfg.part == "pair"]
    paths = [[node["path"] for node in members(cfg)] for cfg in gpt2]
    assert paths == [[f"blocks.8.hook_resid_pre_{768 * 2**i}" for i in (k, k + 1)] for k in range(7)]
    [family] = [cfg for cfg in chosen if cfg.part == "frankenstein"]
    assert [node["dict_size"] for node in members(family)] == [768 * 2**i for i in range(8)]
    [gemma] = [cfg for cfg in chosen if cfg.model.name == "gemma2_2b"]
    assert gemma.stream.site == "resid_post.12"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["small.dict_size=64", "large.dict_size=64"], "small and large: stitching needs two"),
        (["part=frankenstein", "family=[{dict_size: 64}]"], "family: stitching needs two"),
        (["part=frankenstein", "family=[{dict_size: 64}, {dict_sizes: 128}]"], "no such setting"),
        (["part=frankenstein", "family=[{dict_size: 64}, {dict_size: 64}]"], "different"),
        (["part=pairs"], "part: 'pairs' must be one of pair, frankenstein"),
    ],
)
def test_a_family_of_one_and_misspelt_settings_are_refused_before_anything_is_trained(overrides, message: str):
    with pytest.raises(UserError, match=message):
        preflight.check([composed("scale=smoke", *overrides)])


# ---- cells on a tiny model


@pytest.fixture(scope="module")
def tiny(tiny_model: dict[str, Any], words_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    """Makes the configuration of a cell on the tiny model, with a store that all share."""
    store = tmp_path_factory.mktemp("store")

    def cfg(folder: Path, *overrides: str) -> DictConfig:
        sizes = ["small.dict_size=12", "small.seed=1", "large.dict_size=24", "large.seed=2"]
        short = ["stream.site=resid_pre.1", "stream.n_ctx=16", "stream.n_tokens=4096", "stream.buffer_tokens=1024",
                 "stream.batch_size=64", "evaluation.n_rows=32", "evaluation.n_downstream_rows=6",
                 "evaluation.rows_per_batch=4", "method.lr=0.01", "method.input_norm=token_std"]  # fmt: skip
        family = "family=[{dict_size: 12, seed: 1}, {dict_size: 24, seed: 2}, {dict_size: 48, seed: 3}]"
        found = composed("scale=smoke", "logging=none", *sizes, *short, family, *overrides)
        with open_dict(found):
            found.model, found.data = OmegaConf.create(tiny_model), OmegaConf.create(words_data)
            found.method.d_model = 32
            found.artifacts_dir, found.output_dir, found.cell_folder = str(store), str(folder), str(folder / "cell")
        return found

    return cfg


def pair_of(cfg: DictConfig) -> tuple[DictionaryMethod, DictionaryMethod]:
    small, large = (trained(cfg, node) for node in members(cfg))
    return small, large


@pytest.mark.parametrize("method", ["relu_l1", "batchtopk"])
def test_a_pair_writes_metrics_latents_and_curves(tiny, tmp_path: Path, method: str):
    own = ["method.warmup_steps=4", "method.l1_coefficient=0.5"] if method == "relu_l1" else ["method.k=4"]
    cfg = tiny(tmp_path, f"method={method}", *own)
    metrics = run(cfg)
    assert all(math.isfinite(value) for value in metrics.values())
    for way in ("paper", "data"):
        assert metrics[f"interpolation_{way}_start_gap"] < 1e-6 and metrics[f"interpolation_{way}_end_gap"] < 1e-6
    folder = Path(cfg.cell_folder)
    latents = pd.read_parquet(folder / "latents.parquet")
    alive = latents[latents["class"] != "dead"]
    assert len(latents) == 24 and metrics["novel_fraction"] == pytest.approx((alive["delta_mse"] < 0).mean())
    assert (
        (latents["delta_mse_low"] <= latents["delta_mse"]) & (latents["delta_mse"] <= latents["delta_mse_high"])
    ).all()
    curves = pd.read_parquet(folder / "interpolation.parquet")
    ends = curves[curves["path"] == "paper"].iloc[[0, -1]]
    assert ends["n_latents"].tolist() == [12, 24]
    np.testing.assert_allclose(ends["mse"], [metrics["mse_small"], metrics["mse_large"]], rtol=1e-6)
    np.testing.assert_allclose(ends["ce"], [metrics["ce_small"], metrics["ce_large"]])
    np.testing.assert_allclose(ends["ce_refit"], [metrics["ce_small_refit"], metrics["ce_large_refit"]])
    inserted = pd.read_parquet(folder / "insertion.parquet")
    assert inserted["cosine"].is_monotonic_increasing and inserted["mse"].iloc[0] == pytest.approx(ends["mse"].iloc[0])
    assert inserted["n_latents"].iloc[-1] == 12 + len(alive)
    settings = {"part": "pair", "method._target_": cfg.method._target_, "small.dict_size": 12, "large.dict_size": 24}
    cell = Cell("leask_stitching", "demo", 0, folder, metrics, settings, {})
    unknown = unknown_metrics(load_paper(PAPERS / "leask"), "leask_stitching", [cell])
    assert all(name.startswith("grown_") for name in unknown)
    drawn = draw("leask_stitching", [cell], tmp_path)
    assert len(drawn) == 4 and all(path.stat().st_size > 1000 for path in drawn)


def test_losses_at_the_ends_are_those_of_the_two_dictionaries(tiny, tmp_path: Path):
    cfg = tiny(tmp_path, "method=batchtopk", "method.k=4")
    small, large = pair_of(cfg)
    text = replace(held_out(cfg).first(6), captured=None, rows_per_batch=4)
    path = interpolation(nearest(small, large), components(small, large, 0.7), 2)
    losses = losses_along(small, large, path, text)
    for point, method in ((0, small), (-1, large)):
        alone = evaluate_dictionary(method, text).metrics()["ce_spliced"]
        assert float(losses[point]) == pytest.approx(alone, abs=1e-5)
    kept = replace(text, captured=text.activations(slice(6)))
    torch.testing.assert_close(losses_along(small, large, path, kept), losses)


def exact_but_for(offset: Tensor) -> Pretrained:
    """x_hat = x + offset, by two latents for each coordinate."""
    W = torch.cat([torch.eye(32), -torch.eye(32)])
    return Pretrained.of(W, W, torch.zeros(64), offset, activation="relu", subtract_b_dec=False)


def test_a_refitted_bias_undoes_a_constant_error_and_its_loss_is_the_clean_one(tiny, tmp_path: Path):
    """On the way from a dictionary that is off by one vector to one that is off by another."""
    cfg = tiny(tmp_path, "method=batchtopk", "method.k=4")
    lm, rows = load_language_model(cfg.model), held_out_rows(cfg)[:6]
    x = lm.capture(rows, cfg.stream.site).flatten(0, 1)
    g = torch.Generator().manual_seed(0)
    offsets = torch.randn(2, 32, generator=g) * x.std()
    small, large = map(exact_but_for, offsets)
    path = interpolation(nearest(small, large), components(small, large, 0.7), 2)
    curve = walk(small, large, x.split(16), {"way": path})["way"]
    torch.testing.assert_close(curve.shift[[0, -1]].float(), -offsets, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curve.mse[[0, -1]].float(), offsets.square().mean(1), rtol=1e-4, atol=1e-5)
    arguments = small, large, path, replace(held_out(cfg).first(6), captured=None, rows_per_batch=4)
    losses, refit = losses_along(*arguments), losses_along(*arguments, shift=curve.shift)
    clean = float(lm.token_losses(rows).double().mean())
    assert all(abs(float(refit[point]) - clean) < 1e-5 < abs(float(losses[point]) - clean) for point in (0, -1))
    for method, offset in ((small, offsets[0]), (large, offsets[1])):
        error, b_dec = error_and_bias(method, x.split(16))
        assert error.mse == pytest.approx(float(offset.square().mean()), rel=1e-4) and error.mse_refit < 1e-9
        torch.testing.assert_close(b_dec.detach(), torch.zeros(32), rtol=0, atol=1e-5)


def test_a_family_is_compared_with_and_without_the_best_bias(tiny, tmp_path: Path):
    cfg = tiny(tmp_path, "method=batchtopk", "method.k=4")
    offset = 0.3 * torch.tensor([1.0, -1.0]).repeat(16)
    row = leask_stitching.row_of(cfg, "family", exact_but_for(offset))
    clean = leask_stitching.reference_losses(cfg).clean
    assert row["mse"] == pytest.approx(0.09, rel=1e-4) and row["mse_refit"] < 1e-9 and row["l0"] == 32
    assert row["ce_refit"] == pytest.approx(clean, abs=1e-5) and abs(row["ce"] - clean) > 1e-5


def test_a_family_is_grown_and_compared(tiny, tmp_path: Path):
    cfg = tiny(tmp_path, "method=batchtopk", "method.k=4", "part=frankenstein")
    metrics = run(cfg)
    table = pd.read_parquet(Path(cfg.cell_folder) / "frankenstein.parquet")
    assert table["kind"].tolist() == ["family"] * 3 + ["grown"] * 2
    assert table["n_latents"].tolist()[:3] == [12, 24, 48] and metrics["grown_n_latents"] == table["n_latents"].iloc[-1]
    assert (table["mse_refit"] <= table["mse"]).all()
    settings = {"part": "frankenstein", "method._target_": cfg.method._target_}
    cell = Cell("leask_stitching", "demo", 0, Path(cfg.cell_folder), metrics, settings, {})
    unknown = unknown_metrics(load_paper(PAPERS / "leask"), "leask_stitching", [cell])
    assert not any(name.startswith("grown_") for name in unknown)
    assert [path.suffix for path in draw("leask_stitching", [cell], tmp_path)] == [".png", ".svg"]


def test_beginnings_of_text_and_first_positions_are_not_scored(tiny, tmp_path: Path):
    cfg = tiny(tmp_path, "method=batchtopk", "method.k=4")
    lm, rows, starts = load_language_model(cfg.model), held_out_rows(cfg), held_out(cfg).starts
    assert torch.equal(starts, rows == bos_token_id(lm.tokenizer)) and starts.any()
    found = torch.cat(list(activations(cfg)))
    x = lm.capture(rows, cfg.stream.site)
    expected = torch.cat([x[i, t][None] for i in range(32) for t in range(1, 16) if not starts[i, t]])
    torch.testing.assert_close(found, expected)


# ---- the comparison with dictionaries of the same size


def table_of(rows: list[tuple[str, int, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["kind", "n_latents", "mse"])
    return table.assign(mse_refit=table["mse"], l0=table["mse"] * 10, ce=table["mse"] * 100, ce_refit=table["mse"] * 50)


def test_a_grown_dictionary_is_compared_at_its_size_by_hand():
    """Between 100 latents at an error of 4 and 400 at 1, 200 latents have 2: a grown one at 1 has half of that."""
    family = [("family", 100, 4.0), ("family", 400, 1.0)]
    found = of_family(table_of([*family, ("grown", 200, 1.0)]))
    assert found["grown_mse_over_same_size"] == pytest.approx(0.5)
    assert found["grown_ce_minus_same_size"] == pytest.approx(100 - 250)
    assert found["grown_ce_refit_minus_same_size"] == pytest.approx(50 - 125)
    assert found["n_grown_within_family"] == 1 and found["largest_n_latents"] == 400
    beyond = of_family(table_of([*family, ("grown", 500, 1.0)]))
    assert "grown_mse_over_same_size" not in beyond and beyond["n_grown_within_family"] == 0


def test_a_dictionary_of_another_site_that_never_fires_is_refused(tiny, tmp_path: Path, monkeypatch):
    cfg = tiny(tmp_path, "method=relu_l1", "method.warmup_steps=4", "method.l1_coefficient=0.5")
    small, large = pair_of(cfg)
    with torch.no_grad():
        large.b_enc.fill_(-1e9)
    Path(cfg.cell_folder).mkdir(exist_ok=True, parents=True)
    with pytest.raises(UserError, match="No latent of the large dictionary fires"):
        leask_stitching.run_pair(cfg, small, large)


# ---- the benchmark


def test_the_benchmarks_dictionaries_fire_as_often_as_they_say():
    cfg = OmegaConf.create({"seed": 0, "d_model": 64, "n_rows": 2000})
    cpu = torch.device("cpu")
    method = bench_stitching.dictionary(cfg, 512, 20.0, cpu)
    codes = method.encode(bench_stitching.rows(cfg, cpu))
    assert float(codes.l0()) == pytest.approx(20.0, rel=0.03)
