"""Settings are checked when a run starts: each one alone, all together, and every leaf of every experiment."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from core import preflight
from core.errors import UserError
from core.results import comparable
from tests.composing import CONF, composed

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
VALUES: list[Any] = [None, "abc", -1, 0, 1.5, "nan", [], {}, 1e30, True]
MORE: list[Any] = [
    "",
    2**64,
    float("inf"),
    float("-inf"),
    [None],
    [-1],
    {"a": 1},
    "0",
    "1e8",
    "???",
    "${nothing}",
    10**400,
]


@cache
def base(name: str) -> DictConfig:
    """An experiment's first smoke cell."""
    from hydra_plugins.blocks_sweeper.sweeper import cells_of

    cfg = composed(f"experiment={name}", "scale=smoke")
    grid = cfg.grid.get("smoke")
    return composed(f"experiment={name}", "scale=smoke", *(cells_of(grid, [])[0] if grid else []))


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The names of all settings that are no groups. Of the table of scales those of smoke; no grid."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        name = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}" if path else str(key)
        child = node._get_node(key)
        if name == "grid" or (path.startswith("at.") and path.count(".") == 1 and key in ("paper", "demo")):
            continue
        group = isinstance(child, DictConfig | ListConfig) and not child._is_interpolation() and not child._is_none()
        if group and len(child):
            yield from leaves(child, name)
        else:
            yield name


@contextmanager
def changed(cfg: DictConfig, name: str, value: Any) -> Iterator[DictConfig]:
    """The configuration with another value, while the block runs."""
    parts = re.findall(r"[^.\[\]]+", name)
    parent: Any = cfg
    for part in parts[:-1]:
        parent = parent._get_node(int(part) if isinstance(parent, ListConfig) else part)
    key: Any = int(parts[-1]) if isinstance(parent, ListConfig) else parts[-1]
    content = parent.__dict__["_content"]
    before = content[key]
    content[key] = deepcopy(before)  # which an update changes
    try:
        OmegaConf.update(cfg, name, value, merge=False)
        yield cfg
    finally:
        content[key] = before


@cache
def places() -> list[tuple[str, str]]:
    """(experiment, leaf): every leaf once, with the first experiment that has it."""
    first: dict[str, str] = {}
    for name in EXPERIMENTS:
        for leaf in leaves(base(name)):
            first.setdefault(leaf, name)
    return [(name, leaf) for leaf, name in first.items()]


def refused_without_its_name(name: str, leaf: str, value: Any) -> str | None:
    """The message of a check that refuses a value of a setting without naming it. None if it passes, or is refused as
    it should be. Anything but a UserError is raised."""
    try:
        with changed(base(name), leaf, value) as cfg:
            preflight.check([cfg])
    except UserError as error:
        key = leaf.partition("[")[0]
        named = key.split(".")[1] if key.startswith("at.") else key
        spelled = {named, named.replace("_", ".")}  # at.fleet_shape is fleet.shape where it is used
        return None if any(one in str(error) for one in spelled) else f"{name} {leaf}={value!r}: {error}"
    return None


@pytest.mark.parametrize("part", range(4))
def test_every_setting_of_every_experiment_is_right_or_refused_by_name(part: int):
    """Each leaf with one of the values, so that every value meets many leaves."""
    wrong = [
        refused_without_its_name(name, leaf, VALUES[number % len(VALUES)])
        for number, (name, leaf) in list(enumerate(places()))[part::4]
    ]
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_setting_takes_or_refuses_a_value_of_every_kind(name: str):
    values = VALUES + MORE
    wrong = [refused_without_its_name(name, leaf, value) for leaf in leaves(base(name)) for value in values]
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_passes_as_it_is_and_every_setting_of_it_has_a_schema(name: str):
    """What no schema knows would pass with any value: only the tables and the settings without numbers do."""
    preflight.check([base(name)])
    cfg = base(name).copy()
    with open_dict(cfg):
        cfg.no_such_setting = 1
    with pytest.raises(UserError, match=r"^no_such_setting: there is no such setting\."):
        preflight.check([cfg])


def refused(*overrides: str, name: str = "leask_batchtopk", scale: str = "smoke") -> list[str]:
    """The lines about a configuration."""
    try:
        preflight.check([composed(f"experiment={name}", f"scale={scale}", *overrides)])
    except UserError as error:
        return str(error).split("\n  ")
    return []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stream.n_tokens=0"], "stream.n_tokens: 0 must be positive."),
        (["stream.n_tokens=-5"], "stream.n_tokens: -5 must be positive."),
        (["stream.n_tokens=1.5"], "stream.n_tokens: 1.5 must be a whole number."),
        (["stream.n_tokens=1e30"], "stream.n_tokens: 1e+30 must be a whole number, below 2^63 in size."),
        (["stream.batch_size=0"], "stream.batch_size: 0 must be positive."),
        (["stream.batches_per_chunk=0"], "stream.batches_per_chunk: 0 must be positive."),
        (["stream.buffer_tokens=0"], "stream.buffer_tokens: 0 must be positive."),
        (["stream.rows_per_forward=0"], "stream.rows_per_forward: 0 must be positive."),
        (["stream.buffer_dtype=banana"], "stream.buffer_dtype: 'banana' must be one of float32, bfloat16, float16."),
        (["stream.buffer_dtype=int8"], "stream.buffer_dtype: 'int8' must be one of float32, bfloat16, float16."),
        (["stream.site=4"], "stream.site: 4 must be a text. In quotes it is one: stream.site=\"'4'\""),
        (["stream.site=attn.1"], "stream.site: 'attn.1' is not one of resid_pre.L"),
        (["stream.seed=null"], "stream.seed: null must be a whole number."),
        (["seed=1.5"], "seed: 1.5 must be a whole number."),
        (["seed=null"], "seed: null must be a whole number."),
        (["seed=abc"], "seed: 'abc' must be a whole number."),
        (["seed=true"], "seed: true must be a whole number."),
        (["seed=18446744073709551616"], "seed: 18446744073709551616 must be a whole number, below 2^63 in size."),
        (["trainer.devices=0"], "trainer.devices: 0 must be 1 or more."),
        (["trainer.devices=100000"], "trainer.devices: 100000 must be at most"),
        (["trainer.accelerator=tpu"], "trainer.accelerator: 'tpu' must be one of auto, cpu, gpu, cuda."),
        (["trainer.accelerator=mps"], "trainer.accelerator: 'mps' must be one of auto, cpu, gpu, cuda."),
        (["trainer.processes=some"], "trainer.processes: 'some' must be auto or a whole number."),
        (["trainer.cell_processes=0"], "trainer.cell_processes: 0 must be 1 or more."),
        (["trainer.precision=16-mixed"], "trainer.precision: '16-mixed' must be one of 32-true, bf16-mixed."),
        (["trainer.checkpoint_every_seconds=abc"], "trainer.checkpoint_every_seconds: 'abc' must be a finite number."),
        (["trainer.checkpoint_every_seconds=-1"], "trainer.checkpoint_every_seconds: -1.0 must be 0 or more."),
        (["method.betas=[0.9]"], "method.betas: [0.9] must be a list of 2 numbers."),
        (["method.k=null"], "method.k: null must be a whole number."),
        (["method.k=abc"], "method.k: 'abc' must be a whole number."),
        (["method.k=65", "method.dict_size=64"], "method.k: 65 is too much for a dictionary with only"),
        (["method.dict_size=64.5"], "method.dict_size: 64.5 must be a whole number."),
        (["method.dict_size=-3"], "method.dict_size: -3 must be positive."),
        (["method._target_=os.path.join"], "method._target_: 'os.path.join' must be a dictionary-learning method"),
        (["method._target_=no.such"], "method._target_: 'no.such' must be the full name of a class or function"),
        (["artifacts_dir=null"], "artifacts_dir: null must be a text."),
        (["artifacts_dir=''"], "artifacts_dir: '' must not be empty."),
        (["output_dir=''"], "output_dir: '' must not be empty."),
        (["force=1"], "force: 1 must be true or false."),
        (["logging.logger=paper"], "logging.logger: 'paper' must be one of tensorboard, wandb, none."),
        (["logging.log_every_steps=0"], "logging.log_every_steps: 0 must be 1 or more."),
        (["cache=disk", "cache.max_gb=-1"], "cache.max_gb: -1.0 must be 0 or more."),
        (["evaluation.n_rows=0"], "evaluation.n_rows: 0 must be 1 or more."),
        (["evaluation.n_downstream_rows=-1"], "evaluation.n_downstream_rows: -1 must be 0 or more."),
        (
            ["evaluation.n_downstream_rows=17"],
            "evaluation.n_downstream_rows: 17 must be at most evaluation.n_rows",
        ),
        (["evaluation.compat_tokens=null"], "evaluation.compat_tokens: null must be a whole number."),
        (["evaluation.compat_tokens=4096"], "evaluation.compat_tokens=4096 needs 1 row or more"),
        (["stream.calibration_batches=0"], "stream.calibration_batches: 0 must be 1 or more: method measures"),
        (["stream.batch_size=4096"], "stream.buffer_tokens (2,048) must be a multiple of stream.batch_size (4096)"),
        (["stream.n_ctx=100"], "stream.buffer_tokens (2,048) must be a multiple of"),
        (["data=local"], "data.path: this setting must be given: data.path=<value>."),
        (["data=local", "data.path=nowhere.txt"], "data.path: "),
        (["data=local", "data.path=conf", "data.shuffle_buffer=0"], "data.shuffle_buffer"),
        (["data.mb_per_package=0"], "data.mb_per_package: 0.0 must be positive."),
        (["corpus_mb_per_package=0"], "corpus_mb_per_package: 0.0 must be positive."),
        (["model.device=mps"], "model.device: 'mps' must be one of auto, cpu, cuda, cuda:<n>."),
        (["model.device=banana"], "model.device: 'banana' must be one of auto, cpu, cuda, cuda:<n>."),
        (["model.device=meta"], "model.device: 'meta' must be one of auto, cpu, cuda, cuda:<n>."),
        (["model.device=cuda:999"], "model.device=cuda:999: this machine has no such GPU."),
        (["model.dtype=int8"], "model.dtype: 'int8' must be one of float32, bfloat16, float16."),
        (["module=no.such.module"], "module: 'no.such.module' must be a module"),
        (["module=os"], "module: 'os' must have a function run(cfg)."),
        (
            ["at.n_tokens.smoke=abc"],
            "stream.n_tokens: 'abc' must be a whole number. The value comes from at.n_t",
        ),
        (["at.n_tokens=3"], "stream.n_tokens: its value, ${at.n_tokens.${scale}}, cannot be found."),
        (["method.seed=${nothing}"], "method.seed: its value, ${nothing}, cannot be found."),
        (["+stream.shuffle=3"], "stream.shuffle: there is no such setting."),
        (["+method.kk=3"], "method.kk: there is no such setting. Did you mean method.k?"),
        (["+data.mb_per_packages=3"], "data.mb_per_packages: there is no such setting. Did you mean data.mb_p"),
    ],
)
def test_one_wrong_setting_is_one_line_with_name_value_and_rule(overrides: list[str], message: str):
    [line] = refused("method=batchtopk", "method.dict_size=64", "method.k=8", *overrides)
    assert line.startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_said_at_the_start(accelerator: str):
    [line] = refused(f"trainer.accelerator={accelerator}")
    assert line.startswith(f"trainer.accelerator: '{accelerator}' must be a device of this machine")
    assert "take auto or cpu" in line


def test_all_wrong_settings_of_a_cell_are_listed_together():
    head, *lines = refused("seed=abc", "stream.n_tokens=0", "trainer.devices=0", "method=batchtopk", "method.k=null")
    assert head == "4 settings will not do:"
    assert sorted(line.partition(":")[0] for line in lines) == [
        "method.k",
        "seed",
        "stream.n_tokens",
        "trainer.devices",
    ]


def test_a_setting_that_is_wrong_in_some_cells_of_a_sweep_says_in_how_many():
    cells = [
        composed("experiment=leask_batchtopk", "scale=smoke", "method.dict_size=64", f"method.k={k}") for k in (8, 65)
    ]
    with pytest.raises(UserError, match=r"^method\.k: 65 is too much .* \(In 1 of 2 cells\.\)$"):
        preflight.check(cells)


@pytest.mark.parametrize("written", ["1e4", "10_000", "'1e4'", "'10_000'", "10000.0"])
def test_whole_numbers_may_be_written_as_one_likes_and_are_numbers_afterwards(written: str):
    cfg = composed("experiment=leask_batchtopk", "scale=smoke", f"stream.n_tokens={written}", "method.lr='2e-3'")
    preflight.check([cfg])
    assert cfg.stream.n_tokens == 10_000 and type(cfg.stream.n_tokens) is int and cfg.method.lr == 0.002
    plain = composed("experiment=leask_batchtopk", "scale=smoke", "stream.n_tokens=10000", "method.lr=2e-3")
    assert comparable(cfg) == comparable(plain)


def test_a_check_changes_no_configuration_that_is_right():
    for name in EXPERIMENTS:
        before = OmegaConf.to_yaml(base(name))
        preflight.check([base(name)])
        assert OmegaConf.to_yaml(base(name)) == before


def test_a_number_that_is_written_in_the_table_of_scales_becomes_one_there():
    cfg = composed(
        "experiment=bench_scaling", "scale=smoke", "at.base.smoke.batch_size='64'", "at.repetitions.smoke='2'"
    )
    preflight.check([cfg])
    assert cfg.base.batch_size == 64 and cfg.repetitions == 2


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("leask_meta_sae", ["meta.calibration_batches=0"], "meta.calibration_batches: 0 must be 1 or more"),
        ("leask_meta_sae", ["meta.method.k=7"], "meta.method.k: 7 is too much for a dictionary with only meta.method."),
        ("leask_meta_sae", ["meta.batch_size=1000"], "meta.batch_size: 1000 is too much, there are at most 128 rows"),
        ("leask_meta_sae", ["family=[{dict_size: 8}, {dict_size: x}]", "base=1"], "family[1].dict_size: 'x' must be"),
        ("leask_meta_sae", ["meta.method._target_=core.methods.topk.TopK"], "meta.method"),
        ("leask_stitching", ["small.dict_size=32", "large.dict_size=0"], "large.dict_size: 0 must be positive."),
        ("leask_stitching", ["small.dict_size=32", "large.dict_size=64", "evaluation.n_downstream_rows=0"],
         "evaluation.n_downstream_rows: 0 must be 1 or more"),
        ("leask_editing", ["planting.n_tokens=1"], "planting.n_tokens: 1 must be 512 or more"),
        ("leask_editing", ["editing.pairs=[[a]]"], "editing.pairs: ['a'] must be a list of 2"),
        ("oneill_unknown", ["steps=0"], "steps: 0 must be 1 or more."),
        ("oneill_unknown", ["seeds=[]"], "seeds: [] must not be empty."),
        ("oneill_unknown", ["coder.l1=0.1"], "coder.l1: 0.1 must be a list."),
        ("oneill_unknown", ["source.n_test=1"], "source.n_test: 1 must be 2 or more."),
        ("oneill_unknown", ["threads=0"], "threads: 0 must lie between 1 and 1024."),
        ("oneill_classical", ["seeds=[-1]"], "seeds: [-1] must be a list of whole numbers from 0 to 2^32 - 1"),
        ("oneill_llm", ["profile=papertext"], "profile: 'papertext' must be one of paper_text, repo"),
        ("bundled_lm", ["lm.stride=100"], "lm.stride: 100 must be at most n_positions = 64."),
        ("bench_stream", ["stream.buffer_tokens=100"], "stream.buffer_tokens (100) must be a multiple of"),
        ("bench_hours", ["fractions=[0.3,0.1]"], "fractions: [0.3, 0.1] must grow within (0, 1]."),
        ("bench_stacked", ["at.panels.smoke.unknown_sae.K=17"], "panels.unknown_sae.K: 17 must be at most N = 16."),
    ],
)  # fmt: skip
def test_settings_of_experiments_are_checked_too(name: str, overrides: list[str], message: str):
    lines = refused(*overrides, name=name)
    assert any(line.startswith(message) for line in lines), lines
