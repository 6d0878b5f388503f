"""A stack trained through Lightning is the plain loop, stopped and resumed as often as one likes."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import NonFiniteLoss, UserError
from core.interrupts import Interrupted
from core.stacked import runs
from core.stacked.coders import LinearCoder
from core.stacked.objectives import Reconstruction, random_dictionary
from core.stacked.runs import Schedule, Trained

SEEDS, M, N = [0, 1], 4, 7
PAUSE = 0.02  # seconds before a stop, so that a life takes some
X = torch.randn(2, 30, M, generator=torch.Generator().manual_seed(0))


SCHEDULE = Schedule(steps=40, lr=1e-2, log_every=10)


@pytest.fixture
def trained(runtime: Any, tmp_path: Path) -> Callable[..., Trained]:
    """Trains a coder and an objective, with checkpoints in `tmp_path / "checkpoints"`."""

    def train(coder: LinearCoder, objective: Reconstruction, schedule: Schedule = SCHEDULE) -> Trained:
        run, folder = runtime(tmp_path, "stack"), tmp_path / "checkpoints"
        return runs.train(run, "stack/cell", folder, schedule, coder, objective, measured(coder, objective))

    return train


def parts() -> tuple[LinearCoder, Reconstruction]:
    objective = Reconstruction(X, torch.tensor([0.01, 0.1]), random_dictionary(SEEDS, N, M), learn_D=True)
    return LinearCoder(SEEDS, M, N), objective


def measured(coder: LinearCoder, objective: Reconstruction):
    return lambda step: {"W": coder.W_enc.sum((1, 2)), "D": objective.D.sum((1, 2))}


def assert_same(curves, others) -> None:
    assert list(curves) == list(others)
    assert all(torch.equal(curves[step][name], others[step][name]) for step in curves for name in ("W", "D"))


def plain_loop() -> dict[int, dict[str, torch.Tensor]]:
    coder, objective = parts()
    adam = torch.optim.Adam([*coder.parameters(), *objective.parameters()], lr=1e-2, fused=True)
    evaluate = measured(coder, objective)
    with torch.no_grad():
        curves = {0: evaluate(0)}
        for step in range(40):
            objective.gradients(coder, step)
            adam.step()
            if (step + 1) % 10 == 0:
                curves[step + 1] = evaluate(step + 1)
    return curves


def test_training_is_the_plain_loop_and_leaves_no_checkpoint(trained: Any, tmp_path: Path):
    curves, earlier_seconds = trained(*parts())
    assert earlier_seconds == 0
    assert_same(curves, plain_loop())
    assert not torch.equal(curves[0]["W"], curves[40]["W"]) and not torch.equal(curves[0]["D"], curves[40]["D"])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_runs_that_are_stopped_after_any_chunk_and_resumed_end_the_same(trained: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "STEPS_PER_CHUNK", 5)  # two chunks between evaluations
    original = runs.StackedRuns.training_step
    left = [1, 2, 3]  # chunks of each run before its signal

    def stopping(self: runs.StackedRuns, chunk: range, batch_idx: int) -> None:
        original(self, chunk, batch_idx)
        if left:
            left[0] -= 1
            if left[0] == 0:
                left.pop(0)
                time.sleep(PAUSE)
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runs.StackedRuns, "training_step", stopping)
    born = time.monotonic()
    for _ in range(3):
        with pytest.raises(Interrupted):
            trained(*parts())
    started = time.monotonic()
    outcome = trained(*parts())
    assert_same(outcome.curves, plain_loop())
    assert 3 * PAUSE < outcome.earlier_seconds < started - born


def test_a_loss_that_is_not_finite_ends_the_training(trained: Any):
    coder, objective = parts()
    coder.W_enc.data[0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteLoss):
        trained(coder, objective)


def test_evaluations_that_miss_the_last_step_are_refused(trained: Any):
    with pytest.raises(UserError, match="log_every=15"):
        trained(*parts(), Schedule(steps=40, lr=1e-2, log_every=15))
