"""The three problems of O'Neill et al. 2025 (known codes, known dictionary, neither known) for one coder.

All seeds, penalties and k of a cell are one stack. A cell can have several methods: its coder, and solvers that
optimise the coder's codes further. `experiments.oneill.outcome` writes what they reach.

Shapes: R runs, n samples, N codes, M observed dimensions; D `[R, N, M]`, atoms are rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from core.building import build
from core.metrics import recovery
from core.seeding import derived_seed
from core.stacked.coders import Coder
from core.stacked.inference import fista, hard_top_k, log_codes, nnls, relu_codes
from core.stacked.l0 import l0_oracle
from core.stacked.objectives import KnownCodes, Reconstruction, random_dictionary
from core.synthetic.sparse_codes import Problem, SparseCodeLaw
from experiments.oneill import costs
from experiments.oneill.outcome import Curve, Outcome, Scores, timed, write_outcome
from experiments.oneill.training import train

FOUND = 0.5  # a true code counts as lost if its correlation with its unit is lower
ACTIVE = 1e-4  # a larger code counts as active: codes that are exponentials are never zero
WARM_FLOORS = {"ITO warm": 1e-10, "ITO warm floor": 1e-2}  # the paper's text; a floor from which a code can grow


@dataclass(frozen=True)
class Stack:
    """The runs of a cell: their settings, and their data along the first axis."""

    rows: list[dict[str, Any]]  # settings under the configuration's dotted keys
    problem: Problem  # every tensor with the axis R in front

    @classmethod
    def of(cls, cfg: DictConfig) -> Stack:
        s = cfg.source
        swept = product(cfg.seeds, cfg.coder.l1, cfg.coder.k or [None])
        rows = [{"seed": seed, "coder.l1": float(l1), "coder.k": k} for seed, l1, k in swept]
        source = SparseCodeLaw(s.N, s.M, s.K, s.zipf_alpha)
        seeds = [derived_seed(s.seed, "run", row["seed"]) if s.per_run else s.seed for row in rows]
        drawn = {seed: source.draw(s.n_train, s.n_test, seed) for seed in set(seeds)}
        tensors = {
            name: torch.stack([getattr(drawn[seed], name) for seed in seeds])
            for name in ("D", "S_train", "X_train", "S_test", "X_test")
        }
        return cls(rows, Problem(**tensors))

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    @property
    def l1(self) -> Tensor:
        return torch.tensor([row["coder.l1"] for row in self.rows])

    @property
    def k(self) -> Tensor | None:
        return torch.tensor([row["coder.k"] for row in self.rows]) if self.rows[0]["coder.k"] is not None else None


# ---- the three problems


def known_codes(cfg: DictConfig) -> dict[str, float]:
    """An encoder learns the true codes themselves (sec. 4.1, fig. 2). Unit i stands for code i: nothing is matched."""
    stack = Stack.of(cfg)
    p, coder = stack.problem, coder_of(cfg, stack)

    def evaluate(step: int) -> Scores:
        S_hat = coder(p.X_test)
        return {**recovered(recovery.unmatched_correlations(p.S_test, S_hat)), **_sizes(S_hat)}

    objective = KnownCodes(lambda step: (p.X_train, p.S_train), cfg.objective)
    outcome = Outcome(stack.rows)
    with timed(cfg) as clock:
        trained = train(cfg, coder, objective, evaluate)
        outcome.add_trained(cfg.coder.name, trained, partial(costs.known_codes, cfg, cfg.source.n_train))
    return write_outcome(cfg, outcome, clock.seconds)


def known_dictionary(cfg: DictConfig) -> dict[str, float]:
    """Codes under the true dictionary (sec. 4.2, fig. 3), from trained encoders and from solvers."""
    stack = Stack.of(cfg)
    p, outcome = stack.problem, Outcome(stack.rows)
    with timed(cfg) as clock:
        if cfg.coder.solver is not None:
            curve = _solve(cfg, stack)
            outcome.add(cfg.coder.name, curve, partial(costs.solver, cfg))
        else:
            coder = coder_of(cfg, stack)
            objective = Reconstruction(p.X_train, stack.l1, p.D, learn_D=False)

            def evaluate(step: int) -> Scores:
                return _latent_scores(stack, coder(p.X_test), p.D)

            trained = train(cfg, coder, objective, evaluate)
            outcome.add_trained(cfg.coder.name, trained, partial(costs.training, cfg, False))
            if cfg.coder.name in cfg.warm_ito_of:
                with torch.no_grad():
                    start = coder(p.X_test).clone()
                for label, floor in WARM_FLOORS.items():
                    curve = _ito_curve(cfg, stack, init=start, floor=floor)
                    outcome.add(label, curve, partial(costs.warm_ito, cfg))
    return write_outcome(cfg, outcome, clock.seconds)


def unknown(cfg: DictConfig) -> dict[str, float]:
    """Codes and dictionary are both learned (sec. 4.3, fig. 4). Sparse coding optimises the test codes afterwards."""
    stack = Stack.of(cfg)
    p = stack.problem
    s, coder = cfg.source, coder_of(cfg, stack)
    N = cfg.coder.N or s.N
    objective = Reconstruction(
        p.X_train, stack.l1, random_dictionary(stack.seeds, N, s.M), True, cfg.normalise, cfg.coder.bias
    )
    free = cfg.coder.kind in costs.FREE
    by_ito = [] if free or cfg.coder.name not in cfg.ito_of else [f"{cfg.coder.name}+ITO"]

    def optimised() -> Tensor:
        return _test_codes(cfg, stack, objective.explained_by_codes(p.X_test), objective.D)

    def evaluate(step: int) -> Scores:
        latest = {cfg.coder.name: optimised() if free else coder(p.X_test)}
        latest.update({label: optimised() for label in by_ito})
        dictionary = _dictionary_scores(p.D, objective.D)
        return {
            f"{label}/{name}": value
            for label, S_hat in latest.items()
            for name, value in {
                **_latent_scores(stack, S_hat, objective.D, objective.explained_by_codes(p.X_test)),
                **dictionary,
            }.items()
        }

    outcome = Outcome(stack.rows)
    with timed(cfg) as clock:
        curves, outcome.earlier_seconds = train(cfg, coder, objective, evaluate)
    for label in (cfg.coder.name, *by_ito):
        own = {
            step: {name.split("/")[1]: value for name, value in scores.items() if name.split("/")[0] == label}
            for step, scores in curves.items()
        }
        outcome.add(label, own, partial(costs.training, cfg, True))
    if by_ito:
        outcome.costs[by_ito[0]] = partial(costs.with_ito, cfg)
    for k in cfg.truncate_to:
        S_hat = hard_top_k(optimised() if free else coder(p.X_test), k)
        label = f"{cfg.coder.name} truncated"
        X = objective.explained_by_codes(p.X_test)
        scores = {**_latent_scores(stack, S_hat, objective.D, X), **_dictionary_scores(p.D, objective.D)}
        outcome.add(f"{label}/{k}", {cfg.steps: scores}, partial(costs.training, cfg, True))
        outcome.rows[f"{label}/{k}"] = {"coder.name": label, "coder.k": k}
    return write_outcome(cfg, outcome, clock.seconds, objective.D)


# ---- pieces


def coder_of(cfg: DictConfig, stack: Stack) -> Coder:
    """The encoder (or free codes) of every run."""
    N, M = cfg.coder.N or cfg.source.N, cfg.source.M
    coder: Coder = build(cfg.coder.encoder, seeds=stack.seeds, M=M, N=N, k=stack.k)
    return coder


def _solve(cfg: DictConfig, stack: Stack) -> Curve:
    """The curve of a solver; a single point, at 0, if it runs until it converges."""
    p, solver = stack.problem, cfg.coder.solver
    if solver.kind == "ito":
        return _ito_curve(cfg, stack, init=float(solver.init))
    if solver.kind == "fista":
        S_hat = fista(p.X_test, p.D, stack.l1, solver.iterations)
    elif solver.kind == "nnls":
        S_hat = nnls(p.X_test, p.D)
    else:
        S_hat = l0_oracle(p.X_test, p.D, cfg.source.K)
    return {0: _latent_scores(stack, S_hat, p.D)}


def _test_codes(cfg: DictConfig, stack: Stack, X: Tensor, D: Tensor) -> Tensor:
    """Codes of test samples under learned dictionaries; run by run if each has its own k."""
    i, k = cfg.inference, stack.k
    l1 = stack.l1 if i.l1 is None else torch.full_like(stack.l1, i.l1)

    def solve(runs: slice, mask_k: int | None = None) -> Tensor:
        given = X[runs], D[runs], l1[runs], i.iterations, i.lr
        if cfg.coder.kind == "sc_relu":
            return relu_codes(*given, stack.seeds[runs], mask_k=mask_k)
        return log_codes(*given, i.init, mask_k=mask_k)

    if k is None:
        return solve(slice(None))
    return torch.cat([solve(slice(r, r + 1), int(k[r])) for r in range(len(k))])


def _ito_curve(cfg: DictConfig, stack: Stack, init: float | Tensor, floor: float = 1e-2) -> Curve:
    """Test codes optimised under the true dictionary, scored every `log_every` of `steps` iterations."""
    p, curve = stack.problem, Curve()

    def score(iteration: int, S_hat: Tensor) -> None:
        curve[iteration] = _latent_scores(stack, S_hat, p.D)

    at = range(0, cfg.steps + 1, cfg.log_every)
    log_codes(p.X_test, p.D, stack.l1, cfg.steps, cfg.lr, init, floor=floor, callback=score, callback_at=at)
    return curve


def _latent_scores(stack: Stack, S_hat: Tensor, D_hat: Tensor, X: Tensor | None = None) -> Scores:
    """`X`: what the codes explain; None: the test samples."""
    p = stack.problem
    mse = (S_hat @ D_hat - (p.X_test if X is None else X)).square().mean((1, 2)).detach()
    return {
        **recovered(recovery.matched_correlations(p.S_test, S_hat)),
        "latent_mcc_cosine": recovery.mcc(p.S_test, S_hat, "cosine"),
        "mse": mse,
        "loss": mse + stack.l1 * S_hat.mean((1, 2)),
        "exact_support": _same_support(p.S_test, S_hat),
        **_sizes(S_hat),
    }


def recovered(correlations: Tensor) -> Scores:
    """From the correlation of each true code with its unit, `[R, N]`: the MCC, the share of true codes that no unit
    represents, and the MCC of the others (0 if there are none)."""
    represented = correlations >= FOUND
    return {
        "latent_mcc": correlations.mean(-1),
        "lost": 1 - represented.float().mean(-1),
        "latent_mcc_of_found": torch.where(represented, correlations, 0).sum(-1) / represented.sum(-1).clamp(min=1),
    }


def _same_support(S: Tensor, S_hat: Tensor) -> Tensor:
    """Share of samples whose active codes are the true ones, by index: it means something under the true dictionary
    only."""
    if S.shape != S_hat.shape:
        return torch.zeros(len(S))
    return ((S > ACTIVE) == (S_hat > ACTIVE)).all(-1).float().mean(-1)


def _dictionary_scores(D: Tensor, D_hat: Tensor) -> Scores:
    D_hat = D_hat.detach()
    cosines = torch.nn.functional.normalize(D_hat, dim=-1)
    cosines = cosines @ cosines.mT
    others = (cosines.square().sum(-1) - 1).clamp(min=0).sqrt().mean(-1)
    return {
        "dict_mcc": recovery.dictionary_mcc(D, D_hat),
        "dict_mcc_cosine": recovery.dictionary_mcc(D, D_hat, "cosine"),
        "interference": others,  # mean over atoms of sqrt(sum over the others of cos^2)
    }


def _sizes(S_hat: Tensor) -> Scores:
    return {"l0": (S_hat > ACTIVE).float().mean((1, 2)), "dead": (S_hat <= ACTIVE).all(1).float().mean(-1)}


TASKS = {"known_codes": known_codes, "known_dictionary": known_dictionary, "unknown": unknown}
