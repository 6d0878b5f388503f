"""Classical dictionary learning on the synthetic problem (O'Neill et al. 2025, appendix), with scikit-learn.

`codes` names the problem. `signed` is the authors' (`make_sparse_coded_signal`: Gaussian amplitudes of both signs, so
its MCC cannot be compared with that of the nonnegative panels). `nonnegative` is ours: the data of the other
experiments, and nonnegative codes. The fit alternates sparse coding with updates of the atoms (as in Mairal et al.
2009, on the full batch) with scikit-learn's defaults (penalty 1 while fitting). Lasso-LARS with `transform_alpha` then
codes the held-out samples. Claims: oneill/classical-*.

Shapes: n samples, N codes, M observed dimensions, K active; D [N, M], atoms are rows.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from sklearn.datasets import make_sparse_coded_signal
from sklearn.decomposition import DictionaryLearning, SparseCoder
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from core.atomic import write_table
from core.bench import threads
from core.errors import UserError
from core.metrics import recovery
from core.seeding import derived_seed
from core.synthetic.sparse_codes import SparseCodeLaw
from experiments.oneill.settings import ClassicalSettings

SETTINGS = ClassicalSettings
RUNS = "runs.parquet"
ACTIVE = 1e-4  # a code larger than this in size counts as active


@dataclass(frozen=True)
class Data:
    """D `[N, M]`, X `[n, M]` and S `[n, N]`, float64."""

    D: np.ndarray
    X_train: np.ndarray
    X_test: np.ndarray
    S_test: np.ndarray


def run(cfg: DictConfig) -> dict[str, float]:
    """One shape, all seeds; metrics are means over seeds, runs.parquet has a row for each."""
    with threads(cfg.threads):
        rows = [{"seed": seed, **scores(cfg, seed)} for seed in cfg.seeds]
    table = pd.DataFrame(rows)
    folder = Path(cfg.cell_folder)
    names = [name for name in rows[0] if name != "seed"]
    write_table(table.rename(columns={name: f"metrics.{name}" for name in names}), folder / RUNS)
    spread = {f"{name}_std": float(table[name].std()) for name in names if len(rows) > 1}
    return {**{name: float(table[name].mean()) for name in names}, **spread}


def check(cfg: DictConfig) -> None:
    """Raises UserError for a problem that cannot be drawn or fitted."""
    s, c = cfg.source, cfg.coder
    if cfg.codes == "nonnegative" and c.fit_algorithm != "cd":
        raise UserError(f"coder.fit_algorithm={c.fit_algorithm}: scikit-learn keeps codes nonnegative with cd alone.")
    if s.zipf_alpha is not None:
        raise UserError("source.zipf_alpha: make_sparse_coded_signal draws uniform codes only; set it to null.")
    if s.n_train < max(s.N, s.M):
        raise UserError(f"source.n_train={s.n_train}: at least max(source.N, source.M) = {max(s.N, s.M)} samples.")


def scores(cfg: DictConfig, seed: int) -> dict[str, float]:
    """Fit on the training samples; code the test samples under the learned dictionary and under a random one."""
    s, c, data = cfg.source, cfg.coder, draw(cfg, seed)
    started = time.perf_counter()
    learner = fitted(cfg, data.X_train, seed)
    fit_seconds = time.perf_counter() - started
    S_hat = coded(cfg, data.X_test, learner.components_)
    unrelated = SparseCodeLaw(s.N, s.M, s.K).dictionary(derived_seed(seed, "random dictionary")).double().numpy()
    by_chance = recovery.mcc(tensor(data.S_test), tensor(coded(cfg, data.X_test, unrelated))).item()
    mse = float(np.square(S_hat @ learner.components_ - data.X_test).mean())
    latent = {kind: recovery.mcc(tensor(data.S_test), tensor(S_hat), kind).item() for kind in ("pearson", "cosine")}
    atoms = {
        kind: recovery.dictionary_mcc(tensor(data.D), tensor(learner.components_), kind).item()
        for kind in ("pearson", "cosine")
    }
    dict_chance = recovery.chance_dictionary_mcc(s.N, s.M)
    return {
        "latent_mcc": latent["pearson"],
        "latent_mcc_cosine": latent["cosine"],
        "latent_mcc_chance": by_chance,
        "latent_mcc_corrected": recovery.chance_corrected(latent["pearson"], by_chance),
        "dict_mcc": atoms["pearson"],
        "dict_mcc_cosine": atoms["cosine"],
        "dict_mcc_chance": dict_chance,
        "dict_mcc_corrected": recovery.chance_corrected(atoms["pearson"], dict_chance),
        "mse": mse,
        "loss": mse + c.transform_alpha * float(np.abs(S_hat).mean()),
        "l0": float((np.abs(S_hat) > ACTIVE).mean()),
        "iterations": float(learner.n_iter_),
        "fit_seconds": fit_seconds,
    }


def draw(cfg: DictConfig, seed: int) -> Data:
    """Draw the problem: the authors' draw for their seed 42, or ours."""
    s = cfg.source
    if cfg.codes == "nonnegative":
        p = SparseCodeLaw(s.N, s.M, s.K).draw(s.n_train, s.n_test, derived_seed(s.seed, "run", seed))
        return Data(*(t.double().numpy() for t in (p.D, p.X_train, p.X_test, p.S_test)))
    X, D, S = make_sparse_coded_signal(
        n_samples=s.n_train + s.n_test, n_components=s.N, n_features=s.M, n_nonzero_coefs=s.K, random_state=seed
    )
    return Data(D, X[: s.n_train], X[s.n_train :], S[s.n_train :])


def fitted(cfg: DictConfig, X: np.ndarray, seed: int) -> DictionaryLearning:
    """scikit-learn's defaults, except what the authors set."""
    c = cfg.coder
    learner = DictionaryLearning(
        n_components=cfg.source.N,
        alpha=c.fit_alpha,
        max_iter=c.max_iter,
        fit_algorithm=c.fit_algorithm,
        transform_algorithm="lasso_lars",
        transform_alpha=c.transform_alpha,
        positive_code=cfg.codes == "nonnegative",
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # within an iteration; n_iter_ is reported
        return learner.fit(X)


def coded(cfg: DictConfig, X: np.ndarray, D: np.ndarray) -> np.ndarray:
    """argmin 1/2 ||x - s D||^2 + transform_alpha ||s||_1, `[n, N]`."""
    coder = SparseCoder(
        D,
        transform_algorithm="lasso_lars",
        transform_alpha=cfg.coder.transform_alpha,
        positive_code=cfg.codes == "nonnegative",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        codes: np.ndarray = coder.transform(X)
    return codes


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
