"""Sources: one file and one YAML are enough for a new one; what a source cannot do is refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core import fleet
from core.errors import UserError
from core.fleet import Request, load_or_train, load_or_train_all
from core.metrics.recovery import dictionary_mcc
from core.streams.source import source_of
from experiments.common import request
from tests.composing import composed
from tests.streams.noise_source import Noise, NoiseSource

YAML = """# @package _global_
stream:
  _target_: tests.streams.noise_source.NoiseSource
  width: ${model.d_model}
  n_directions: 100
  n_steps: 24
  batch_size: 64
  batches_per_chunk: 4
  calibration_batches: 2
  seed: 0
"""
SETTINGS: dict[str, Any] = {
    "width": 16, "n_directions": 20, "n_steps": 24, "batch_size": 64, "batches_per_chunk": 4,
    "calibration_batches": 2, "seed": 0,
}  # fmt: skip
METHOD: dict[str, Any] = {
    "_target_": "core.methods.batchtopk.BatchTopK", "d_model": 16, "dict_size": 32, "k": 2, "use_enc_bias": False,
    "enc_init_norm": None,
    "threshold_rule": "posthoc_mean", "threshold_ema_rate": 0.01, "aux": "r1", "aux_coefficient": 1 / 32, "k_aux": 16,
    "lr": 1e-2, "betas": [0.9, 0.99], "input_norm": "none", "seed": 0, "decoder_norm": "before_step",
    "dead_after_tokens": 640, "grad_clip": 1e5,
    "b_dec_init": "zeros", "warmup_steps": 0, "decay_fraction": 0.0, "path": "auto",
}  # fmt: skip


def test_a_new_source_is_a_file_and_a_yaml(tmp_path: Path, runtime: Any):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/noise.yaml").write_text(YAML)
    own = ["source=noise", "stream.n_steps=300", "method=batchtopk", "method.dict_size=256", "method.k=2"]
    fast = ["method.input_norm=none", "method.lr=0.01"]
    cfg = composed("experiment=leask_batchtopk", "scale=smoke", *own, *fast, f"hydra.searchpath=[file://{tmp_path}]")
    wanted = request(cfg)
    dictionary = load_or_train(wanted, runtime(tmp_path, "store"))
    stream = wanted.source.open(runtime(tmp_path, "store"))
    assert isinstance(stream, Noise) and stream.directions.shape == (100, 192)
    assert dictionary_mcc(stream.directions, dictionary.W_dec, "cosine") > 0.8  # .25 before training


def test_dictionaries_of_one_source_are_trained_together_and_resume_to_the_same_bits(
    tmp_path: Path, runtime: Any, monkeypatch: pytest.MonkeyPatch
):
    source = NoiseSource(**SETTINGS)
    wanted = [Request({**METHOD, "k": k}, source) for k in (1, 2)] + [Request(METHOD, replace(source, seed=1))]
    whole = [load_or_train(one, runtime(tmp_path, "alone")) for one in wanted]
    original, steps = fleet.Fleet.training_step, []

    def breaking(self: Any, chunk: Any, batch_idx: int) -> None:
        steps.append((len(self.methods), batch_idx))
        if len(steps) == 4:
            raise RuntimeError("the power fails")
        original(self, chunk, batch_idx)

    monkeypatch.setattr(fleet.Fleet, "training_step", breaking)
    run = runtime(tmp_path, "together", checkpoint_every_seconds=1e-9)
    with pytest.raises(RuntimeError, match="power"):
        load_or_train_all(wanted, run)
    for one, other in zip(load_or_train_all(wanted, run), whole, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert sorted(n for n, _ in steps[4:]) == [1] * 6 + [2] * 3, "the pair resumed at its third chunk"


def test_the_key_depends_on_what_decides_the_batches_and_on_the_versions(monkeypatch: pytest.MonkeyPatch):
    source = NoiseSource(**SETTINGS)
    same = Request(METHOD, NoiseSource(**SETTINGS)).key
    assert Request(METHOD, source).key == same
    assert len({same, Request(METHOD, replace(source, seed=1)).key, Request({**METHOD, "k": 3}, source).key}) == 3
    monkeypatch.setattr(NoiseSource, "version", 2)
    newer = Request(METHOD, NoiseSource(**SETTINGS)).key
    assert newer != same
    monkeypatch.setattr("core.methods.batchtopk.BatchTopK.version", 2)
    assert Request(METHOD, NoiseSource(**SETTINGS)).key not in (same, newer)


def test_a_source_that_does_not_fit_is_refused_by_name():
    node = {"_target_": "tests.streams.noise_source.NoiseSource", **SETTINGS}
    assert source_of(node, {}, 1).batches_spec == {**SETTINGS, "devices": 1}
    with pytest.raises(UserError, match=r"stream\.n_dirs: there is no such setting"):
        source_of({**node, "n_dirs": 3}, {}, 1)
    with pytest.raises(UserError, match=r"stream\._target_: core\.methods\.topk\.TopK is not a source"):
        source_of({**node, "_target_": "core.methods.topk.TopK"}, {}, 1)
    with pytest.raises(UserError, match=r"trainer\.devices=2: the batches of NoiseSource"):
        source_of(node, {}, 2)
    for name in ("tests.streams.nowhere.NoiseSource", "NoiseSource"):
        with pytest.raises(UserError, match=r"stream\._target_"):
            source_of({**node, "_target_": name}, {}, 1)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("batch_size", "abc", "a whole number"), ("batch_size", -4, "positive"), ("batches_per_chunk", 0, "positive"),
        ("calibration_batches", -1, "0 or more"), ("n_tokens", 0, "positive"), ("n_tokens", 1.5, "a whole number"),
        ("n_ctx", 1, "2 or more"), ("packing", "foo", "concat, per_document"), ("rows_per_forward", 0, "positive"),
        ("buffer_dtype", "int8", "float32, bfloat16, float16"), ("seed", None, "a whole number"), ("site", 4, "a text"),
        ("max_document_tokens", 1, "2 or more"), ("buffer_tokens", True, "a whole number"),
    ],
)  # fmt: skip
def test_settings_of_activations_that_cannot_be_are_refused_by_name(
    small_request: Any, name: str, value: Any, rule: str
):
    with pytest.raises(UserError, match=rf"stream\.{name}: .* must .*{rule}"):
        small_request(METHOD, **{name: value})


def test_settings_that_mean_the_same_have_one_key(small_request: Any):
    assert small_request(METHOD, n_tokens=1e3).key == small_request(METHOD, n_tokens=1000).key


def test_a_source_cannot_hide_what_else_decides_a_dictionary(monkeypatch: pytest.MonkeyPatch):
    spec = {"method": "?", "precision": "?", "version": 9, "class": "?"}
    monkeypatch.setattr(NoiseSource, "batches_spec", spec)
    request = Request(METHOD, NoiseSource(**SETTINGS))
    assert request.spec["method"]["k"] == 2 and request.spec["precision"] == "32-true"
    assert request.source.spec["version"] == 1 and request.source.spec["batches"] == spec
