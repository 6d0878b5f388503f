"""Every YAML composes at every scale, and its head has what it must have."""

import ast
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.cells import cell_name
from core.results import comparable, is_finished
from hydra_plugins.blocks_sweeper.sweeper import cells_of
from tests.composing import CONF, ROOT, composed

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if not path.stem.startswith("pretrained"))
DATA = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
KEPT = ROOT / "reports/results"
SCALES = ("smoke", "demo", "paper")
MAX_LINE = 160


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_at_every_scale(name: str, scale: str):
    cfg = composed(f"experiment={name}", f"scale={scale}")
    OmegaConf.resolve(cfg)
    assert cfg.name == name and cfg.scale == scale


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_one_module_with_run(name: str):
    module = composed(f"experiment={name}").module
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert "run" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_head_of_an_experiment_names_source_command_and_deviations(name: str):
    head = (ROOT / f"conf/experiment/{name}.yaml").read_text().split("defaults:")[0]
    assert "# @package _global_" in head and f"experiment={name}" in head and "# deviations:" in head


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_from_its_yaml(method: str):
    from hydra.utils import instantiate

    cfg = composed("experiment=leask_batchtopk", "scale=smoke", f"method={method}", "method.dict_size=256")
    built = instantiate(cfg.method)
    assert built.dict_size == 256 and built.d_model == cfg.model.d_model


@pytest.mark.parametrize("method", ["batchtopk", "topk"])
def test_the_preset_of_the_authors_differs_where_it_trains_worse_and_the_paper_grid_uses_it(method: str):
    ours, authors = (
        composed("experiment=leask_batchtopk", f"method={name}").method for name in (method, f"{method}_authors")
    )
    differing = {name: (ours[name], authors[name]) for name in ours if ours[name] != authors[name]}
    assert differing == {
        "use_enc_bias": (True, False),
        "enc_init_norm": (0.3, None),
        "aux": ("normalized", "r1"),
        "k_aux": (None, 512),
        "b_dec_init": ("mean", "zeros"),
        "dead_after_tokens": (5120, 20480),
        "grad_clip": (0.005, 100000.0),
    }
    blocks = composed("experiment=leask_batchtopk", "scale=paper").grid.paper
    trained = {name for block in blocks for name in block["method"].split(",")}
    assert f"{method}_authors" in trained and method not in trained


@pytest.mark.parametrize("data", [name for name in DATA if name != "local"])
def test_every_text_source_builds_without_a_network(data: str):
    """Its spec as well, unless it is a branch: then it is the branch's commit, which the hub says."""
    from hydra.utils import instantiate

    more = ["+facts=planted"] if data == "facts" else []
    cfg = composed("experiment=leask_batchtopk", f"data={data}", *more)
    source = instantiate(cfg.data)
    revision = cfg.data.get("revision")
    assert source.name and ((revision is not None and len(revision) != 40) or source.spec)


def test_a_misspelt_key_in_any_part_is_refused():
    from hydra.errors import ConfigCompositionException

    for key in ("sed=1", "method.kk=3", "stream.sight=resid_pre.0", "evaluation.rows=3", "model.nam=x"):
        with pytest.raises(ConfigCompositionException, match="Could not override"):
            composed("experiment=leask_batchtopk", key)


def test_the_paper_grid_of_leask_batchtopk_has_the_papers_24_cells():
    cfg = composed("experiment=leask_batchtopk", "scale=paper")
    cells = [dict(pair.split("=", 1) for pair in cell) for cell in cells_of(cfg.grid.paper, [])]
    by_model = {model: [c for c in cells if c["model"] == model] for model in ("gpt2_small", "gemma2_2b")}
    assert {model: len(group) for model, group in by_model.items()} == {"gpt2_small": 15, "gemma2_2b": 9}
    jumprelu = [c["method.l0_coefficient"] for c in by_model["gemma2_2b"] if c["method"] == "jumprelu"]
    assert jumprelu == ["0.02", "0.005", "0.001"]
    sizes = {(c["method.dict_size"], c["method.k"]) for c in by_model["gpt2_small"] if c["method"] == "topk_authors"}
    assert sizes == {("12288", "16"), ("12288", "32"), ("12288", "64"), ("3072", "32"), ("6144", "32"), ("24576", "32")}


@pytest.mark.parametrize("scale", SCALES)
def test_every_cell_of_a_grid_composes_and_has_a_folder_of_its_own(scale: str):
    cfg = composed("experiment=leask_batchtopk", f"scale={scale}")
    cells = cells_of(cfg.grid[scale], [])
    for cell in cells[:: max(1, len(cells) // 6)]:
        OmegaConf.resolve(composed("experiment=leask_batchtopk", f"scale={scale}", *cell))
    assert len({cell_name(cell) for cell in cells}) == len(cells)


def test_the_published_pairs_can_be_scored_on_the_authors_text():
    cfg = composed("experiment=leask_stitching", "scale=paper")
    given = ["data=pile_10k", "stream.packing=per_document"]
    cells = cells_of(cfg.grid.paper, given)
    assert len(cells) == len(cells_of(cfg.grid.paper, [])) == 9 and all(set(given) < set(cell) for cell in cells)
    first = composed("experiment=leask_stitching", "scale=paper", *cells[0])
    assert first.data.path == "NeelNanda/pile-10k" and len(first.data.revision) == 40


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_no_line_of_a_yaml_is_too_long_to_read(path: Path):
    assert [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > MAX_LINE] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_differs_between_scales_is_in_one_table(name: str):
    raw = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{name}.yaml"))
    per_scale = [key for key, node in raw.items() if isinstance(node, dict) and set(node) >= set(SCALES)]
    assert set(per_scale) <= {"grid"}
    for key, row in OmegaConf.to_container(composed(f"experiment={name}", "scale=smoke").at).items():
        assert list(row) == ["paper", "demo", "smoke"], f"at.{key}"


def test_the_table_of_scales_is_no_setting_of_a_cell():
    cfg = composed("experiment=oneill_theorem", "scale=smoke")
    changed = composed("experiment=oneill_theorem", "scale=smoke", "at.steps.paper=1")
    assert "at" in cfg and "at" not in comparable(cfg) and comparable(changed) == comparable(cfg)


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(path.name for path in KEPT.iterdir() if path.is_dir()))
def test_kept_cells_are_finished_cells_of_todays_settings(name: str, every: int):
    for scale in (path.name for path in (KEPT / name).iterdir() if path.is_dir()):
        grid = OmegaConf.load(CONF / "experiment" / f"{name}.yaml").get("grid", {})
        cells = {cell_name(cell): cell for cell in cells_of(grid.get(scale) or [{}], [])}
        for path in sorted((KEPT / name / scale).glob("*/results.json"))[::every]:
            cfg = composed(f"experiment={name}", f"scale={scale}", *cells[path.parent.name])
            assert is_finished(path.parent, cfg), path.parent.name
