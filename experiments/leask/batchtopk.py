"""BatchTopK against TopK and JumpReLU (Bussmann et al. 2024, figures 1 to 3; Leask et al. 2025, appendix)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis.evaluate import Evaluation, evaluate_compat, evaluate_dictionary
from core.analysis.held_out import n_compat_rows
from core.atomic import write_table
from core.fleet import Request
from experiments.common import compat_held_out, held_out, requests, trained
from experiments.leask.settings import BatchTopKSettings

SETTINGS = BatchTopKSettings


def check(cfg: DictConfig) -> None:
    """Raises UserError for figures in the authors' way on more tokens than there are."""
    n_compat_rows(cfg.evaluation.compat_tokens, cfg.evaluation.n_rows, cfg.stream.n_ctx)


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell."""
    return requests(cfg)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train one dictionary; score it on held-out text under its inference rule, and as the authors' code does.

    Claims: leask/batchtopk-1 to -4 compare these cells with each other.
    """
    method = trained(cfg)
    evaluation = evaluate_dictionary(method, held_out(cfg))
    compat = evaluate_compat(method, compat_held_out(cfg))
    save_histogram(evaluation, Path(cfg.cell_folder) / "l0_histogram.parquet")
    reported = ("nmse_token_std_compat", "ce_degradation_compat", "l0_mean_compat")
    return {**evaluation.metrics(), **{name: compat[name] for name in reported}}


def save_histogram(evaluation: Evaluation, path: Path) -> None:
    """Tokens per L0, with and without the tokens that begin a document (Bussmann et al. 2024, figure 3)."""
    with_bos, without = evaluation.l0_histogram, evaluation.l0_histogram_without_bos
    columns = {"count": with_bos, "count_without_bos": _padded(without, len(with_bos))}
    table = pd.DataFrame({name: counts.cpu().numpy() for name, counts in columns.items()})
    table.insert(0, "l0", range(len(table)))
    write_table(table, path)


def _padded(counts: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, length - len(counts)))
