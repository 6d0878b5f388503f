"""Loading crosscoders by a name on the hub, which is a web server on this machine."""

import pytest
import torch
from safetensors.torch import save_file

from core import inputs
from core.errors import UserError
from core.interop import crosscoder, hub
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


def fetched(served) -> set[str]:
    return {line.rpartition("/")[2] for line in served.requests if line.startswith("GET") and "/resolve/" in line}


def test_only_the_checkpoint_of_a_crosscoder_is_fetched(served):
    with inputs.noting() as noted:
        loaded = crosscoder.load("lab/minder", d_model=3)
    assert fetched(served) == {"model.safetensors"}
    assert torch.equal(loaded.W_dec, W_DEC.transpose(0, 1)) and loaded.threshold is None
    assert loaded.source == {"repo": "lab/minder", "path": None, "revision": COMMIT}
    assert noted == {"hub:lab/minder@main": COMMIT}


@pytest.mark.parametrize("path", ["blocks.14.hook_resid_pre", "blocks.14.hook_resid_pre/cc_weights.pt"])
def test_a_folder_or_a_file_within_the_repository_can_be_named(served, path):
    loaded = crosscoder.load("lab/kissane", path)
    assert loaded.layout == "matrices" and fetched(served) == {"cc_weights.pt"}


def test_a_named_file_is_read_even_if_another_comes_first(served, tmp_path):
    assert crosscoder.load("lab/minder", "model.pt").threshold == 0.5
    assert fetched(served) == {"model.pt"}
    crosscoder.load("lab/minder")
    assert crosscoder.load("lab/minder", "model.pt").k == 100
    assert crosscoder.load(str(served.root), "lab/minder/model.pt").k == 100
    assert crosscoder.load(str(served.root), "lab/minder").k is None


def test_a_fetched_crosscoder_loads_again_without_the_hub(served, endpoint):
    crosscoder.load("lab/minder")
    endpoint(f"http://127.0.0.1:{closed_port()}")
    assert crosscoder.load("lab/minder").source["revision"] == COMMIT
    with pytest.raises(UserError, match=r"crosscoder\.repo: lab/kissane, folder .*, could not be fetched"):
        crosscoder.load("lab/kissane", "blocks.14.hook_resid_pre")


@pytest.mark.parametrize(
    ("repo", "path", "revision", "message"),
    [("lab/nothing", None, None, r"crosscoder\.repo: lab/nothing is neither"),
     ("lab/minder", None, "v9", r"crosscoder\.revision: lab/minder has no revision 'v9'"),
     ("lab/minder", "blocks.9", None, r"crosscoder\.path: lab/minder has no folder blocks\.9"),
     ("lab/text", None, None, r"crosscoder\.path: lab/text.*contains no dictionary in a known format, only README\.md"),
     ("./nowhere", None, None, r"crosscoder\.repo: there is no folder")],
)  # fmt: skip
def test_the_error_for_something_that_the_hub_lacks_names_the_setting(served, repo, path, revision, message):
    with pytest.raises(UserError, match=message):
        crosscoder.load(repo, path, revision)


def test_a_wrong_d_model_is_an_error(served):
    with pytest.raises(UserError, match=r"model\.d_model is 4, but the crosscoder in .* has 3"):
        crosscoder.load("lab/minder", d_model=4)
