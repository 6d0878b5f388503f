"""`method=pretrained` takes the place of a trained dictionary in every experiment that has one."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from core.errors import UserError
from core.interop import saelens
from core.methods.pretrained import Pretrained
from experiments.leask import meta_sae, stitching
from tests.composing import composed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SAELens folders with dictionaries of the bundled model's width, `small` and `large`."""
    root, g = tmp_path_factory.mktemp("loaded"), torch.Generator().manual_seed(0)
    for name, m in (("small", 48), ("large", 96)):
        W = torch.nn.functional.normalize(torch.randn(m, 192, generator=g), dim=1)
        made = Pretrained.of(W, W, None, torch.zeros(192), activation="topk", k=8, subtract_b_dec=True)
        saelens.write(made, root / name, site="resid_post.3", model="bundled")
    return root


def cell(experiment: str, folder: Path, tmp_path: Path, *overrides: str) -> DictConfig:
    site = "stream.site=resid_post.3"
    cfg = composed(f"experiment={experiment}", "scale=smoke", "method=pretrained", site, *overrides)
    cfg.method.repo, cfg.cell_folder, cfg.artifacts_dir = str(folder), str(tmp_path / "cell"), str(tmp_path / "store")
    (tmp_path / "cell").mkdir()
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "inner", "overrides", "metric"),
    [("leask_batchtopk", "large", [], "l0_mean"), ("leask_meta_sae", "large", [], "ve"),
     ("leask_stitching", "", ["small.path=small", "large.path=large"], "mse_large"),
     ("oneill_llm", "large", [], "fvu"), ("export", "large", [], "l0_mean_exported")],
)  # fmt: skip
def test_one_loaded_dictionary_is_enough(
    experiment: str, inner: str, overrides: list[str], metric: str, folder: Path, tmp_path: Path
) -> None:
    cfg = cell(experiment, folder / inner, tmp_path, *overrides)
    module = import_module(cfg.module)
    if hasattr(module, "check"):
        module.check(cfg)
    assert module.dictionaries(cfg) == []
    metrics = module.run(cfg)
    assert metric in metrics and "train_flops" not in metrics


def test_stitching_says_how_two_loaded_dictionaries_are_given(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two dictionaries or more.*Set small\.path and large\.path"):
        stitching.members(cell("leask_stitching", folder / "large", tmp_path))


def test_a_family_of_loaded_dictionaries_stays_one_and_a_single_one_is_a_family_of_itself(
    folder: Path, tmp_path: Path
) -> None:
    family = [{"path": "small"}, {"path": "large"}]
    cfg = cell("leask_meta_sae", folder, tmp_path)
    cfg.family, cfg.base, cfg.small, cfg.n_replacing = family, 1, 0, 1
    assert meta_sae.with_family(cfg).family == family and meta_sae.needed(meta_sae.with_family(cfg)) == [1]
    cfg.method.path = "large"
    assert meta_sae.with_family(cfg).family == [{}] and meta_sae.needed(meta_sae.with_family(cfg)) == [0]
    cfg.detail = True
    with pytest.raises(UserError, match=r"family has 1 dictionary, .* detail=false rows=base needs the base alone"):
        meta_sae.check(cfg)
    trained = composed("experiment=leask_meta_sae", "scale=smoke", "method=batchtopk", "method.k=8")
    assert meta_sae.with_family(trained) is trained
