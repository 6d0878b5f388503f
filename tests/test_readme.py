"""What the pages tell a reader to type works: targets exist, commands compose, code runs, links and files are there."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from core.batch import Batch
from core.methods.saved import load_dictionary, save_dictionary
from reports.claims import load_papers
from tests.composing import CONF, ROOT, composed

README, ADDING, EXPERIMENTS = "README.md", "docs/adding.md", "docs/experiments.md"
PAGES = (README, "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
LOG = tuple(sorted(f"docs/log/{path.name}" for path in (ROOT / "docs/log").glob("*.md")))
TEXT = {page: (ROOT / page).read_text() for page in (*PAGES, *LOG)}
LINES, WIDTH = 170, 140  # of the README; of a line of prose in it
EXAMPLE_LINES = 25  # of the README's method
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]+))?\)")
FILE = re.compile(r"`((?:core|experiments|reports|conf|tests|docs|hydra_plugins)/[\w/.]*)")
OWN = "relu_log"  # the README's example of a method, which is not in the repository


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT[page], flags=re.DOTALL | re.MULTILINE)


def prose(page: str) -> list[str]:
    """The lines of a page outside of code, tables and pictures."""
    text = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.DOTALL | re.MULTILINE)
    return [line for line in text.splitlines() if not line.startswith(("|", "![", "<!--"))]


COMMANDS = sorted({line for page in PAGES for block in blocks("bash", page) for line in block.splitlines() if line})
INLINE = sorted(
    {command for page in TEXT for command in re.findall(r"`((?:make|python run\.py) [^`<>]+)`", TEXT[page])}
)


def check_command(words: list[str]) -> None:
    """Fails unless the command would start; raises for one that this test does not know."""
    while "=" in words[0]:  # PIP_EXTRA_INDEX_URL=... make demo
        words = words[1:]
    words[0] = words[0].removeprefix(".venv/bin/")
    nowhere = ["--outputs", str(ROOT / "no_such_folder")]
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["python", "run.py"]:
        if len(words) > 2:
            composed(*(word for word in words[2:] if word != f"method={OWN}"), hydra=True)
    elif words[:3] == ["python", "-m", "reports.compare"]:
        from reports.compare import main

        assert main([*words[3:], *nowhere, "--no-kept"]) == 1
    elif words[:3] == ["python", "-m", "reports.keep"]:
        from reports.keep import main

        assert main([*words[3:], *nowhere]) == 1
    else:
        raise AssertionError(f"a command that no test knows: {' '.join(words)}")


@pytest.mark.parametrize("line", [*COMMANDS, *INLINE])
def test_every_command_in_the_pages_would_start(line: str):
    check_command(shlex.split(line.replace("...", "x")))


def test_a_command_with_a_misspelt_setting_or_target_would_be_noticed():
    with pytest.raises(Exception, match="Could not override"):
        check_command(["python", "run.py", "experiment=leask_batchtopk", "method.kk=3"])
    with pytest.raises(subprocess.CalledProcessError):
        check_command(["make", "dmeo"])


def heading_anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXT)
def test_every_link_and_picture_leads_somewhere(page: str):
    for target, anchor in LINK.findall(TEXT[page]):
        if "://" not in target:
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), f"{page} links to {target}"
            assert not anchor or anchor in heading_anchors(path), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str):
    for name in FILE.findall(TEXT[page]):
        assert OWN in name or (ROOT / name).exists(), f"{page} names {name}"


def test_the_readmes_tree_names_what_is_there():
    [tree] = [block for block in blocks("") if block.startswith("run.py")]
    for line in tree.splitlines():
        name = line.split()[0]
        assert (ROOT / ("core" if line.startswith("  ") else "") / name).exists(), line


def test_the_readme_fits_on_three_screens():
    assert len(TEXT[README].splitlines()) <= LINES
    assert [line for line in prose(README) if len(line) > WIDTH] == []


def test_the_experiments_page_lists_the_experiments_that_exist():
    listed = re.findall(r"^\| `(\w+)` \|", TEXT[EXPERIMENTS].split("## Verdicts")[0], flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def test_the_log_lists_every_entry_once():
    listed = [target for target, _ in LINK.findall(TEXT["docs/log/README.md"])]
    assert sorted(listed) == sorted(Path(page).name for page in LOG if page != "docs/log/README.md")


def test_the_example_of_a_claim_is_one_of_the_claims():
    [example] = [yaml.safe_load(block) for block in blocks("yaml", ADDING) if "claims:" in block]
    [row] = example["claims"]
    papers = {claim.id: (paper, claim) for paper in load_papers() for claim in paper.claims}
    paper, claim = papers[row["id"]]
    assert {key: getattr(claim, key) for key in row} == row
    assert set(example["match"]) <= set(paper.experiments[claim.experiment].match)
    assert set(example["columns"]) <= set(paper.experiments[claim.experiment].columns)


def test_the_readmes_example_of_a_method_is_short():
    [code] = [block for block in blocks("python") if "class ReluLog" in block]
    assert len(code.splitlines()) <= EXAMPLE_LINES


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
    cfg = composed("experiment=leask_batchtopk", "scale=smoke")
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
