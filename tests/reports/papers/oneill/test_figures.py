"""The claims and figures of O'Neill et al., on small synthetic cells that hold the published numbers themselves."""

import json

import numpy as np
import pandas as pd
import pytest

from reports import figures
from reports.checks import Near
from reports.claims import PAPERS, load_paper
from reports.collect import read_cells
from reports.papers.oneill.derived import derive
from reports.papers.oneill.figures.common import power_of_10, published
from reports.papers.oneill.figures.oneill_regimes import means_of
from reports.verdicts import judge

STEPS = range(0, 2001, 100)
SEEDS = (0, 1)


def write(outputs, experiment, name, rows, curves=None, atoms=None, scale="paper", coder=None, source=None, **config):
    folder = outputs / experiment / scale / name.replace(" ", "_")
    folder.mkdir(parents=True)
    source = {"N": 16, "M": 8, "K": 3, "zipf_alpha": None, "per_run": False, **(source or {})}
    coder = {"bias": False, "width": None, "N": None, "k": None, **(coder or {})}
    record = {"experiment": experiment, "scale": scale, "seed": 0, "commit": "0123456789ab", "seconds": 1.0}
    config = {"source": source, "coder": coder, **config}
    (folder / "results.json").write_text(json.dumps({**record, "metrics": {}, "config": config}))
    pd.DataFrame(rows).to_parquet(folder / "runs.parquet")
    if curves:
        pd.DataFrame(curves).to_parquet(folder / "curves.parquet")
    if atoms is not None:
        pd.DataFrame(atoms, columns=[f"x{i}" for i in range(atoms.shape[1])]).to_parquet(folder / "atoms.parquet")


def runs(method, l1=0.01, k=None, **metrics):
    """Two runs, 0.001 above and below the values."""
    return [
        {"seed": seed, "coder.name": method, "coder.l1": l1, "coder.k": k}
        | {f"metrics.{name}": value + 0.001 * (-1) ** seed for name, value in metrics.items()}
        for seed in SEEDS
    ]


def stack(outputs, experiment, method, end, l1=0.01, name=None, **config):
    """One cell whose latent MCC rises from 0.4 to `end`, with its curve."""
    curves = [
        {
            "seed": seed, "coder.name": method, "coder.l1": l1, "coder.k": None, "step": step,
            "latent_mcc": 0.4 + (end - 0.4) * (1 - np.exp(-step / 300)) + 0.01 * (-1) ** seed,
            "dict_mcc": 0.6 + (end - 0.4) * (1 - np.exp(-step / 300)) / 2,
            "train_flops_paper": 1e7 * step, "test_flops_paper": 1e6,
            "train_flops_corrected": 1e6 * step, "test_flops_corrected": 1e6,
        }
        for seed in SEEDS
        for step in STEPS
    ]  # fmt: skip
    metrics = {"latent_mcc": end, "dict_mcc": 0.5 + end / 2, "latent_mcc_chance": 0.3, "dict_mcc_chance": 0.6}
    write(outputs, experiment, name or method, runs(method, l1, **metrics), curves, **config)


def known_codes(outputs):
    for method, end in (("SAE", 0.86), ("MLP32", 0.9), ("MLP1024", 0.95)):
        stack(outputs, "oneill_known_codes", method, end, task="known_codes", objective="cosine")
    stack(outputs, "oneill_known_codes", "SAE", 0.8, name="mse", task="known_codes", objective="mse")


def known_dictionary(outputs):
    for method, end in (("SAE", 0.6), ("MLP32", 0.78), ("ITO", 0.96), ("ITO from -2", 0.97)):
        stack(outputs, "oneill_known_dictionary", method, end, task="known_dictionary")
    for method, end in (("FISTA", 0.98), ("L0 oracle", 1.0)):
        write(outputs, "oneill_known_dictionary", method, runs(method, latent_mcc=end), task="known_dictionary")


def unknown(outputs):
    for method, end in (("SAE", 0.57), ("SAE+ITO", 0.58), ("SC", 0.7), ("SC from -2", 0.72), ("MLP32", 0.62)):
        stack(outputs, "oneill_unknown", method, end, task="unknown", profile="repo")
        own = {"per_run": True}
        stack(outputs, "oneill_unknown", method, end, name=f"{method} own", source=own, task="unknown", profile="repo")


def regimes(outputs):
    for i in (1, 3):
        latent, dictionary = published(f"oneill/regimes-{i}"), published(f"oneill/regimes-{i + 1}")
        for (method, N, M), value in latent.items():
            rows = runs(method, latent_mcc=value, dict_mcc=dictionary[method, N, M])
            shape = {"N": N, "M": M, "K": 3 if i == 1 else 9}
            write(outputs, "oneill_regimes", f"{method},{shape}", rows, source=shape)


def sparsity(outputs):
    for method in ("SAE", "SC"):
        rows = [
            row
            for (own, l1), value in published("oneill/sparsity-1").items()
            if own == method
            for row in runs(method, l1, latent_mcc=value, l0=0.5 - l1 / 20, mse=0.02 * l1 + 0.011)
        ]
        write(outputs, "oneill_sparsity", method, rows, source={"per_run": True})
    rows = [row for k in (1, 3, 8) for row in runs("TopK SAE", 0.0, k, latent_mcc=0.6, l0=k / 16, mse=0.1 / k)]
    write(outputs, "oneill_sparsity", "TopK SAE", rows, source={"per_run": True})


def ablations(outputs):
    name = "oneill_ablations"
    for (method, N, M), value in published("oneill/ablations-1").items():
        shape = {"N": N, "M": M, "K": 6}
        rows = runs(method, latent_mcc=value, dict_mcc=0.7)
        write(outputs, name, f"{method},{N}", rows, source=shape, coder={"width": int(method[3:])}, part="width")
    for bias in (False, True):
        rows = runs("SAE", latent_mcc=0.6, dict_mcc=0.7)
        write(outputs, name, f"bias={bias}", rows, coder={"bias": bias}, part="bias")
    for task in ("known_codes", "unknown"):
        rows = runs("SAE", latent_mcc=0.6, **({"dict_mcc": 0.7} if task == "unknown" else {}))
        write(outputs, name, task, rows, part="zipf", task=task)
    rows = runs("SAE", latent_mcc=0.6, interference=1.0)
    write(outputs, name, "geometry", rows, atoms=np.eye(12, 8) + 0.1, coder={"N": 12}, part="geometry")


EXPERIMENTS = {
    "oneill_known_codes": (known_codes, {"curves", "runs"}),
    "oneill_known_dictionary": (known_dictionary, {"l1_0.01_curves", "l1_0.01_runs", "starts"}),
    "oneill_unknown": (unknown, {"repo_curves", "repo_runs", "repo_starts"}),
    "oneill_regimes": (regimes, {"latent_mcc", "dict_mcc"}),
    "oneill_sparsity": (sparsity, {""}),
    "oneill_ablations": (ablations, {"width", "bias", "zipf", "geometry"}),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiments_figures_are_drawn_as_png_and_svg(tmp_path, experiment):
    make, names = EXPERIMENTS[experiment]
    make(tmp_path)
    drawn = figures.draw(experiment, derive(read_cells(tmp_path)), tmp_path / "figures")
    stems = {f"{experiment}_paper_{name}".rstrip("_") for name in names}
    assert {path.name for path in drawn} == {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    assert all(path.stat().st_size > 5_000 for path in drawn)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_one_cell_without_curves_at_demo_scale_is_enough(tmp_path, experiment):
    metrics = {"latent_mcc": 0.5, "dict_mcc": 0.7, "mse": 0.1, "l0": 0.3}
    config = {"part": "bias", "profile": "repo", "objective": "cosine"}
    write(tmp_path, experiment, "SAE", runs("SAE", **metrics), scale="demo", **config)
    figures.draw(experiment, read_cells(tmp_path), tmp_path / "figures")


def test_a_regime_is_the_mean_over_seeds(tmp_path):
    regimes(tmp_path)
    means = means_of(read_cells(tmp_path), "latent_mcc")
    assert means["SC", 128, 32, 3] == pytest.approx(0.869) and means["SAE", 16, 8, 9] == pytest.approx(0.492)


@pytest.mark.parametrize("claim_id", ["oneill/regimes-1", "oneill/regimes-4", "oneill/regimes-5", "oneill/regimes-9"])
def test_the_published_numbers_agree_with_the_claims_about_them(tmp_path, claim_id):
    regimes(tmp_path)
    paper = load_paper(PAPERS / "oneill")
    assert judge(paper, paper.claim(claim_id), "paper", read_cells(tmp_path), n_failed=0).word == "agrees"


def test_every_row_with_published_numbers_is_for_paper_scale_alone():
    paper = load_paper(PAPERS / "oneill")
    checks = [paper.check(claim) for claim in paper.claims]
    assert sum(isinstance(check, Near) for check in checks) > 30
    assert all(check.at_demo() is None for check in checks if isinstance(check, Near))


def test_powers_of_ten_are_written_short():
    assert power_of_10(4.87e11) == "4.9e11"
