"""Which tool for a fine-tune? What crosscoders, their variants, a dictionary of the difference and two tools without
training find of known changes between two models, what they report that is none, and what they cost.

Every cell is one tool on one pair. A change is found if a reported direction has a cosine above MATCHED with that of
its concept. A report is false if it is near no concept, or near one that both models have alike. It is overstated if it
calls something one model's own of which the other has more than OVERSTATED of the strength, where the report fires.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, cast

import pandas as pd
import torch
from omegaconf import DictConfig
from sklearn.metrics import roc_auc_score
from torch import Tensor

from core.analysis import model_changes
from core.analysis.latent_scaling import LatentScaling
from core.analysis.model_changes import UNKNOWN, Changes
from core.atomic import write_table
from core.errors import UserError
from core.fleet import Request, load_or_train
from core.methods.base import DictionaryMethod
from core.runtime import Runtime
from core.seeding import generator
from core.streams.differences import DifferenceSource
from core.streams.planted_pairs import PlantedPairSource
from core.synthetic.planted_pair import KINDS, PlantedPair
from experiments.common import request, source, stored, write_record
from experiments.minder.settings import ToolsSettings

SETTINGS = ToolsSettings

MATCHED = 0.8  # cosine from which a direction stands for a concept
OVERSTATED = 0.2  # as the threshold of Latent Scaling's error has it
N_WARM, N_TIMED = 10, 60  # steps
TRAINED = ("crosscoder", "difference")  # tools that are dictionaries, of pairs of rows and of their differences

Reports = dict[str, Changes]  # by rule: the tool's own; by decoder norms; by what each latent adds to the difference


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell."""
    return [wanted(cfg)] if cfg.tool in TRAINED else []


def wanted(cfg: DictConfig) -> Request:
    own = request(cfg)
    if cfg.tool == "crosscoder":
        return own
    return Request(own.method, DifferenceSource.between(own.source), own.precision)


def check(cfg: DictConfig) -> None:
    """A dictionary of the difference has rows of one model, a crosscoder those of two."""
    has_two = "n_models" in cfg.method
    if cfg.tool in TRAINED and has_two != (cfg.tool == "crosscoder"):
        other = "a crosscoder" if cfg.tool == "crosscoder" else "a method for the rows of one model, such as batchtopk"
        raise UserError(f"method: tool={cfg.tool} needs {other}.")


def run(cfg: DictConfig) -> dict[str, float]:
    """Let one tool say what has changed, and compare it with the concepts."""
    pairs = cast(PlantedPairSource, source(cfg))
    held_out = pairs.held_out(cfg.n_heldout)
    x, concepts = held_out.x, held_out.truth["concepts"]
    metrics: dict[str, float] = {"training_seconds": 0.0, "n_rows_read": float(cfg.n_heldout)}
    if cfg.tool in TRAINED:
        asked = wanted(cfg)
        dictionary = cast(DictionaryMethod[Any], load_or_train(asked, Runtime.of(cfg)).cpu())
        write_record(cfg, "dictionary", stored(cfg, asked.spec))
        metrics["training_seconds"] = training_seconds(asked, Runtime.of(cfg))
        metrics["n_rows_read"] += pairs.n_batches * pairs.batch_size
        start = perf_counter()
        reports, explained = of_dictionary(dictionary, x, is_difference=cfg.tool == "difference")
        metrics |= explained
    else:
        start = perf_counter()
        signs = generator(cfg.seed, "model changes")
        untrained = model_changes.principal(x) if cfg.tool == "principal" else model_changes.mean_shift(x, signs)
        reports = {"own": untrained}
    metrics["analysis_seconds"] = perf_counter() - start
    tables = []
    for rule, changes in reports.items():
        scores, table = compared(changes, pairs.truth, concepts)
        metrics |= scores if rule == "own" else {f"{name}_{rule}": value for name, value in scores.items()}
        tables.append(table.assign(rule=rule))
    write_table(pd.concat(tables, ignore_index=True), Path(cfg.cell_folder) / "changes.parquet")
    return metrics


def of_dictionary(
    dictionary: DictionaryMethod[Any], x: Tensor, is_difference: bool
) -> tuple[Reports, dict[str, float]]:
    """Its reports, and what it explains of each model and of the difference; x `[B, 2, d]`."""
    rows = x[:, 1] - x[:, 0] if is_difference else x
    with torch.no_grad():
        codes = dictionary.encode(rows)
        x_hat = dictionary.decode(codes)
    W_dec = dictionary.W_dec.detach()
    if is_difference:
        explained = {"fve_difference": fve(rows, x_hat)}
        return {"own": model_changes.of_difference(W_dec, codes, x)}, explained | {"l0": float(codes.l0())}
    scaling = LatentScaling(dictionary)
    scaling.add(x, codes)
    explained = {
        "fve_base": fve(x[:, 0], x_hat[:, 0]),
        "fve_chat": fve(x[:, 1], x_hat[:, 1]),
        "fve_difference": fve(x[:, 1] - x[:, 0], x_hat[:, 1] - x_hat[:, 0]),
        "l0": float(codes.l0()),
    }
    by_difference = model_changes.of_difference(W_dec[:, 1] - W_dec[:, 0], codes, x)
    of_each = getattr(dictionary.settings, "bridge", 0) > -1  # else only the difference of the decoders is learned
    reports = {
        "own": model_changes.one_sided_by_scaling(W_dec, codes, scaling) if of_each else by_difference,
        "by_norm": model_changes.one_sided_by_norm(W_dec, codes),
        "by_difference": by_difference,
    }
    return reports, explained


def fve(x: Tensor, x_hat: Tensor) -> float:
    """Fraction of variance explained; x and x_hat `[B, d]`."""
    return float(1 - (x - x_hat).var(0).sum() / x.var(0).sum())


def training_seconds(asked: Request, runtime: Runtime) -> float:
    """What the training takes alone: the median step of a new dictionary, times the number of steps. The dictionaries
    of a sweep are trained together, so their own times are not known."""
    method, stream = asked.build().to(runtime.device), asked.source.open(runtime)
    optimizer, seconds = method.configure_optimizers(), []
    for _ in range(N_WARM + N_TIMED):
        start = perf_counter()
        method.update(next(stream), optimizer)
        seconds.append(perf_counter() - start)
    return median(seconds[N_WARM:]) * asked.source.n_batches


def compared(changes: Changes, truth: PlantedPair, concepts: Tensor) -> tuple[dict[str, float], pd.DataFrame]:
    """The reports beside the truth; concepts `[B, 2, C]`, how much of each is in each model."""
    cosines = changes.directions @ truth.directions.T  # [n, C]
    cosines = torch.where((changes.side == UNKNOWN)[:, None], cosines.abs(), cosines)
    cosine, nearest = cosines.max(1) if len(changes) else (cosines.new_zeros(0), changes.side)
    changed = ~truth.of_kind("shared")  # [C]
    matched = cosine > MATCHED
    right = matched & changed[nearest]
    found = set(nearest[right].tolist())
    overstated = right & (shares(changes, nearest, concepts) > OVERSTATED) & changes.one_sided
    kinds = [kind for kind in KINDS if kind != "shared" and truth.of_kind(kind).any()]
    counts: dict[str, Any] = {
        "n_reported": len(changes),
        "n_found": len(found),
        "n_false": (~right).sum(),
        "n_overstated": overstated.sum(),
        **{f"n_found_{kind}": len(found & set(truth.of_kind(kind).nonzero().flatten().tolist())) for kind in kinds},
    }
    metrics = {name: float(value) for name, value in counts.items()}
    if changed.any():
        metrics["found_share"] = len(found) / int(changed.sum())
    is_changed = (concepts[:, 0] != concepts[:, 1]).any(1)
    if is_changed.any() and len(changes):
        metrics["row_auc"] = float(roc_auc_score(is_changed, changes.rows()))
    names = [truth.kinds[at] if near else "" for at, near in zip(nearest.tolist(), matched.tolist(), strict=True)]
    table = pd.DataFrame({"side": changes.side, "cosine": cosine, "kind": names, "is_overstated": overstated})
    return metrics, table


def shares(changes: Changes, nearest: Tensor, concepts: Tensor) -> Tensor:
    """`[n]`: how much the other model has of each report's concept, over what its own has, in the rows where it fires
    and weighted by how strongly; 0 where the tool names no model."""
    mean = torch.einsum("bn,bmn->nm", changes.strength, concepts[:, :, nearest])  # [n, 2]
    own = changes.side.clamp(min=0)
    at = torch.arange(len(changes))
    return torch.where(changes.side == UNKNOWN, 0, mean[at, 1 - own] / mean[at, own].clamp(min=1e-9))
