"""Every site of the README is trained and scored on the bundled model; the width is that of the site."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import run as runner
from core.errors import UserError
from core.methods.saved import load_dictionary
from core.models.loading import site_width
from core.models.sites import SITE_KINDS
from core.text.bundled import BundledText
from experiments import common
from experiments.leask.batchtopk import dictionaries
from tests.composing import composed

D, HIDDEN = 192, 768
SMOKE = ["experiment=leask_batchtopk", "scale=smoke", "method=topk", "method.dict_size=64", "method.k=8"]


@pytest.fixture
def run(tmp_path, artifacts, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    def one(*overrides: str) -> tuple[int, str]:
        places = [f"output_dir={tmp_path / 'out'}", f"artifacts_dir={artifacts}", "logging=none", "hydra.mode=RUN"]
        monkeypatch.setattr(sys, "argv", ["run.py", *SMOKE, *places, *overrides])
        return runner.main(), capsys.readouterr().err

    return one


def results(tmp_path: Path) -> dict:
    [path] = (tmp_path / "out").rglob("results.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_every_site_is_trained_at_its_own_width(run, tmp_path, kind):
    code, said = run(f"stream.site={kind}.4", "stream.n_tokens=2048")
    assert code == 0, said
    [record] = (tmp_path / "out").rglob("dictionary.json")
    dictionary = load_dictionary(json.loads(record.read_text())["folder"])
    assert dictionary.d_model == (HIDDEN if kind == "mlp_hidden" else D)
    written = results(tmp_path)
    assert 0 < written["metrics"]["nmse_raw_energy"] < 10
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(name for name in written["inputs"] if "/models/bundled/" in name) == [
        f"code:core/models/bundled/{name}" for name in files
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stream.site=mlp_hidden.4", "method.d_model=192"],
            "method.d_model is 192, but mlp_hidden.4 of bundled has 768",
        ),
        (["stream.site=mlp_out.4", "method.d_model=768"], "method.d_model is 768, but mlp_out.4 of bundled has 192"),
        (["stream.site=mlp_hidden.6"], "site: mlp_hidden.6 does not exist: the model has 6 layers (0 to 5)"),
        (["stream.site=resid_pre.0", "model.d_model=768"], "model.d_model is 768, but bundled has 192"),
        (["stream.site=resid_pre.0", "model.n_layers=7"], "model.n_layers is 7, but bundled has 6"),
    ],
)
def test_a_width_or_site_that_is_not_the_models_is_refused_before_text_is_read(run, monkeypatch, overrides, message):
    def read(*_: object) -> None:
        raise AssertionError("text is read")

    monkeypatch.setattr(BundledText, "documents", read)
    code, said = run(*overrides)
    assert code == 1 and message in said and "Traceback" not in said


@pytest.mark.parametrize("width", ["192", "null"])
def test_the_width_follows_the_model_whether_it_is_given_or_not(width):
    for site, expected in (("resid_post.5", D), ("mlp_hidden.0", HIDDEN)):
        cfg = composed(*SMOKE, f"model.d_model={width}", f"stream.site={site}")
        [request] = dictionaries(cfg)
        assert request.method["d_model"] == site_width(cfg.model, site) == expected
        [chosen] = dictionaries(composed(*SMOKE, f"stream.site={site}", f"method.d_model={expected}"))
        assert chosen.key == request.key


def test_a_family_and_the_dictionary_of_its_decoder_have_the_width_of_the_site():
    cfg = composed("experiment=leask_meta_sae", "scale=smoke", "stream.site=mlp_hidden.2", "meta=lw")
    assert common.meta_node(cfg)["method"]["d_model"] == HIDDEN
    wrong = composed("experiment=leask_meta_sae", "scale=smoke", "meta=lw", "meta.method.d_model=64")
    with pytest.raises(UserError, match=r"meta\.method\.d_model is 64, but resid_pre\.4 of bundled has 192"):
        common.meta_node(wrong)
    member = {**common.plain(cfg.method), "dict_size": 32}
    assert common.request(cfg, member).method["d_model"] == HIDDEN
    with pytest.raises(UserError, match=r"method\.d_model is 100, but mlp_hidden\.2 of bundled has 768"):
        common.request(cfg, {**member, "d_model": 100})
