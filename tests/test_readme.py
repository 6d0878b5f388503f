"""What the README tells a reader to type works: targets exist, commands compose, code runs."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from core.batch import Batch
from core.cells import cell_name
from core.methods.saved import load_dictionary, save_dictionary

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
TEXT = {page: (ROOT / page).read_text() for page in PAGES}


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT[page], flags=re.DOTALL | re.MULTILINE)


COMMANDS = sorted({line for page in PAGES for block in blocks("bash", page) for line in block.splitlines() if line})
INLINE = sorted(
    {command for page in PAGES for command in re.findall(r"`((?:make|python run\.py) [^`<>]+)`", TEXT[page])}
)


def composed(overrides: list[str]) -> DictConfig:
    OmegaConf.register_new_resolver("cell", cell_name, replace=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=overrides, return_hydra_config=True)


def check_command(words: list[str]) -> None:
    """Fails unless the command would start; raises for one that this test does not know."""
    while "=" in words[0]:  # PIP_EXTRA_INDEX_URL=... make demo
        words = words[1:]
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["python", "run.py"]:
        if len(words) > 2:
            composed([word for word in words[2:] if not word.startswith("method=relu_log")])
    elif words[:3] == ["python", "-m", "reports.compare"]:
        from reports.compare import main

        assert main([*words[3:-1], str(ROOT / "no_such_folder"), "--no-kept"]) == 1
    else:
        raise AssertionError(f"a command that no test knows: {' '.join(words)}")


@pytest.mark.parametrize("line", [*COMMANDS, *INLINE])
def test_every_command_in_the_readme_would_start(line: str):
    check_command(shlex.split(line.replace("...", "x")))


def test_a_command_with_a_misspelt_setting_or_target_would_be_noticed():
    with pytest.raises(Exception, match="Could not override"):
        check_command(["python", "run.py", "experiment=leask_batchtopk", "method.kk=3"])
    with pytest.raises(subprocess.CalledProcessError):
        check_command(["make", "dmeo"])


def test_every_link_and_picture_in_the_repository_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", TEXT[page]):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{page} links to {target}"


def test_the_readme_lists_the_experiments_that_exist():
    listed = set(
        re.findall(
            r"^\| `(\w+)` \|.*\|.*\|$",
            TEXT["README.md"].split("## Experiments")[1].split("| scale |")[0],
            flags=re.MULTILINE,
        )
    )
    assert listed == {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}


@pytest.fixture
def relu_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The README's example of a method, built from the README's YAML within leask_batchtopk's settings."""
    [code] = [block for block in blocks("python") if "class ReluLog" in block]
    path = tmp_path / "relu_log.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("core.methods.relu_log", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "core.methods.relu_log", module)
    monkeypatch.setattr("core.methods.relu_log", module, raising=False)
    spec.loader.exec_module(module)
    cfg = composed(["experiment=leask_batchtopk", "scale=smoke"])
    experiment = OmegaConf.load(ROOT / "conf/experiment/leask_batchtopk.yaml")
    with open_dict(cfg):
        cfg.method = OmegaConf.merge(OmegaConf.create(blocks("yaml")[0]), experiment.method)
    return instantiate(cfg.method, d_model=16, dict_size=32)


def test_the_readmes_example_of_a_method_learns_and_can_be_stored(relu_log, tmp_path: Path):
    relu_log.n_steps = 60
    optimizer = relu_log.configure_optimizers()
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    losses = [float(relu_log.update(Batch(x), optimizer)["loss"]) for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]
    save_dictionary(relu_log, {}, tmp_path / "stored")
    again = load_dictionary(tmp_path / "stored")
    assert torch.equal(again.reconstruct(x), relu_log.eval().reconstruct(x))


def test_the_readmes_code_for_a_trained_dictionary_runs(relu_log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    [code] = [block for block in blocks("python") if "load_dictionary" in block]
    monkeypatch.chdir(tmp_path)
    save_dictionary(relu_log, {}, tmp_path / "artifacts/dictionary/<key>")
    names: dict[str, torch.Tensor] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["x_hat"].shape == (4, 16)
    assert names["codes"].dense().shape == (4, 32)
    assert names["directions"].shape == (32, 16)
