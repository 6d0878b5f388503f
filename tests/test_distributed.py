"""Several ranks train the same dictionary as one process does on the joined batches."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from core import distributed, fleet
from core.artifacts import Store
from core.batch import Batch
from core.errors import NonFiniteLoss, UserError
from core.fleet import KIND, Request, load_or_train, train_together
from core.kernels.across import mask_of_batchtopk, select_global_batchtopk
from core.kernels.select import mask_of_largest
from core.methods.saved import load_dictionary
from core.runtime import Runtime
from core.streams.activation_source import ActivationSource
from core.workers import Task, run_tasks

COMMON = {
    "d_model": 32, "dict_size": 64, "lr": 1e-3, "betas": [0.9, 0.99], "input_norm": "token_std", "seed": 0,
    "decoder_norm": "before_step", "dead_after_tokens": 64, "grad_clip": 0.5,
    "b_dec_init": "mean", "warmup_steps": 4, "decay_fraction": 0.5,
}  # fmt: skip
K_SPARSE = {
    "k": 4,
    "use_enc_bias": True,
    "enc_init_norm": None,
    "aux": "r1",
    "aux_coefficient": 1 / 32,
    "k_aux": 16,
    "path": "auto",
}
TOPK = {"_target_": "core.methods.topk.TopK", **K_SPARSE, **COMMON}
BATCHTOPK = {
    "_target_": "core.methods.batchtopk.BatchTopK", "threshold_rule": "posthoc_mean", "threshold_ema_rate": 0.1,
    **K_SPARSE, **COMMON,
}  # fmt: skip
JUMPRELU = {
    "_target_": "core.methods.jumprelu.JumpReLU", "l0_coefficient": 0.01, "l0_warmup_steps": 0, "bandwidth": 0.1,
    "ste": "correct", "initial_threshold": 1.0, "subtract_b_dec": False, "lr_threshold": 0.01, "path": "auto", **COMMON,
}  # fmt: skip
RELU_L1 = {
    "_target_": "core.methods.relu_l1.ReluL1", "l1_coefficient": 0.01, "l1_warmup_steps": 0,
    "reconstruction": "squared_error", "subtract_b_dec": True, "resample_every": 0, "path": "auto",
    **COMMON, "b_dec_init": "geometric_median",
}  # fmt: skip
METHODS = {
    "topk": TOPK,
    "topk, auxk normalized": {**TOPK, "aux": "normalized", "decoder_norm": "after_step"},
    "batchtopk": BATCHTOPK,
    "batchtopk, dense": {**BATCHTOPK, "path": "dense", "threshold_rule": "ema", "aux": "r2_compat"},
    "batchtopk, scalar norm": {**BATCHTOPK, "input_norm": "scalar", "aux": "normalized"},
    "jumprelu": JUMPRELU,
    "relu_l1": RELU_L1,
    "relu_l1, dense, scalar norm": {**RELU_L1, "path": "dense", "input_norm": "scalar"},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, runtime: Any, small_request: Any):
    """(maker of a runtime with the named store, maker of a request)."""
    folder = tmp_path_factory.mktemp("ranks")
    return lambda name, **changes: runtime(folder, name, **{"processes": "auto", **changes}), small_request


def weights(request: Request, run: Runtime) -> dict[str, Tensor]:
    return load_dictionary(Store(run.artifacts_dir).path(KIND, request.spec)).state_dict()


class JoinedStream:
    """The ranks' batches one after the other, as one batch."""

    def __init__(self, source: ActivationSource) -> None:
        self.streams = [source.live(rank) for rank in range(source.devices)]
        self.device = self.streams[0].device

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return Batch(torch.cat([next(stream).x for stream in self.streams]))

    def state_dict(self) -> dict[str, Any]:
        return {}


def train_joined(requests: list[Request], run: Runtime) -> None:
    """Train in this process on the joined batches of several ranks."""
    methods, _ = fleet._build(requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationSource, "open", lambda self, run: JoinedStream(self))
        fleet._train(requests, methods, Store(run.artifacts_dir), run)


def assert_trained_alike(request: Request, one: Runtime, other: Runtime) -> None:
    """After a whole training, parameters are equal up to rounding, and counters exactly."""
    a, b = weights(request, one), weights(request, other)
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(a["tokens_since_fired"], b["tokens_since_fired"])


@pytest.fixture(scope="module")
def ranks(setting) -> Runtime:
    """Every method's dictionary, trained by two ranks without interruption."""
    run, request = setting
    assert train_together([request(method, 2) for method in METHODS.values()], run("ranks")) == {}
    return run("ranks")


def test_two_ranks_train_the_same_dictionaries_as_one_process_on_the_joined_batches(setting, ranks):
    run, request = setting
    requests = [request(method, 2) for method in METHODS.values()]
    train_joined(requests, run("joined"))
    assert any((weights(one, ranks)["tokens_since_fired"] >= 64).any() for one in requests)  # AuxK takes part
    for one in requests:
        assert_trained_alike(one, ranks, run("joined"))


@pytest.mark.slow
def test_three_ranks_train_the_same_dictionaries_as_one_process_on_the_joined_batches(setting):
    run, request = setting
    requests = [request(METHODS[name], 3, batch_size=96, buffer_tokens=768) for name in ("batchtopk", "relu_l1")]
    assert train_together(requests, run("ranks")) == {}
    train_joined(requests, run("joined three"))
    for one in requests:
        assert_trained_alike(one, run("ranks"), run("joined three"))


def test_ranks_see_different_rows_that_together_are_all_rows(setting):
    _, request = setting
    alone, shared = request(TOPK, 1), request(TOPK, 2, rows_per_forward=4)

    def rows(one: Request, rank: int, n: int) -> set[tuple[int, ...]]:
        assert isinstance(one.source, ActivationSource)
        stream = one.source.live(rank).rows
        return {tuple(row.tolist()) for row in stream.next_rows(n)}

    halves = [rows(shared, rank, 12) for rank in range(2)]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == rows(alone, 0, 24)


class ThreadsAsRanks:
    """Makes every thread of `call` a rank, with a working `all_rows`."""

    def __init__(self, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, self.here = n, threading.local()
        self.slots: list[Tensor] = [torch.empty(0)] * n
        self.barrier = threading.Barrier(n, timeout=3)
        monkeypatch.setattr(distributed, "is_active", lambda: True)
        monkeypatch.setattr(distributed, "n_ranks", lambda: n)
        monkeypatch.setattr(distributed, "rank", lambda: self.here.rank)
        monkeypatch.setattr(distributed, "all_rows", self.all_rows)

    def all_rows(self, x: Tensor) -> Tensor:
        self.slots[self.here.rank] = x
        self.barrier.wait()
        joined = torch.cat(self.slots)
        self.barrier.wait()
        return joined

    def call(self, function: Callable[[int], Any]) -> list[Any]:
        def as_rank(rank: int) -> Any:
            self.here.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.n) as threads:
            return list(threads.map(as_rank, range(self.n)))


NAN = float("nan")
entries = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3.0, NAN])


@st.composite
def parts(draw: st.DrawFn) -> list[list[list[float]]]:
    """[ranks, rows, columns], with ties, and sometimes NaN or a rank without positive entries."""
    n, n_rows, m = draw(st.integers(2, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 6))
    matrix = st.lists(st.lists(entries, min_size=m, max_size=m), min_size=n_rows, max_size=n_rows)
    return draw(st.lists(matrix, min_size=n, max_size=n))


@settings(max_examples=60, deadline=None)
@given(parts(), st.integers(1, 2))
@example([[[-1.0, -1.0]], [[1.0, 1.0]]], 1)  # a rank without candidates
@example([[[1.0, 1.0]], [[1.0, 1.0]]], 1)  # ties: the lower rank wins
@example([[[1.0, -1.0]], [[-1.0, -1.0]]], 2)  # fewer positive than wanted
@example([[[1.0, 2.0]], [[NAN, 3.0]]], 1)
def test_ranks_select_the_same_entries_as_one_process_on_the_joined_matrix(values, k):
    matrices = [torch.tensor(matrix) for matrix in values]
    joined = torch.cat(matrices)
    m = joined.shape[1]
    n_rows = len(matrices[0])
    bias, no_weights = None, torch.eye(m)
    z = joined @ no_weights  # a NaN spreads over its row
    wanted = mask_of_largest(z.flatten(), k * len(z)).view_as(z)

    def select(rank: int) -> tuple[Tensor, Tensor]:
        support, kept = select_global_batchtopk(matrices[rank], no_weights, bias, k)
        mask = torch.zeros(n_rows, m, dtype=torch.bool)
        mask[support.rows, support.cols] = True
        own = z[rank * n_rows : (rank + 1) * n_rows]
        torch.testing.assert_close(kept, own[mask], equal_nan=True)
        return mask, mask_of_batchtopk(own, k)

    is_unique = z.isnan().sum() <= k * len(z)  # with more NaNs than selected entries, the choice is free

    with pytest.MonkeyPatch.context() as patch:
        outcomes = ThreadsAsRanks(len(matrices), patch).call(select)
    for selected in (torch.cat(masks) for masks in zip(*outcomes, strict=True)):
        assert torch.equal(selected, wanted) if is_unique else z[selected].isnan().all() and selected.any()


def test_without_a_process_group_nothing_is_exchanged():
    x = torch.tensor([1.0, 2.0])
    assert distributed.rank() == 0 and distributed.n_ranks() == 1
    for exchange in (distributed.mean, distributed.minimum, distributed.all_rows):
        assert torch.equal(exchange(x), x)
    assert distributed.from_first(lambda: 3) == 3


def rank_stopped_after(chunk: int, how: str, rank: int, *arguments: Any) -> dict[str, Exception]:
    """`train_rank`, but rank 1 stops after `chunk` chunks, by an error or a signal."""
    original = fleet.Fleet.training_step

    def breaking(self: fleet.Fleet, batches: Any, batch_idx: int) -> None:
        if batch_idx == chunk and how == "FloatingPointError" and rank == 1:
            raise FloatingPointError("Activations are not finite.")
        if batch_idx == chunk and how == "SIGTERM" and rank == 1:
            signal.raise_signal(signal.SIGTERM)  # the other ranks must learn of it
        original(self, batches, batch_idx)

    fleet.Fleet.training_step = breaking  # type: ignore[method-assign]
    return fleet.train_rank(rank, *arguments)


def run_ranks(requests: list[Request], run: Runtime, folder: Path, chunk: int, how: str) -> list[Any]:
    arguments = (str(folder / f"meeting-{how}"), False, requests, run)
    tasks = [
        Task(f"rank {rank}", "tests.test_distributed:rank_stopped_after", (chunk, how, rank, *arguments))
        for rank in range(2)
    ]
    places = [{"RANK": str(r), "NODE_RANK": str(r), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"} for r in range(2)]
    return run_tasks(tasks, places, all_or_none=True)


@pytest.mark.slow
def test_resumed_ranks_end_with_the_same_bits(setting, ranks, tmp_path):
    run, request = setting
    requests = sorted((request(METHODS[name], 2) for name in ("batchtopk", "jumprelu")), key=lambda r: r.key)
    with pytest.raises(Exception, match=r"SIGTERM|143"):
        run_ranks(requests, run("stopped"), tmp_path, 3, "SIGTERM")
    [checkpoint] = Path(run("stopped").artifacts_dir).rglob("*.ckpt")
    assert int(checkpoint.stem) == 4
    assert train_together(requests, run("stopped")) == {}
    for one in requests:
        a, b = weights(one, ranks), weights(one, run("stopped"))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_an_error_on_one_rank_stops_all_and_a_diverging_dictionary_stops_alone(setting, ranks, tmp_path):
    run, request = setting
    with pytest.raises(FloatingPointError, match="Activations are not finite"):
        run_ranks([request(TOPK, 2)], run("store"), tmp_path, 2, "FloatingPointError")
    wild = request({**TOPK, "lr": 1e30, "decoder_norm": "none"}, 2)
    failed = train_together([wild, request(TOPK, 2)], run("store"))
    assert failed.keys() == {wild.key} and isinstance(failed[wild.key], NonFiniteLoss)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(weights(request(TOPK, 2), c).values() for c in (run("store"), ranks)), strict=True)
    )


@pytest.mark.parametrize(
    ("stream", "trainer", "named"),
    [
        ({"batch_size": 63, "buffer_tokens": 1008}, {}, ["stream.batch_size", "trainer.devices"]),
        ({"buffer_tokens": 576, "n_ctx": 64}, {}, ["stream.buffer_tokens", "stream.n_ctx", "trainer.devices"]),
        ({}, {"processes": 2}, ["trainer.processes", "trainer.devices"]),
    ],
)
def test_settings_that_do_not_fit_several_devices_are_named_in_the_error(setting, stream, trainer, named):
    run, request = setting
    with pytest.raises(UserError) as error:
        load_or_train(request(TOPK, 2, **stream), run("unfit", **trainer))
    assert all(word in str(error.value) for word in named)


def test_the_number_of_devices_is_part_of_a_dictionarys_key(setting):
    _, request = setting
    assert len({request(TOPK, devices).key for devices in (1, 2, 3)}) == 3
    assert "devices" not in request(TOPK, 1).spec
