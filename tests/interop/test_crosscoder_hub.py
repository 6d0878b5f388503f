"""Loading crosscoders by a name on the hub, which is a web server on this machine."""

import pytest
import torch
from safetensors.torch import save_file

from core import inputs
from core.errors import UserError
from core.interop import hub
from core.interop.loading import load
from tests.fake_hub import COMMIT, closed_port, serving
from tests.interop.test_crosscoder import KISSANE, MINDER, W_DEC
from tests.interop.test_loading import Hub


@pytest.fixture
def served(endpoint, tmp_path, monkeypatch):
    """A crosscoder in both of Minder et al.'s file formats, one of Kissane et al., and a repository without one."""
    root = tmp_path / "served"
    for name in ("lab/minder", "lab/kissane/blocks.14.hook_resid_pre", "lab/text"):
        (root / name).mkdir(parents=True)
    save_file(MINDER, root / "lab/minder/model.safetensors")
    torch.save(MINDER | {"k": 100, "threshold": 0.5}, root / "lab/minder/model.pt")
    (root / "lab/minder/config.json").write_text("{}")
    torch.save(KISSANE, root / "lab/kissane/blocks.14.hook_resid_pre/cc_weights.pt")
    (root / "lab/text/README.md").write_text("nothing here")
    handler = type("Served", (Hub,), {"root": root, "requests": []})
    monkeypatch.setattr(hub, "TIMEOUT_S", 2.0)
    with serving(handler) as url:
        endpoint(url)
        yield handler


def crosscoder(repo: str, path: str | None = None, revision: str | None = None, d_model: int | None = None, **options):
    return load(d_model, repo, path, revision, n_models=2, **options)


def fetched(served) -> set[str]:
    return {line.rpartition("/")[2] for line in served.requests if line.startswith("GET") and "/resolve/" in line}


def test_only_the_checkpoint_of_a_crosscoder_is_fetched(served):
    with inputs.noting() as noted:
        loaded = crosscoder("lab/minder", d_model=3)
    assert fetched(served) == {"model.safetensors", "config.json"}
    assert torch.equal(loaded.W_dec, W_DEC.transpose(0, 1)) and loaded.settings.rule == "relu"
    assert loaded.source["repo"] == "lab/minder" and loaded.source["revision"] == COMMIT
    assert noted == {"hub:lab/minder@main": COMMIT}


@pytest.mark.parametrize("path", ["blocks.14.hook_resid_pre", "blocks.14.hook_resid_pre/cc_weights.pt"])
def test_a_folder_or_a_file_within_the_repository_can_be_named(served, path):
    loaded = crosscoder("lab/kissane", path, norm_scaling_factor=[0.5, 0.25])
    assert loaded.source["layout"] == "matrices" and fetched(served) == {"cc_weights.pt"}


def test_a_named_file_is_read_even_if_another_comes_first(served, tmp_path):
    assert crosscoder("lab/minder", "model.pt").threshold == 0.5
    assert fetched(served) == {"model.pt", "config.json"}
    crosscoder("lab/minder")
    for repo, folder in (("lab/minder", ""), (str(served.root), "lab/minder/")):
        assert crosscoder(repo, f"{folder}model.pt").settings.rule == "threshold"
    assert crosscoder(str(served.root), "lab/minder").settings.rule == "relu"


def test_a_fetched_crosscoder_loads_again_without_the_hub(served, endpoint):
    crosscoder("lab/minder")
    endpoint(f"http://127.0.0.1:{closed_port()}")
    assert crosscoder("lab/minder").source["revision"] == COMMIT
    with pytest.raises(UserError, match=r"method\.repo: lab/kissane, folder .*, could not be fetched"):
        crosscoder("lab/kissane", "blocks.14.hook_resid_pre")


@pytest.mark.parametrize(
    ("repo", "path", "revision", "message"),
    [("lab/nothing", None, None, r"method\.repo: lab/nothing is neither"),
     ("lab/minder", None, "v9", r"method\.revision: lab/minder has no revision 'v9'"),
     ("lab/minder", "blocks.9", None, r"method\.path: lab/minder has no folder blocks\.9"),
     ("lab/text", None, None, r"method\.path: lab/text.*contains no dictionary in a known format, only README\.md"),
     ("./nowhere", None, None, r"method\.repo: there is no folder")],
)  # fmt: skip
def test_the_error_for_something_that_the_hub_lacks_names_the_setting(served, repo, path, revision, message):
    with pytest.raises(UserError, match=message):
        crosscoder(repo, path, revision)


def test_a_wrong_d_model_is_an_error(served):
    with pytest.raises(UserError, match=r"model\.d_model is 4, but the dictionary in .* has 3"):
        crosscoder("lab/minder", d_model=4)
