"""Learning to infer known sparse codes at scale (O'Neill et al. 2025, appendix): 1,000 codes, 500,000 samples.

Encoders learn the codes of a fixed data set by minibatches. The oracle is converged optimisation under the true
dictionary on the same test samples. Samples are kept as their active codes (`core.synthetic.large_sparse_codes`), so
that memory is that of a few dense batches. Claims: oneill/large-*.

Shapes: R runs, n samples, N codes, M observed dimensions, K active codes of a sample.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from core.bench import PeakMemory
from core.building import build
from core.errors import UserError
from core.metrics.recovery import UnmatchedCorrelationSums
from core.stacked.coders import Coder
from core.stacked.inference import fista
from core.stacked.objectives import KnownSparseCodes
from core.synthetic.large_sparse_codes import LargeSparseCodes
from core.synthetic.sparse_codes import SparseCodeLaw
from experiments.oneill import costs
from experiments.oneill.common import ACTIVE, recovered
from experiments.oneill.outcome import Outcome, Scores, timed, write_outcome
from experiments.oneill.settings import LargeScaleSettings
from experiments.oneill.training import train

SETTINGS = LargeScaleSettings
GB = 1e9


def run(cfg: DictConfig) -> dict[str, float]:
    """One encoder, all seeds, or the oracle: correlation of each code with the true one on held-out samples.

    `peak_extra_gb` is the peak memory of the process beyond what it used when the cell began.
    """
    memory = PeakMemory(torch.device("cpu"))
    memory.restart()
    with timed(cfg) as clock:
        outcome = oracle(cfg) if cfg.coder.solver is not None else encoders(cfg)
    peak = memory.extra() / GB
    return {**write_outcome(cfg, outcome, clock.seconds), "peak_extra_gb": peak}


def check(cfg: DictConfig) -> None:
    """Raises UserError for settings that this experiment cannot run, before data are drawn."""
    s = cfg.source
    if s.per_run:
        raise UserError("source.per_run: the runs share one large data set; source.seed=0,1,2 draws others.")
    if cfg.coder.solver is not None and cfg.coder.solver.kind != "fista":
        raise UserError(f"coder={cfg.coder.name}: this experiment runs sae, mlp and fista only.")
    if cfg.objective != "cosine":
        raise UserError(f"objective={cfg.objective}: this experiment has cosine only.")
    if cfg.batch_size > s.n_train:
        raise UserError(f"batch_size={cfg.batch_size} must be at most source.n_train={s.n_train}.")
    if cfg.n_oracle > s.n_test:
        raise UserError(f"n_oracle={cfg.n_oracle} must be at most source.n_test={s.n_test}.")
    if cfg.coder.k is not None:
        raise UserError("coder.k: encoders of this experiment keep all codes; set it to null.")
    if len(cfg.coder.l1) != 1:
        raise UserError(f"coder.l1={list(cfg.coder.l1)}: this experiment has one penalty, as in coder.l1=[0.01].")


def samples(cfg: DictConfig, purpose: str) -> LargeSparseCodes:
    """The training or the test samples."""
    s = cfg.source
    n = s.n_train if purpose == "train" else s.n_test
    return LargeSparseCodes(SparseCodeLaw(s.N, s.M, s.K, s.zipf_alpha), n, s.seed, purpose)


def encoders(cfg: DictConfig) -> Outcome:
    """All seeds' encoders, trained on the same minibatches in the same order."""
    training, test = samples(cfg, "train"), samples(cfg, "test")
    coder: Coder = build(cfg.coder.encoder, seeds=list(cfg.seeds), M=cfg.source.M, N=cfg.source.N)

    def batches(step: int) -> tuple[Tensor, Tensor, Tensor]:
        indices, values = training.batch(step, cfg.batch_size)
        return training.observed(indices, values).expand(len(cfg.seeds), -1, -1), indices, values

    outcome = Outcome([settings(seed) for seed in cfg.seeds])
    trained = train(cfg, coder, KnownSparseCodes(batches), lambda step: scores(coder, test, cfg))
    outcome.add_trained(cfg.coder.name, trained, partial(costs.known_codes, cfg, cfg.batch_size))
    return outcome


def scores(coder: Coder, test: LargeSparseCodes, cfg: DictConfig) -> Scores:
    """Over the whole test set, in batches: correlation of each code, share of active codes, dead units."""
    R, N = len(cfg.seeds), cfg.source.N
    sums, n_active = UnmatchedCorrelationSums(R, N), torch.zeros(R, N)
    for start in range(0, len(test), cfg.batch_size):
        indices, values = test.active(slice(start, start + cfg.batch_size))
        S_hat = coder(test.observed(indices, values).expand(R, -1, -1))
        sums.add(indices, values, S_hat)
        n_active += (S_hat > ACTIVE).sum(1)
    return {
        **recovered(sums.each()),
        "l0": n_active.mean(1) / len(test),
        "dead": (n_active == 0).float().mean(1),
    }


def oracle(cfg: DictConfig) -> Outcome:
    """Converged nonnegative LASSO of the first test samples under the true dictionary; it does not depend on the
    run."""
    test = samples(cfg, "test")
    indices, values = test.active(slice(cfg.n_oracle))
    [l1] = cfg.coder.l1
    S_hat = fista(test.observed(indices, values), test.D, l1, cfg.coder.solver.iterations)[None]
    sums = UnmatchedCorrelationSums(1, cfg.source.N)
    sums.add(indices, values, S_hat)
    active = S_hat > ACTIVE
    outcome = Outcome([settings(cfg.seeds[0], l1)])
    sizes = {"l0": active.float().mean((1, 2)), "dead": (~active).all(1).float().mean(1)}
    outcome.add(cfg.coder.name, {0: {**recovered(sums.each()), **sizes}}, lambda step, mode: (0.0, 0.0))
    return outcome


def settings(seed: int, l1: float = 0.0) -> dict[str, Any]:
    """The settings of one run. Encoders that learn the codes themselves have no penalty."""
    return {"seed": seed, "coder.l1": l1, "coder.k": None}
