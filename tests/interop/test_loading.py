"""`method=pretrained`: from folders, from a hub that is a web server on this machine, and without a hub."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from core.errors import UserError
from core.interop import hub, saelens
from core.interop.hooks import check_site, hook_of, site_of
from core.interop.loading import load
from core.methods.base import DictionaryMethod
from core.methods.batchtopk import BatchTopK
from core.methods.pretrained import Pretrained
from core.methods.saved import save_dictionary
from tests.fake_hub import COMMIT, FakeHub, closed_port, serving

GEMMA = "layer_3/width_16k/average_l0_22"


def put_gemma(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (24, 80), "W_dec": (80, 24), "b_enc": (80,), "b_dec": (24,)}
    arrays = {name: torch.randn(shape, generator=g).numpy() for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", threshold=np.full(80, 1.0, np.float32), **arrays)


class Hub(FakeHub):
    """Answers as the hub would for the repositories below `root`; `lab/gated` is gated. Logs all requests."""

    root: Path
    requests: list[str]
    broken = ""

    def serve(self):
        path = unquote(self.path.split("?")[0])
        self.requests.append(f"{self.command} {path}")
        _, owner, name, *rest = path.removeprefix("/api/models").split("/")
        folder = self.root / owner / name
        if not folder.is_dir():
            return self.refuse(404, "RepoNotFound")
        if rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if name == "gated" and rest[0] != "revision":
            return self.refuse(403, "GatedRepo")
        if rest[0] == "revision":
            return self.answer(json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}).encode())
        if rest[0] == "resolve" and self.broken and path.endswith(self.broken):
            return self.refuse(400, "Broken")  # other errors are retried for half a minute
        inside = folder / "/".join(rest[2:])
        if rest[0] == "tree":
            return self.tree(folder, inside)
        return self.answer(inside.read_bytes()) if inside.is_file() else self.refuse(404, "EntryNotFound")

    def tree(self, folder, inside):
        if not inside.is_dir():
            return self.refuse(404, "EntryNotFound")
        kind = {True: "directory", False: "file"}
        entries = [
            {"type": kind[e.is_dir()], "path": str(e.relative_to(folder)), "oid": "0", "size": 1}
            for e in inside.iterdir()
        ]
        return self.answer(json.dumps(entries).encode())


@pytest.fixture
def served(endpoint, tmp_path, dictionary, monkeypatch):
    """A hub with two Gemma Scope dictionaries, a SAELens repository, a gated one and one without a dictionary."""
    root = tmp_path / "served"
    for name in (GEMMA, GEMMA.replace("22", "41")):
        put_gemma(root / "lab/gemma-scope-2b-pt-res" / name)
    saelens.write(
        dictionary("topk", input_norm="none"), root / "lab/saes/blocks.8.hook_resid_pre_80", site="resid_pre.8"
    )
    (root / "lab/saes/blocks.8.hook_resid_pre_80/huge.pt").write_bytes(b"must not be fetched")
    (root / "lab/gated").mkdir()
    (root / "lab/text").mkdir()
    (root / "lab/text/README.md").write_text("nothing here")
    handler = type("Served", (Hub,), {"root": root, "requests": []})
    monkeypatch.setattr(hub, "TIMEOUT_S", 2.0)
    with serving(handler) as url:
        endpoint(url)
        yield handler


def test_only_the_files_of_the_dictionary_are_fetched_from_the_hub(served, rows):
    method = load(24, "lab/saes", "blocks.8.hook_resid_pre_80", site="resid_pre.8")
    assert isinstance(method, Pretrained) and method.settings.k == 6
    assert method.source["revision"] == COMMIT and method.source["repo"] == "lab/saes"
    fetched = {line.rpartition("/")[2] for line in served.requests if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"cfg.json", "sae_weights.safetensors"}


@pytest.mark.parametrize("path", [GEMMA, f"{GEMMA}/params.npz"])
def test_gemma_scope_is_recognised_by_its_file_and_its_site_by_the_names(path, served):
    repo = "lab/gemma-scope-2b-pt-res"
    method = load(24, repo, path, site="resid_pre.4")  # the output of block 3 is the input of block 4
    assert method.source["hook"] == "blocks.3.hook_resid_post"
    with pytest.raises(UserError, match=r"Set stream\.site=resid_post\.3, or method\.site=null"):
        load(24, repo, path, site="resid_post.4")
    assert load(24, repo, path, site=None).dict_size == 80


def test_a_fetched_dictionary_loads_again_without_the_hub(served, endpoint, monkeypatch):
    load(24, "lab/saes", "blocks.8.hook_resid_pre_80")
    endpoint(f"http://127.0.0.1:{closed_port()}")
    for revision in (None, "main", COMMIT):
        assert load(24, "lab/saes", "blocks.8.hook_resid_pre_80", revision).source["revision"] == COMMIT
    with pytest.raises(UserError, match=r"could not be fetched, and is not complete in the local cache"):
        load(24, "lab/gemma-scope-2b-pt-res", GEMMA)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"offline mode is on"):
        load(24, "lab/gemma-scope-2b-pt-res", GEMMA)


def test_an_incomplete_download_is_an_error_and_continues_the_next_time(served):
    served.broken = saelens.WEIGHTS
    with pytest.raises(UserError, match="could not be fetched, and is not complete in the local cache"):
        load(24, "lab/saes", "blocks.8.hook_resid_pre_80")
    served.broken = ""
    assert load(24, "lab/saes", "blocks.8.hook_resid_pre_80").dict_size == 80


@pytest.mark.parametrize(
    ("repo", "path", "revision", "message"),
    [("lab/nothing", None, None, "lab/nothing is neither a local folder nor a readable model repository"),
     ("lab/gated", None, None, "lab/gated is gated"),
     ("lab/saes", None, "v9", "has no revision 'v9'"),
     ("lab/saes", "blocks.9", None, r"method\.path: lab/saes has no folder blocks\.9"),
     ("lab/saes", None, None, "contains no dictionary in a known format, only blocks.8"),
     ("lab/text", None, None, "contains no dictionary in a known format, only README.md"),
     ("./nowhere", None, None, "there is no folder"),
     ("a/b/c", None, None, "there is no folder")],
)  # fmt: skip
def test_the_error_for_something_that_the_hub_lacks_names_the_setting(repo, path, revision, message, served):
    with pytest.raises(UserError, match=message):
        load(24, repo, path, revision)


def test_the_error_for_a_folder_without_a_dictionary_lists_its_content(tmp_path, dictionary):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"method\.path: .* has no folder b; it contains a"):
        load(24, str(tmp_path), "b")
    with pytest.raises(UserError, match="lacks the files of a dictionary"):
        load(24, str(tmp_path / "a"))
    saelens.write(dictionary("topk", input_norm="none"), tmp_path / "a")
    with pytest.raises(UserError, match=r"lacks the files .*\(sparsify: sae.safetensors and cfg.json\).*sae_weights"):
        load(24, str(tmp_path), "a", format="sparsify")
    with pytest.raises(UserError, match=r"method\.format: 'onnx' is not one of"):
        load(24, str(tmp_path), "a", format="onnx")  # type: ignore[arg-type]
    (tmp_path / "a/ae.pt").touch()
    (tmp_path / "a/config.json").touch()
    with pytest.raises(UserError, match=r"has the files of saelens and dictionary_learning\. Set it to one"):
        load(24, str(tmp_path), "a")
    assert load(24, str(tmp_path), "a", format="saelens").dict_size == 80
    save_file({"decoder.weight": torch.zeros(2, 3, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="seems to contain a crosscoder"):
        load(24, str(tmp_path))


def test_a_wrong_d_model_or_dict_size_is_an_error(tmp_path, dictionary):
    saelens.write(dictionary("topk", input_norm="none"), tmp_path)
    with pytest.raises(UserError, match=r"model\.d_model is 768, but the dictionary in .* has 24"):
        load(768, str(tmp_path))
    with pytest.raises(UserError, match=r"method\.dict_size is 81, but .* has 80"):
        load(24, str(tmp_path), dict_size=81)


def test_an_input_norm_can_be_set_if_the_files_have_none(tmp_path, dictionary, rows):
    saelens.write(dictionary("batchtopk", input_norm="none"), tmp_path / "none")
    centred = load(24, str(tmp_path / "none"), input_norm="token_center")
    plain = load(24, str(tmp_path / "none"))
    x = rows - rows.mean(1, keepdim=True)
    assert torch.equal(centred.encode(centred.norm(rows)[0]).dense(), plain.encode(x).dense())
    torch.testing.assert_close(centred.reconstruct(rows), plain.reconstruct(x) + rows.mean(1, keepdim=True))
    saelens.write(dictionary("batchtopk", input_norm="token_std"), tmp_path / "std")
    with pytest.raises(
        UserError, match=r"method\.input_norm=token_center: .* has its own input normalisation, layer_n"
    ):
        load(24, str(tmp_path / "std"), input_norm="token_center")
    with pytest.raises(UserError, match=r"method\.input_norm=scalar"):
        load(24, str(tmp_path / "none"), input_norm="scalar")
    put_gemma(tmp_path / "gemma")
    with pytest.raises(UserError, match=r"method\.norm_scaling_factor"):
        load(24, str(tmp_path / "gemma"), norm_scaling_factor=2.0)


def test_dictionaries_trained_here_load_as_their_own_class(tmp_path, dictionary, rows):
    method: DictionaryMethod = dictionary("batchtopk")
    save_dictionary(method, {}, tmp_path / "store")
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell/dictionary.json").write_text(json.dumps({"folder": str(tmp_path / "store")}))
    for folder in ("store", "cell"):
        again = load(24, str(tmp_path / folder), site="resid_pre.0")
        assert isinstance(again, BatchTopK) and torch.equal(again.reconstruct(rows), method.reconstruct(rows))
    artifact = tmp_path / "store/artifact.json"
    stream = {"stream": {"site": "resid_pre.4"}}
    for spec in ({"source": {"batches": stream}}, stream):  # today's store, and that of version 0.1
        artifact.write_text(json.dumps({"spec": spec, "files": {}}))
        with pytest.raises(UserError, match=r"Set stream\.site=resid_pre\.4"):
            load(24, str(tmp_path / "cell"), site="resid_pre.0")
    artifact.write_text(json.dumps({"spec": {"rows": "of a decoder"}, "files": {}}))
    load(24, str(tmp_path / "cell"), site="resid_pre.0")
    weights = tmp_path / "store/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        load(24, str(tmp_path / "cell"))


@pytest.mark.parametrize(
    ("hook", "site"),
    [("blocks.8.hook_resid_pre", "resid_pre.8"), ("blocks.0.hook_mlp_out", "mlp_out.0"),
     ("blocks.2.mlp.hook_post", "mlp_hidden.2"), ("blocks.2.attn.hook_z", None), ("hook_embed", None),
     ("layers.5", "resid_post.5"), ("layers.5.mlp", "mlp_out.5"), ("transformer.h.3", "resid_post.3"),
     ("h.11", "resid_post.11"), ("model.layers.3.self_attn", None), ("resid_post_layer_8", "resid_post.8"),
     ("mlp_layer_8", "mlp_out.8"), ("attention_layer_8", None)],
)  # fmt: skip
def test_other_libraries_names_of_sites_are_translated(hook, site):
    assert site_of(hook) == site
    if site is None:
        with pytest.raises(UserError, match=rf"trained at {re.escape(hook)}, which is not a supported site"):
            check_site(hook, "resid_pre.0")
    else:
        check_site(hook, site)
        assert site_of(hook_of(site)) == site
