"""What experiments share: a cell may have more than one dictionary, and dictionaries that are loaded."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from core.errors import UserError
from core.interop import saelens
from core.methods.pretrained import Pretrained
from experiments import common
from tests.composing import composed


@pytest.fixture
def folder(tmp_path) -> str:
    """A SAELens folder with a dictionary of the bundled model's width."""
    W = torch.randn(16, 192, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"activation": "relu", "subtract_b_dec": True}
    saelens.write(
        Pretrained.of(W, W, torch.zeros(16), torch.zeros(192), **options), tmp_path / "sae", site="resid_pre.4"
    )
    return str(tmp_path / "sae")


def cell(tmp_path, *overrides: str) -> DictConfig:
    cfg = composed("experiment=leask_batchtopk", "scale=smoke", *overrides)
    cfg.cell_folder = str(tmp_path / "cell")
    return cfg


def test_a_cell_asks_the_fleet_for_what_is_trained_alone(tmp_path, folder):
    cfg = cell(tmp_path, "method=topk", "method.dict_size=64", "method.k=8")
    larger = OmegaConf.merge(common.plain(cfg.method), {"dict_size": 128})
    loaded = {**common.plain(cell(tmp_path, "method=pretrained").method), "repo": folder}
    assert [request.method["dict_size"] for request in common.requests(cfg)] == [64]
    asked = common.requests(cfg, cfg.method, larger, loaded)
    assert [request.method["dict_size"] for request in asked] == [64, 128]
    assert asked[0].key == common.request(cfg).key != asked[1].key
    with pytest.raises(UserError, match="method=pretrained: this experiment trains"):
        common.request(cfg, loaded)


def test_every_dictionary_of_a_cell_is_recorded_in_its_own_file(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(common, "language_model", lambda cfg: SimpleNamespace(device="cpu"))
    cfg = cell(tmp_path, "method=pretrained", f"method.repo={folder}", "method.lr=0.5")  # as an experiment may set it
    assert common.requests(cfg) == []
    method = common.trained(cfg)
    assert isinstance(method, Pretrained) and method.source["repo"] == folder
    for dict_size in (None, 16):
        common.trained(cfg, {**common.plain(cfg.method), "dict_size": dict_size})
    records = {path.name: json.loads(path.read_text()) for path in (tmp_path / "cell").iterdir()}
    assert len(records) == 3 and "dictionary.json" in records
    assert sorted(str(t["loaded"]["dict_size"]) for t in records.values()) == ["16", "None", "None"]
    with pytest.raises(UserError, match=r"method\.dict_size is 17.*method\.dict_size=null"):
        common.trained(cfg, {**common.plain(cfg.method), "dict_size": 17})
    with pytest.raises(UserError, match=r"method\.repo is not set"):
        common.trained(cell(tmp_path, "method=pretrained"))
