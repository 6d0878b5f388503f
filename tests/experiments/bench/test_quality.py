"""bench_quality: the score is what it says, all libraries see the same batches, and absent peers are named."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

from core.errors import UserError
from core.preflight import check
from experiments.bench import peers, quality
from experiments.bench.quality import Score, Weights, ratio, scored
from experiments.bench.quality_peers import Batches, Case, train_peer
from tests.composing import composed


def configured(*overrides: str) -> DictConfig:
    return composed("experiment=bench_quality", "scale=smoke", "logging=none", *overrides)


# ---- the score


def test_the_score_by_hand():
    """Identity weights: codes are the positive entries, the two largest of all rows for a mean L0 of 1."""
    x = torch.tensor([[3.0, 2.0], [1.0, 0.0]])
    eye, zero = torch.eye(2), torch.zeros(2)
    together = scored(Weights(eye, eye, zero, zero, threshold=0.5), x, "batchtopk", 1)
    assert together.fvu == pytest.approx(1 / 4)  # left: 1 of the second row; the spread is 2 (1 + 1)
    assert together.dead == 0 and together.threshold_l0 == 1.5 and together.threshold_fvu == 0
    alone = scored(Weights(eye, eye, zero, zero), x, "topk", 1)
    assert alone.fvu == pytest.approx(4 / 4) and alone.dead == 0.5 and math.isnan(alone.threshold_l0)


def test_biases_take_part_as_the_libraries_mean_them():
    x = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    weights = Weights(torch.eye(2), torch.eye(2), torch.tensor([0.0, -1.0]), torch.tensor([1.0, 0.0]))
    codes = torch.tensor([[3.0, 0.0], [0.0, 2.0]])  # (x - b_dec) + b_enc, rectified
    error = (x - codes - weights.b_dec).square().sum() / (x - x.mean(0)).square().sum()
    assert scored(weights, x, "topk", 1).fvu == pytest.approx(float(error))


def test_the_ratio_is_paired_by_seed():
    ours = [Score(0.1, 0, 0, 0), Score(0.4, 0, 0, 0)]
    theirs = [Score(0.2, 0, 0, 0), Score(0.8, 0, 0, 0)]
    interval = ratio(ours, theirs)
    assert interval.mean == pytest.approx(0.5) and interval.low == pytest.approx(0.5) and interval.n == 2
    assert math.isnan(ratio(ours[:1], theirs[:1]).low)


# ---- batches


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """40 rows of 4, all different."""
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(160, dtype=np.float32).reshape(40, 4))
    return path


def test_every_seed_sees_each_row_once_in_an_order_of_its_own(rows: Path):
    seen = {seed: torch.cat(list(Batches(rows, 8, 5, seed, "cpu"))) for seed in (0, 1)}
    for x in seen.values():
        assert sorted(x[:, 0].tolist()) == [4.0 * i for i in range(40)]
    assert not torch.equal(seen[0], seen[1])
    again = torch.cat(list(Batches(rows, 8, 5, 0, "cpu")))
    assert torch.equal(seen[0], again)


def test_a_shorter_training_sees_the_first_batches_of_a_longer_one(rows: Path):
    short, long = (list(Batches(rows, 8, n, 3, "cpu")) for n in (2, 5))
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))


# ---- settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("n_steps=33", "n_steps: 33 must be at most the 32 batches of stream.n_tokens"),
        ("k=65", "k: 65 must be at most dict_size = 64"),
        ("kind=jumprelu", "kind: 'jumprelu' must be one of batchtopk, topk"),
        ("lr=0", "lr: 0.0 must be positive"),
        ("peers=[saelense]", "saelense"),
        ("training_seeds=[]", "training_seeds"),
        ("decay_fraction=2", "decay_fraction: 2.0 must lie between 0 and 1"),
    ],
)
def test_a_setting_that_will_not_do_is_named_before_anything_is_read(override: str, message: str):
    with pytest.raises(UserError, match=message):
        check([configured(override)])


def test_the_demo_grid_is_the_whole_comparison():
    [block] = composed("experiment=bench_quality", "scale=demo").grid.demo
    assert {name: set(str(values).split(",")) for name, values in block.items()} == {
        "kind": {"batchtopk", "topk"},
        "n_steps": {"512", "1024", "4096"},
        "lr": {"0.002", "0.004"},
        "k": {"8", "16", "32"},
    }
    assert list(composed("experiment=bench_quality", "scale=demo").training_seeds) == [0, 1, 2]


# ---- a run


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


def ran(shared: Path, name: str, *overrides: str) -> tuple[dict[str, float], Path]:
    cfg = configured(f"artifacts_dir={shared}/artifacts", f"output_dir={shared}/outputs", *overrides)
    cfg.cell_folder = str(shared / name)
    Path(cfg.cell_folder).mkdir(exist_ok=True)
    return quality.run(cfg), Path(cfg.cell_folder)


@pytest.mark.parametrize("kind", ["batchtopk", "topk"])
def test_without_peers_ours_is_scored_alone_and_equal_runs_are_equal(shared: Path, kind: str):
    metrics, folder = ran(shared, f"a_{kind}", f"kind={kind}", "peers=[]")
    again, _ = ran(shared, f"b_{kind}", f"kind={kind}", "peers=[]")
    assert metrics == again and 0 < metrics["fvu_ours"] < 1
    assert ("threshold_l0_ours" in metrics) == (kind == "batchtopk")
    table = pd.read_parquet(folder / quality.BY_SEED)
    assert list(table["seed"]) == [0, 1] and table["fvu"].mean() == pytest.approx(metrics["fvu_ours"])


def test_absent_and_failing_peers_are_named_and_left_out(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    versions = {"dictionary_learning": None, "saelens": "6.0"}
    monkeypatch.setattr(peers, "available", lambda python, names: {name: versions[name] for name in names})

    def fails(case: Case, python: str) -> str:
        raise peers.PeerError("ModuleNotFoundError: No module named 'sae_lens'")

    monkeypatch.setattr(quality, "train_peer", fails)
    metrics, folder = ran(shared, "absent", "peers=[dictionary_learning,saelens]")
    assert "fvu_ours" in metrics and not any("saelens" in name or "dictionary" in name for name in metrics)
    notes = "\n".join(json.loads((folder / "table.json").read_text())["notes"])
    assert "dictionary_learning is not installed" in notes and "No module named 'sae_lens'" in notes
    assert "make peers" in capsys.readouterr().err


def test_a_peer_gets_the_same_rows_and_its_weights_are_scored_in_pairs(shared: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "available", lambda python, names: dict.fromkeys(names, "1.0"))
    cases: list[Case] = []

    def stand_in(case: Case, python: str) -> str:
        """Perfect weights that fire everywhere."""
        cases.append(case)
        d = np.load(case.rows, mmap_mode="r").shape[1]
        W = np.zeros((case.dict_size, d), dtype=np.float32)
        for seed in case.seeds:
            zeros = np.zeros(case.dict_size, dtype=np.float32)
            np.savez(Path(case.folder) / f"{seed}.npz", W_enc=W, W_dec=W, b_enc=zeros, b_dec=np.zeros(d, np.float32))
        return "1.0"

    monkeypatch.setattr(quality, "train_peer", stand_in)
    metrics, _ = ran(shared, "stand_in", "kind=topk", "peers=[saelens]")
    [case] = cases
    assert (case.batch_size, case.n_steps, case.lr, case.seeds) == (64, 24, 0.002, [0, 1])
    assert metrics["dead_saelens"] == 1 and metrics["fvu_saelens"] >= 1
    assert metrics["over_saelens"] == pytest.approx(metrics["fvu_ours"] / metrics["fvu_saelens"], rel=1e-2)
    assert metrics["over_saelens_low"] <= metrics["over_saelens"] <= metrics["over_saelens_high"]


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["dictionary_learning", "saelens"])
@pytest.mark.parametrize("kind", ["batchtopk", "topk"])
def test_a_peer_that_is_installed_learns_the_rows(tmp_path: Path, peer: Any, kind: Any):
    python = quality.peers_python(configured())
    if peers.available(python, [peer])[peer] is None:
        pytest.skip(f"{peer} is not installed for {python}: `make peers`")
    x = peers.structured_rows(64 * 200, 32, 0).numpy()
    np.save(tmp_path / "rows.npy", x)
    case = Case(peer, kind, str(tmp_path / "rows.npy"), str(tmp_path), 64, 200, 64, 4, 4e-3, 0.3, [0], 1, "cpu")
    assert train_peer(case, python) == peers.available(python, [peer])[peer]
    score = scored(Weights.read(tmp_path / "0.npz", torch.device("cpu")), torch.from_numpy(x[:1000]), kind, 4)
    assert score.fvu < 0.9


def test_a_peer_in_an_interpreter_without_it_is_an_error_of_the_peer(tmp_path: Path, rows: Path):
    case = Case("saelens", "topk", str(rows), str(tmp_path), 8, 2, 8, 2, 1e-3, 0.0, [0], 1, "cpu")
    with pytest.raises(peers.PeerError, match="sae_lens"):
        train_peer(case, sys.executable)
