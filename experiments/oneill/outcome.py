"""What a cell of O'Neill et al.'s synthetic experiments writes: its curves, and a row for each run.

`curves.parquet` has every run's values along the training, `runs.parquet` the final ones with chance levels, and the
metrics are means over seeds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from torch import Tensor

from core.atomic import write_table
from core.bench import threads
from core.metrics import flops, recovery
from core.stacked.runs import Trained
from core.synthetic.sparse_codes import SparseCodeLaw, chance_latent_mcc

RUNS, CURVES = "runs.parquet", "curves.parquet"
MODES: tuple[flops.Mode, ...] = ("paper", "corrected")

Scores = dict[str, Tensor]  # metric -> [R]
Curve = dict[int, Scores]  # steps or iterations done -> scores
Cost = Callable[[int, flops.Mode], tuple[float, float]]  # at a step: FLOPs of training so far, and of one inference


@dataclass
class Outcome:
    """The results of a cell, by the label of each method: its curve, and its FLOPs of training and of inference."""

    runs: Sequence[Mapping[str, Any]]  # settings that differ between them
    curves: dict[str, Curve] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    rows: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # label -> its further settings
    earlier_seconds: float = 0.0  # of training, in processes before this one

    def add(self, label: str, curve: Curve, cost: Cost) -> None:
        self.curves[label], self.costs[label] = curve, cost

    def add_trained(self, label: str, trained: Trained, cost: Cost) -> None:
        self.add(label, trained.curves, cost)
        self.earlier_seconds += trained.earlier_seconds


class Stopwatch:
    """Wall time of a block, set when it ends."""

    seconds = 0.0


@contextmanager
def timed(cfg: DictConfig) -> Iterator[Stopwatch]:
    """Run a block with `cfg.threads` threads, and take its wall time."""
    watch, started = Stopwatch(), time.monotonic()
    with threads(cfg.threads):
        yield watch
    watch.seconds = time.monotonic() - started


def write_outcome(cfg: DictConfig, outcome: Outcome, seconds: float, D_hat: Tensor | None = None) -> dict[str, float]:
    """Write `curves.parquet` and `runs.parquet` (and the first run's atoms); the metrics are means over seeds.

    seconds  of this process; those of earlier processes, up to a checkpoint, are added
    """
    folder = Path(cfg.cell_folder)
    curves = pd.DataFrame(_curve_rows(outcome))
    write_table(curves, folder / CURVES)
    runs = pd.DataFrame(_final_rows(cfg, outcome))
    write_table(runs, folder / RUNS)
    if D_hat is not None and cfg.keep_atoms:
        atoms = pd.DataFrame(D_hat[0].detach().numpy(), columns=[f"x{i}" for i in range(D_hat.shape[-1])])
        write_table(atoms, folder / "atoms.parquet")
    return {**_means(runs), "seconds": outcome.earlier_seconds + seconds, "runs": float(len(outcome.runs))}


def _settings(outcome: Outcome, label: str, run: int) -> dict[str, Any]:
    return {**outcome.runs[run], "coder.name": label, **outcome.rows.get(label, {})}


def _curve_rows(outcome: Outcome) -> Iterable[dict[str, Any]]:
    for label, curve in outcome.curves.items():
        for step, scores in curve.items():
            cost = {}
            for mode in MODES:
                cost[f"train_flops_{mode}"], cost[f"test_flops_{mode}"] = outcome.costs[label](step, mode)
            for run in range(len(outcome.runs)):
                values = {name: float(value[run]) for name, value in scores.items()}
                yield {**_settings(outcome, label, run), "step": step, **values, **cost}


def _final_rows(cfg: DictConfig, outcome: Outcome) -> Iterable[dict[str, Any]]:
    """The last point of every curve, with chance levels, the best point, and the points that `read_at` asks for."""
    chance = chance_levels(cfg)
    for label, curve in outcome.curves.items():
        steps = sorted(curve)
        for run in range(len(outcome.runs)):
            last = {name: float(value[run]) for name, value in curve[steps[-1]].items()}
            latent = [float(curve[step]["latent_mcc"][run]) for step in steps]
            best = max(range(len(steps)), key=latent.__getitem__)
            metrics = {**last, "latent_mcc_peak": latent[best], "peak_step": float(steps[best])}
            for name, level in chance.items():
                if name in last:
                    metrics[f"{name}_chance"] = level
                    metrics[f"{name}_corrected"] = recovery.chance_corrected(last[name], level)
            for step in set(cfg.read_at) & set(steps):
                for name in {"latent_mcc", "dict_mcc"} & set(last):
                    metrics[f"{name}_at_{step}"] = float(curve[step][name][run])
            yield {**_settings(outcome, label, run), **{f"metrics.{name}": value for name, value in metrics.items()}}


def chance_levels(cfg: DictConfig) -> dict[str, float]:
    """MCC of an untrained encoder and of a random dictionary of these sizes."""
    s = cfg.source
    law = SparseCodeLaw(s.N, s.M, s.K, s.zipf_alpha)
    return {
        "latent_mcc": 0.0 if cfg.task == "known_codes" else chance_latent_mcc(law),
        "dict_mcc": recovery.chance_dictionary_mcc(s.N, s.M),
    }


def _means(runs: pd.DataFrame) -> dict[str, float]:
    """Means and standard deviations over seeds. Methods are prefixes, unless there is one only; swept settings
    suffixes."""
    metrics = [name for name in map(str, runs) if name.startswith("metrics.")]
    swept = [key for key in ("coder.l1", "coder.k") if runs[key].nunique(dropna=False) > 1]
    means: dict[str, float] = {}
    for values, group in runs.groupby(["coder.name", *swept], dropna=False):
        label, *rest = map(str, values)
        lone = runs["coder.name"].nunique() == 1
        prefix = "" if lone else re.sub(r"\W+", "_", label).lower() + "_"
        suffix = "".join(
            f"_{key.split('.')[1]}_{value}" for key, value in zip(swept, rest, strict=True) if value != "nan"
        )
        for name in metrics:
            column = group[name].dropna()
            if len(column):
                key = f"{prefix}{name.removeprefix('metrics.')}{suffix}"
                means[key] = float(column.mean())
                if len(column) > 1:
                    means[f"{key}_std"] = float(column.std())
    return means
