"""The amortisation gap as a theorem, and its five executable checks (O'Neill et al. 2025, theorem 3.1, fig. 1).

Shapes: n samples, N codes, M observed dimensions, K active codes; D [N, M], atoms are rows of unit norm, x = s D.

The paper: sources with at most K >= 2 non-zeros, seen through M < N dimensions by a map that lets them be recovered
(K log(N / K) <= M), cannot be recovered by an encoder that is one linear map and an element-wise nonlinearity (L-NL).

The exact claim. Let the encoder be f_i(x) = g(w_i . x + c_i), one pass, with g injective where it is
positive (ReLU and its like). Suppose f_i(x) = s_i for every s >= 0 with K >= 2 non-zeros. For j != i let a = s_i > 0
stay and b = s_j > 0 vary: g(a w_i . d_i + b w_i . d_j + ...) = a is constant and positive, so its argument is constant,
and w_i . d_j = 0. Different a have different images, so w_i . d_i != 0. Then the matrix of all w_i . d_j is diagonal
without a zero, of rank N; but it is a product through M < N dimensions. So no L-NL encoder returns the exact values for
all inputs with K >= 2. This does not claim that supports cannot be found, that the gap is large, or anything about
K = 1 (there w_i . d_i = 1 and w_i . d_j <= 0 suffice), about more layers, or about iterations.

Checks:
  T1  no W comes closer to W D = I than N - M in squared Frobenius norm; the pseudo-inverse reaches that
  T2  N 3, M 2: solvers are exact, trained L-NL encoders are not, and with K = 1 D^T is
  T3  the error that training leaves grows with N - M, from none at N = M
  T4  atoms that some w reads exactly at K = 1, by linear programming
  T5  the problems are solvable: the L0 oracle finds every support, and any min(2 K, M) atoms are independent
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor

from core.atomic import write_table
from core.bench import threads
from core.errors import UserError
from core.seeding import derived_seed
from core.stacked.inference import nnls
from core.stacked.l0 import l0_oracle
from core.synthetic.sparse_codes import Problem, SparseCodeLaw
from experiments.oneill.settings import TheoremSettings

SETTINGS = TheoremSettings
RUNS, ILLUSTRATION = "runs.parquet", "illustration.parquet"
LNL, ORACLE, NNLS, PURSUIT, TRANSPOSE = "L-NL", "L0 oracle", "NNLS", "basis pursuit", "D transposed"
CLOSE = 1e-2  # a sample counts as exact if no code is farther off

Row = dict[str, Any]


def run(cfg: DictConfig) -> dict[str, float]:
    """All checks for all seeds, a dictionary for each. Claims: oneill/theorem-*."""
    Path(cfg.cell_folder).mkdir(parents=True, exist_ok=True)
    with threads(cfg.threads):
        rows = [*illustration(cfg)]
        for shape in cfg.shapes:
            rows += gap(cfg, shape.N, shape.K)
    table = pd.DataFrame(rows)
    write_table(table, Path(cfg.cell_folder) / RUNS)
    return flat(table, cfg.M)


def check(cfg: DictConfig) -> None:
    """Raises UserError unless N >= M, and K is recoverable in the sense of the theorem."""
    for N, K in ((shape.N, shape.K) for shape in cfg.shapes):
        if cfg.M > N or K * math.log(N / K) > cfg.M:
            raise UserError(f"shapes: N={N}, K={K} with M={cfg.M} must have K log(N / K) <= M <= N.")


def gap(cfg: DictConfig, N: int, K: int) -> Iterator[Row]:
    """T1, T3, T4 and T5 for one shape."""
    problems = [SparseCodeLaw(N, cfg.M, K).draw(cfg.n_train, cfg.n_test, cell_seed(cfg, seed)) for seed in cfg.seeds]
    stack = stacked(problems)
    start = torch.linalg.pinv(stack.D)
    W, b = train_lnl(stack.X_train, stack.S_train, start, cfg.steps, cfg.lr)
    trained = (stack.X_test @ W + b).relu()
    untrained = (stack.X_test @ start).relu()
    oracle = l0_oracle(stack.X_test, stack.D, K)
    for i, seed in enumerate(cfg.seeds):
        setting = {"seed": seed, "source.N": N, "source.M": cfg.M, "source.K": K}
        S, D = stack.S_test[i], stack.D[i].double()
        yield {
            **setting,
            "coder.name": LNL,
            **scores(S, trained[i]),
            "metrics.relative_mse_untrained": relative_mse(S, untrained[i]),
            "metrics.frobenius_excess": abs(frobenius(D) - (N - cfg.M)),
            "metrics.readable_share": sum(is_readable(D.numpy(), j) for j in range(N)) / N,
            "metrics.readable_share_expected": expected_readable_share(N, cfg.M),
        }
        yield {
            **setting,
            "coder.name": ORACLE,
            **scores(S, oracle[i]),
            "metrics.exact_support": ((oracle[i] > 0) == (S > 0)).all(1).double().mean().item(),
            "metrics.least_singular_value": least_singular_value(D, min(2 * K, cfg.M)),
        }


def cell_seed(cfg: DictConfig, seed: int) -> int:
    return derived_seed(cfg.seed, "theorem", seed)


def stacked(problems: list[Problem]) -> Problem:
    """The problems along a new first axis."""
    names = ("D", "S_train", "X_train", "S_test", "X_test")
    return Problem(**{name: torch.stack([getattr(problem, name) for problem in problems]) for name in names})


# ---- T1


def frobenius(D: Tensor) -> float:
    """||D W - I||_F^2 for the pseudo-inverse W `[M, N]`, which minimises it: N less the rank of D."""
    residual = D @ torch.linalg.pinv(D) - torch.eye(len(D), dtype=D.dtype)
    return residual.square().sum().item()


# ---- T3


@torch.no_grad()
def train_lnl(X: Tensor, S: Tensor, W: Tensor, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Weights `[R, M, N]`, biases `[R, 1, N]` of S_hat = ReLU(X W + b), trained on ||S_hat - S||^2 from W and b = 0.

    Full-batch Adam with a learning rate that falls linearly to zero. Start from the pseudo-inverse: from a random
    start units die, which alone can cost a quarter of the variance, even with N = M.
    """
    W, b = W.clone(), torch.zeros_like(S[:, :1])
    W.grad, b.grad = torch.empty_like(W), torch.empty_like(b)
    adam = torch.optim.Adam([W, b], lr=lr, fused=True)
    X_t, scale = X.mT.contiguous(), 2 / S.shape[1]
    S_hat = torch.empty_like(S)
    for step in range(steps):
        torch.baddbmm(b, X, W, out=S_hat).relu_()
        error = (S_hat - S).mul_(S_hat > 0)
        torch.bmm(X_t, error, out=W.grad).mul_(scale)
        torch.sum(error, 1, keepdim=True, out=b.grad).mul_(scale)
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        adam.step()
    return W, b


def relative_mse(S: Tensor, S_hat: Tensor) -> float:
    """||S_hat - S||^2 / ||S||^2."""
    return ((S_hat.double() - S).square().sum() / S.double().square().sum()).item()


def scores(S: Tensor, S_hat: Tensor) -> Row:
    farthest = (S_hat.double() - S).abs().amax(1)
    return {
        "metrics.relative_mse": relative_mse(S, S_hat),
        "metrics.exact_samples": (farthest < CLOSE).double().mean().item(),
        "metrics.largest_error": farthest.max().item(),
    }


# ---- T4


def is_readable(D: np.ndarray, i: int) -> bool:
    """Whether a w has w . d_i = 1 and w . d_j <= 0 for all j != i: then ReLU(w . x) is s_i exactly for K = 1."""
    program = linprog(
        np.zeros(D.shape[1]),
        A_ub=np.delete(D, i, 0), b_ub=np.zeros(len(D) - 1),
        A_eq=D[i : i + 1], b_eq=[1.0], bounds=(None, None),
    )  # fmt: skip
    if program.status not in (0, 2):  # solved, infeasible
        raise RuntimeError(f"The linear program of atom {i} ended with: {program.message}")
    return bool(program.status == 0)


def expected_readable_share(N: int, M: int) -> float:
    """Over random dictionaries: the chance that d_i and all -d_j lie in one half-space (Wendel 1962)."""
    return sum(math.comb(N - 1, k) for k in range(M)) / 2 ** (N - 1)


# ---- T5


def least_singular_value(D: Tensor, size: int) -> float:
    """The smallest singular value of any `size` atoms; above 0, the spark is larger than `size`."""
    subsets = torch.tensor(list(combinations(range(len(D)), size)))
    return torch.linalg.svdvals(D[subsets])[:, -1].min().item()


# ---- T2


def illustration(cfg: DictConfig) -> Iterator[Row]:
    """N 3, M 2, atoms at 120 degrees; with K = 2 and K = 1. Samples of the first seed go to `illustration.parquet`."""
    angles = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    D = torch.stack([angles.cos(), angles.sin()], 1)
    for K in (2, 1):
        source, n = SparseCodeLaw(3, 2, K), cfg.illustration.n_samples
        drawn = [source.draw(cfg.n_train, n, cell_seed(cfg, seed)) for seed in cfg.seeds]
        S_train = torch.stack([p.S_train for p in drawn]).double()
        starts = torch.linalg.pinv(D).expand(len(S_train), 2, 3)
        W, b = train_lnl(S_train @ D, S_train, starts, cfg.steps, cfg.lr)
        for i, seed in enumerate(cfg.seeds):
            S = drawn[i].S_test.double()
            X = S @ D
            codes = {
                LNL: (X @ W[i] + b[i]).relu(),
                NNLS: nnls(X, D),
                PURSUIT: basis_pursuit(X, D),
            }
            if K == 1:
                codes[TRANSPOSE] = (X @ D.T).relu()
            for name, S_hat in codes.items():
                setting = {"seed": seed, "source.N": 3, "source.M": 2, "source.K": K, "coder.name": name}
                yield {**setting, **scores(S, S_hat)}
            if K == 2 and i == 0:
                save_samples(S[: cfg.illustration.n_shown], codes, Path(cfg.cell_folder) / ILLUSTRATION)


def basis_pursuit(X: Tensor, D: Tensor) -> Tensor:
    """argmin sum(s) over s >= 0 with s D = x, all samples in one separable linear program."""
    (n, _), N = X.shape, len(D)
    constraints = sparse.kron(sparse.eye_array(n), D.mT.numpy(), format="csr")
    solved = linprog(np.ones(n * N), A_eq=constraints, b_eq=X.flatten().numpy(), bounds=(0, None))
    if solved.status != 0:
        raise RuntimeError(f"Basis pursuit ended with: {solved.message}")
    return torch.from_numpy(solved.x.reshape(n, N))


def save_samples(S: Tensor, codes: dict[str, Tensor], path: Path) -> None:
    """One row for each sample, code and method: the true value and the inferred one."""
    parts = [
        pd.DataFrame(
            {
                "coder.name": name,
                "sample": np.repeat(np.arange(len(S)), S.shape[1]),
                "code": np.tile(np.arange(S.shape[1]), len(S)),
                "true": S.flatten().numpy(),
                "inferred": S_hat[: len(S)].flatten().numpy(),
            }
        )
        for name, S_hat in codes.items()
    ]
    write_table(pd.concat(parts, ignore_index=True), path)


# ---- results


def flat(table: pd.DataFrame, M: int) -> dict[str, float]:
    """Means over seeds: `<method>_<metric>_N<N>_K<K>`."""
    metrics = [name for name in table.columns if name.startswith("metrics.")]
    means = {}
    for (N, K, name), group in table.groupby(["source.N", "source.K", "coder.name"]):
        label = str(name).lower().replace(" ", "_").replace("-", "")
        for metric in metrics:
            values = group[metric].dropna()
            if len(values):
                means[f"{label}_{metric.removeprefix('metrics.')}_N{N}_K{K}"] = float(values.mean())
    return means
