"""Dictionaries on demand: trained alone or together, resumed or not, they are the same."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from core import fleet
from core.artifacts import Store
from core.errors import NonFiniteLoss, UserError
from core.fleet import KIND, Request, load_or_train, prefetch, train_together
from core.methods.saved import load_dictionary
from core.runtime import Runtime
from core.streams.activation_source import ActivationSource

COMMON = {
    "d_model": 32, "dict_size": 64, "lr": 1e-3, "betas": [0.9, 0.99], "input_norm": "token_std", "seed": 0,
    "decoder_norm": "before_step", "dead_after_tokens": 256, "grad_clip": 1e5,
    "b_dec_init": "mean", "warmup_steps": 0, "decay_fraction": 0.5,
}  # fmt: skip
AUX = {
    "use_enc_bias": False,
    "enc_init_norm": None,
    "aux": "r1",
    "aux_coefficient": 1 / 32,
    "k_aux": 16,
    "path": "auto",
}
METHODS: dict[str, dict[str, Any]] = {
    "topk": {"_target_": "core.methods.topk.TopK", "k": 4, **AUX, **COMMON},
    "batchtopk": {
        "_target_": "core.methods.batchtopk.BatchTopK", "k": 4, "threshold_rule": "posthoc_mean",
        "threshold_ema_rate": 0.01, **AUX, **COMMON,
    },
    "jumprelu": {
        "_target_": "core.methods.jumprelu.JumpReLU", "l0_coefficient": 0.01, "l0_warmup_steps": 0, "bandwidth": 0.1,
        "ste": "correct", "initial_threshold": 1.0, "subtract_b_dec": False, "lr_threshold": 0.01,
        "path": "auto", **COMMON,
    },
}  # fmt: skip


@pytest.fixture
def setting(tmp_path: Path, runtime: Any, small_request: Any):
    """(maker of a runtime with the named store, maker of a request)."""

    def request(method: str, stream: dict[str, Any] | None = None, **changes: Any) -> Request:
        return small_request({**METHODS[method], **changes}, **(stream or {}))

    return lambda name, **changes: runtime(tmp_path, name, **changes), request


def weights(request: Request, run: Runtime) -> dict[str, torch.Tensor]:
    return load_dictionary(Store(run.artifacts_dir).path(KIND, request.spec)).state_dict()


def test_a_dictionary_trained_in_a_fleet_equals_bitwise_the_one_trained_alone(setting):
    run, request = setting
    requests = [request(name) for name in METHODS] + [request("batchtopk", k=8)]
    assert train_together(requests, run("together")) == {}
    for one in requests:
        load_or_train(one, run("alone"))
        a, b = weights(one, run("together")), weights(one, run("alone"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_dictionary_does_not_depend_on_the_number_of_threads_of_its_fleet(setting):
    run, request = setting
    requests = [request(name) for name in METHODS]
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        train_together(requests, run(f"threads{n_threads}"))
        assert torch.get_num_threads() == n_threads
    for one in requests:
        a, b = weights(one, run("threads1")), weights(one, run("threads2"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_stream_serves_a_group_and_what_is_stored_is_not_trained_again(setting, monkeypatch):
    run, request = setting
    opened = []
    original = ActivationSource.open
    monkeypatch.setattr(ActivationSource, "open", lambda self, run: opened.append(self) or original(self, run))
    load_or_train(request("topk"), run("store"))
    prefetch([request(name) for name in METHODS], run("store"))
    assert len(opened) == 2
    prefetch([request(name) for name in METHODS], run("store"))
    load_or_train(request("jumprelu"), run("store"))
    assert len(opened) == 2


def test_requests_on_different_streams_train_in_different_groups(setting, monkeypatch):
    run, request = setting
    groups = []
    monkeypatch.setattr(fleet, "train_together", lambda rs, run: groups.append(len(rs)) or {})
    prefetch([request("topk"), request("batchtopk"), request("topk", {"site": "resid_pre.2"})], run("store"))
    assert sorted(groups) == [1, 2]


def test_settings_that_do_not_fit_are_reported_and_the_other_dictionaries_are_trained(setting, capfd):
    run, request = setting
    bad, good = request("topk", k=65), request("topk")
    unknown = request("topk", _target_="core.methods.no_such_file.TopK")
    prefetch([bad, good, unknown], run("store"))
    err = capfd.readouterr().err
    assert "not trained together: method.k: 65" in err and "there is no module core.methods.no_such_file" in err
    assert Store(run("store").artifacts_dir).has(KIND, good.spec)
    with pytest.raises(UserError, match=r"method\.k: 65"):
        load_or_train(bad, run("store"))


def test_equal_settings_that_are_written_differently_have_one_key(setting):
    _, request = setting
    assert request("topk", lr=1, k=4).key == request("topk", lr=1.0, k=4.0).key != request("topk", lr=1, k=5).key


def test_a_dictionary_that_diverges_stops_alone_and_is_not_stored(setting):
    run, request = setting
    wild, calm = request("topk", lr=1e30, decoder_norm="none"), request("batchtopk")
    failed = train_together([wild, calm], run("store"))
    assert isinstance(failed[wild.key], NonFiniteLoss) and "step" in str(failed[wild.key])
    store = Store(run("store").artifacts_dir)
    assert store.has(KIND, calm.spec) and not store.has(KIND, wild.spec)
    load_or_train(calm, run("alone"))
    a, b = weights(calm, run("store")), weights(calm, run("alone"))
    assert all(torch.equal(a[name], b[name]) for name in a)


class InterruptedTrainingError(RuntimeError):
    pass


@pytest.mark.parametrize("after_chunk", [1, 4])
def test_a_resumed_fleet_ends_with_the_same_parameters_bit_for_bit(setting, monkeypatch, after_chunk):
    run, request = setting
    requests = [request(name) for name in METHODS]
    assert train_together(requests, run("whole")) == {}
    stopped = run("stopped", checkpoint_every_seconds=1e-9)
    original = fleet.Fleet.training_step

    def breaking(self: fleet.Fleet, chunk: Any, batch_idx: int) -> None:
        if batch_idx == after_chunk:
            raise InterruptedTrainingError
        original(self, chunk, batch_idx)

    monkeypatch.setattr(fleet.Fleet, "training_step", breaking)
    with pytest.raises(InterruptedTrainingError):
        train_together(requests, stopped)
    monkeypatch.setattr(fleet.Fleet, "training_step", original)
    steps = []
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", lambda self, path, **_: Path(path).touch())
    monkeypatch.setattr(fleet.Fleet, "training_step", lambda self, c, i: steps.append(i) or original(self, c, i))
    assert train_together(requests, stopped) == {}
    assert steps == list(range(after_chunk, 6))
    for one in requests:
        a, b = weights(one, run("whole")), weights(one, stopped)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_stored_dictionary_computes_the_same_as_the_trained_one(setting):
    run, request = setting
    method = load_or_train(request("batchtopk"), run("store"))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    again = load_or_train(request("batchtopk"), run("store"))
    assert not again.training and float(again.threshold) > 0
    assert torch.equal(again.reconstruct(x), method.reconstruct(x))


def test_a_manifest_may_name_only_methods_of_this_project(setting, tmp_path):
    run, request = setting
    load_or_train(request("topk"), run("store"))
    folder = Store(run("store").artifacts_dir).path(KIND, request("topk").spec)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "artifact.json").unlink()  # its hash would not fit
    for name in ("os.system", "core.fleet.Fleet", "core.methods.base.nn"):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "class": name}))
        with pytest.raises(UserError, match=rf"{re.escape(name)}(: only classes below| is no dictionary)"):
            load_dictionary(folder)
    with pytest.raises(UserError, match="no trained dictionary"):
        load_dictionary(tmp_path)


def in_processes(run: Runtime, n: int) -> Runtime:
    return replace(run, processes=n)


@pytest.fixture
def counted(monkeypatch) -> list[list[int]]:
    """Runs the workers' tasks here, one after another; collects the number of requests in each share."""
    shares: list[list[int]] = []

    def run_here(tasks: Any, slots: Any) -> list[Any]:
        shares.append([len(task.arguments[0]) for task in tasks])
        outcomes = []
        for task in tasks:
            try:
                outcomes.append(fleet.train_share(*pickle.loads(pickle.dumps(task.arguments))))
            except Exception as error:
                outcomes.append(error)
        return outcomes

    monkeypatch.setattr(fleet, "run_tasks", run_here)
    return shares


def test_a_group_split_over_processes_gives_bitwise_the_dictionaries_of_one_process(setting):
    run, request = setting
    requests = [request(name) for name in METHODS] + [request("batchtopk", k=8)]
    prefetch(requests, run("one"))
    prefetch(requests, in_processes(run("two"), 2))
    for one in requests:
        a, b = weights(one, run("one")), weights(one, run("two"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_group_is_split_by_cost_and_only_what_is_missing_is_trained(setting, counted):
    run, request = setting
    load_or_train(request("topk"), run("store"))
    prefetch([request("topk"), *(request("batchtopk", k=k) for k in (2, 4, 8))], in_processes(run("store"), 2))
    assert counted == [[2, 1]]
    prefetch([request("topk"), request("batchtopk", k=16)], in_processes(run("store"), 2))
    assert counted == [[2, 1]]  # only one is missing, so it is trained here


def test_surplus_processes_are_reported_once_and_each_dictionary_gets_one(setting, counted, capfd):
    run, request = setting
    prefetch([request(name) for name in METHODS], in_processes(run("store"), 7))
    assert counted == [[1, 1, 1]]
    assert capfd.readouterr().err.count("trainer.processes=7: only 3 are used") == 1


def test_a_failure_in_one_process_is_reported_and_the_other_dictionaries_are_stored(
    setting, counted, monkeypatch, capfd
):
    run, request = setting
    original = fleet.train_together

    def one_fails(requests: Any, run: Runtime) -> Any:
        if any("TopK" in one.method["_target_"] and one.method["k"] == 5 for one in requests):
            raise RuntimeError("out of memory")
        return original(requests, run)

    monkeypatch.setattr(fleet, "train_together", one_fails)
    wild = request("topk", lr=1e30, decoder_norm="none")
    lost, good = request("topk", k=5), request("jumprelu")
    prefetch([lost, good, wild], in_processes(run("store"), 3))
    store = Store(run("store").artifacts_dir)
    assert store.has(KIND, good.spec) and not store.has(KIND, lost.spec)
    err = capfd.readouterr().err
    assert "not trained together: out of memory" in err and "not finite" in err
    monkeypatch.setattr(fleet, "train_together", original)
    with pytest.raises(NonFiniteLoss):
        load_or_train(wild, run("store"))  # known to diverge, not tried again
    load_or_train(lost, run("store"))  # its cell trains it alone


def test_a_full_disk_in_one_process_ends_the_sweep_after_the_other_processes_have_stored_theirs(
    setting, counted, monkeypatch
):
    run, request = setting
    full, good = request("topk"), request("jumprelu")
    put = Store.put

    def refused(self: Store, kind: str, spec: Any, make: Any) -> Path:
        if spec == full.spec:
            raise OSError(28, "No space left on device")
        return put(self, kind, spec, make)

    monkeypatch.setattr(Store, "put", refused)
    with pytest.raises(OSError, match="No space left"):
        prefetch([full, good], in_processes(run("store"), 2))
    assert Store(run("store").artifacts_dir).has(KIND, good.spec)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_stopped_sweep_resumes_from_its_checkpoints_with_another_number_of_processes(
    setting, counted, monkeypatch, before, after
):
    run, request = setting
    requests = [request(name) for name in METHODS]
    prefetch(requests, run("whole"))
    stopped = run("stopped", checkpoint_every_seconds=1e-9)
    original = fleet.Fleet.training_step

    def breaking(self: fleet.Fleet, chunk: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise FloatingPointError
        original(self, chunk, batch_idx)

    monkeypatch.setattr(fleet.Fleet, "training_step", breaking)
    prefetch(requests, in_processes(stopped, before))
    steps = []
    monkeypatch.setattr(fleet.Fleet, "training_step", lambda self, c, i: steps.append(i) or original(self, c, i))
    prefetch(requests, in_processes(stopped, after))
    assert set(steps) == {3, 4, 5}
    for one in requests:
        a, b = weights(one, run("whole")), weights(one, stopped)
        assert all(torch.equal(a[name], b[name]) for name in a)
