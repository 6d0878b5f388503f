"""A stack trained through Lightning is the plain loop, stopped and resumed as often as one likes."""

import signal
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from core.cells import cell_name
from core.errors import NonFiniteLoss, UserError
from core.interrupts import Interrupted
from core.stacked import runs
from core.stacked.coders import LinearCoder
from core.stacked.objectives import Reconstruction, random_dictionary
from core.stacked.runs import train

ROOT = Path(__file__).parents[2]
SEEDS, M, N = [0, 1], 4, 7
PAUSE = 0.02  # seconds before a stop, so that a life takes some
X = torch.randn(2, 30, M, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    OmegaConf.register_new_resolver("cell", cell_name, replace=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        made = compose("config", overrides=["experiment=oneill_unknown", "scale=smoke", f"output_dir={tmp_path}"])
    with open_dict(made):
        made.cell_folder, made.steps, made.log_every, made.lr = str(tmp_path / "cell"), 40, 10, 1e-2
        made.logging.logger = "none"
    return made


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


def test_training_is_the_plain_loop_and_leaves_no_checkpoint(cfg: DictConfig):
    coder, objective = parts()
    curves, earlier_seconds = train(cfg, coder, objective, measured(coder, objective))
    assert earlier_seconds == 0
    assert_same(curves, plain_loop())
    assert not torch.equal(curves[0]["W"], curves[40]["W"]) and not torch.equal(curves[0]["D"], curves[40]["D"])
    assert not list(Path(cfg.cell_folder).rglob("*.ckpt"))


def test_stopped_after_any_chunk_and_resumed_it_comes_out_the_same(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "STEPS_PER_CHUNK", 5)  # two chunks between evaluations
    original = runs.StackedRuns.training_step
    left = [1, 2, 3]  # after how many chunks of a life it is told to stop

    def told(self: runs.StackedRuns, chunk: range, batch_idx: int) -> None:
        original(self, chunk, batch_idx)
        if left:
            left[0] -= 1
            if left[0] == 0:
                left.pop(0)
                time.sleep(PAUSE)
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runs.StackedRuns, "training_step", told)
    born = time.monotonic()
    for _ in range(3):
        coder, objective = parts()
        with pytest.raises(Interrupted):
            train(cfg, coder, objective, measured(coder, objective))
    coder, objective = parts()
    started = time.monotonic()
    trained = train(cfg, coder, objective, measured(coder, objective))
    assert_same(trained.curves, plain_loop())
    assert 3 * PAUSE < trained.earlier_seconds < started - born


def test_a_loss_that_is_not_finite_ends_the_cell(cfg: DictConfig):
    coder, objective = parts()
    coder.W_enc.data[0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteLoss):
        train(cfg, coder, objective, measured(coder, objective))


def test_evaluations_that_miss_the_last_step_are_refused(cfg: DictConfig):
    with open_dict(cfg):
        cfg.log_every = 15
    coder, objective = parts()
    with pytest.raises(UserError, match="log_every=15"):
        train(cfg, coder, objective, measured(coder, objective))
