"""Meta-SAEs (Leask et al. 2025): the decoder directions of a dictionary as sparse sums of fewer meta-latents.

Shapes: N rows, d = d_model, M meta-latents; "small" and "base" are two dictionaries of a family of growing sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis import directions as geometry
from core.analysis.meta_sae import (
    decompose,
    meta_request,
    null_rows,
    replaced_decoder,
    score,
    trained_metas,
)
from core.atomic import write_table
from core.building import plain
from core.checked import converted
from core.errors import UserError
from core.fleet import Request
from core.interop.loading import is_one
from core.methods.batchtopk import BatchTopK
from core.methods.dictionary import Dictionary
from core.metrics.reconstruction import VarianceExplained
from core.preflight import check_method
from core.runtime import Runtime
from core.streams.decoder_rows import directions, random_directions
from experiments.common import is_loaded, meta_node, requests, stored, trained, write_record
from experiments.leask.meta_rows import Rows, family_rows, rows_of, strongest
from experiments.leask.meta_words import in_words
from experiments.leask.settings import MetaSaeSettings

SETTINGS = MetaSaeSettings
COSINES = "cosines.parquet"
BINS = np.linspace(-0.2, 1.0, 61)  # of the histograms of cosines


def with_family(cfg: DictConfig) -> DictConfig:
    """The configuration; where `method` loads one dictionary and no family, that one is the family."""
    if not is_loaded(cfg.method):
        return cfg
    has_paths = any(node.get("path") is not None for node in cfg.family)
    if has_paths and not is_one(str(cfg.method.repo), cfg.method.path):
        return cfg
    changed = cfg.copy()
    changed.family, changed.base = [{}], 0
    return changed


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell: the base dictionary, or the family where others are looked at."""
    cfg = with_family(cfg)
    return requests(cfg, *(member(cfg, i) for i in needed(cfg)))


def check(cfg: DictConfig) -> None:
    """Raises UserError for a family and places in it that do not fit, and for a dictionary of rows that cannot be."""
    cfg = with_family(cfg)
    n = len(cfg.family)
    if cfg.base >= n:
        raise UserError(f"base={cfg.base} is no place in the family of {n} dictionaries.")
    if cfg.detail or cfg.rows == "family":
        if n < 2 or cfg.small >= cfg.base:
            raise UserError(
                f"family has {n} {'dictionary' if n == 1 else 'dictionaries'}, small={cfg.small}, base={cfg.base}: the "
                "small one comes before. detail=false rows=base needs the base alone."
            )
        if cfg.n_replacing > cfg.base:
            raise UserError(f"n_replacing={cfg.n_replacing} must be 1 to {cfg.base}, the dictionaries before the base.")

    for place in needed(cfg):
        check_method(member(cfg, place), f"family[{place}]")
    sizes = [converted(member(cfg, place)["dict_size"], int | None, "family", []) for place in needed(cfg)]
    if cfg.meta.sampling == "shuffled" and None not in sizes and cfg.meta.batch_size > sum(sizes):
        raise UserError(
            f"meta.batch_size: {cfg.meta.batch_size} is too much, there are at most {sum(sizes)} rows in an epoch. "
            "Lower it, or choose meta.sampling=replacement."
        )


def check_family(family: Mapping[int, Dictionary]) -> None:
    """Raises UserError unless all have one width and each is larger than the one before."""
    if len({method.d_model for method in family.values()}) > 1:
        raise UserError(f"family: widths differ: {', '.join(str(method.d_model) for method in family.values())}.")
    sizes = [method.dict_size for method in family.values()]
    if sorted(set(sizes)) != sizes:
        raise UserError(f"family: sizes must grow from one dictionary to the next, not {', '.join(map(str, sizes))}.")


def needed(cfg: DictConfig) -> list[int]:
    """Places in the family of the dictionaries that the cell needs."""
    return list(range(len(cfg.family))) if cfg.detail or cfg.rows == "family" else [cfg.base]


def member(cfg: DictConfig, place: int) -> dict[str, Any]:
    """The `method` node of one dictionary of the family."""
    return {**plain(cfg.method), **plain(cfg.family[place])}


def later_dictionaries(cfg: DictConfig) -> Iterator[list[Request]]:
    """What the fleet trains once the family is there: the meta-dictionaries, then encoders for other decoders."""
    cfg = with_family(cfg)
    requests_of_cell = wanted(cfg, family_of(cfg)[1])  # all pending cells wait at a yield: the family is not kept
    yield requests_of_cell
    if cfg.detail and cfg.rows == "base":
        family, rows = family_of(cfg)
        meta, _ = trained_metas(requests_of_cell, Runtime.of(cfg), rows.directions.device)
        yield [request for _, request in replacements(cfg, meta, rows, directions_of(cfg, family)).values()]


def family_of(cfg: DictConfig) -> tuple[dict[int, Dictionary], Rows]:
    """The dictionaries that the cell looks at, by their place, and the rows that a meta-dictionary is trained on."""
    family = {place: trained(cfg, member(cfg, place)) for place in needed(cfg)}
    check_family(family)
    return family, rows_of(cfg, cfg.base, family[cfg.base]) if cfg.rows == "base" else family_rows(cfg, family)


def directions_of(cfg: DictConfig, family: Mapping[int, Dictionary]) -> dict[int, Tensor]:
    """The rows of every dictionary of the family."""
    return {place: rows_of(cfg, place, method).directions for place, method in family.items()}


def wanted(cfg: DictConfig, rows: Rows) -> list[Request]:
    """The cell's meta-dictionary, and that of random directions."""
    meta, precision = meta_node(cfg), cfg.trainer.precision
    null = null_rows(rows.directions, cfg.seed)
    return [meta_request(meta, W, precision, rows.frequency) for W in (rows.directions, null)]


def run(cfg: DictConfig) -> dict[str, float]:
    """Train a meta-dictionary and one on random directions of the same shape; compare. Claims: leask/meta-*."""
    cfg = with_family(cfg)
    family, rows = family_of(cfg)
    null = null_rows(rows.directions, cfg.seed)
    real, of_null = wanted(cfg, rows)
    meta, null_meta = trained_metas([real, of_null], Runtime.of(cfg), rows.directions.device)
    scores = score(meta, rows.directions).metrics() | score(null_meta, null).metrics("_null")
    metrics = {"n_rows": float(len(null)), "threshold": float(meta.threshold), **scores, **excess(scores)}
    if rows.frequency is not None and cfg.rows == "base":
        metrics |= weighted(meta, rows)
    if cfg.rows == "family":
        metrics |= splits(cfg, meta, rows, family)
    if cfg.detail and cfg.rows == "base":
        others = directions_of(cfg, family)
        sizes = {place: method.dict_size for place, method in family.items()}
        metrics |= similarity(cfg, meta, null_meta, others, sizes) | pursuit(cfg, rows, others)
        metrics |= replacement(cfg, meta, rows, others)
        metrics |= geometry.graph_overlap(
            decompose(meta, rows.directions), rows.directions, others[cfg.small]
        ).metrics()
        metrics |= in_words(cfg, meta, rows, strongest(cfg, family[cfg.base]), scores["ve"])
    write_record(cfg, "meta_dictionary", stored(cfg, real.spec))
    return metrics


def excess(scores: Mapping[str, float]) -> dict[str, float]:
    """Variance explained beyond that of random directions."""
    names = [name for name in scores if name.startswith("ve") and not name.endswith("_null")]
    return {f"{name}_excess": scores[name] - scores[f"{name}_null"] for name in names}


# ---- further measurements


def weighted(meta: BatchTopK, rows: Rows) -> dict[str, float]:
    """Variance explained with rows weighted by how often their latents fire."""
    explained = score(meta, rows.directions, rows.frequency).batch
    return {"ve_by_frequency": explained.centred, "ve_by_frequency_uncentred": explained.uncentred}


def similarity(
    cfg: DictConfig, meta: BatchTopK, null_meta: BatchTopK, others: Mapping[int, Tensor], sizes: Mapping[int, int]
) -> dict[str, float]:
    """Largest cosines of meta-latents with latents of every size, and within each set; writes their histograms.

    The more latents, the larger the largest of their cosines with anything: `_null` has the null's meta-latents.
    """
    W, W_null = directions(meta.W_dec, "meta"), directions(null_meta.W_dec, "null")
    real, null = (
        {place: geometry.max_cosines(metas, other)[0] for place, other in others.items()} for metas in (W, W_null)
    )
    within = {"meta": W, "base": others[cfg.base], "small": others[cfg.small]}
    series = {f"meta-latents to {sizes[place]}": values for place, values in real.items()}
    series["null to the small one"] = null[cfg.small]
    series |= {f"within {key}": geometry.max_cosines(set_, set_, within=True)[0] for key, set_ in within.items()}
    tables = [pd.DataFrame({"series": key, "cosine": BINS[:-1], "count": histogram(v)}) for key, v in series.items()]
    write_table(pd.concat(tables), Path(cfg.cell_folder) / COSINES)
    named = {
        f"to_{key}{suffix}": cosines[place]
        for key, place in (("small", cfg.small), ("base", cfg.base))
        for suffix, cosines in (("", real), ("_null", null))
    }
    return {
        **{f"similar_{key}": float((values > geometry.SIMILAR).double().mean()) for key, values in named.items()},
        **{f"cosine_{key}": float(values.median()) for key, values in named.items()},
        **{f"cosine_within_{key}": float(series[f"within {key}"].median()) for key in within},
        "p_small_above_base": geometry.p_larger(real[cfg.small], real[cfg.base]),
    }


def histogram(values: Tensor) -> np.ndarray:
    return np.histogram(values.cpu().numpy().clip(BINS[0], BINS[-1]), BINS)[0]


def pursuit(cfg: DictConfig, rows: Rows, others: Mapping[int, Tensor]) -> dict[str, float]:
    """The baseline: matching pursuit chooses k latents of the small dictionary for each row, or k of as many random
    directions."""
    k, W, small = cfg.meta.method.k, rows.directions, others[cfg.small]
    random = random_directions(small.shape[0], small.shape[1], cfg.seed).to(W.device)
    of_small, of_random = (
        VarianceExplained.of(W, geometry.matching_pursuit(W, atoms, k)).centred for atoms in (small, random)
    )
    return {"ve_pursuit": of_small, "ve_pursuit_random": of_random, "n_pursuit_atoms": float(len(small))}


def replacement(cfg: DictConfig, meta: BatchTopK, rows: Rows, others: Mapping[int, Tensor]) -> dict[str, float]:
    """Variance explained with other decoder rows: with the same encoder, and with one trained for them (`_tuned`)."""
    wanted_here = replacements(cfg, meta, rows, others)
    tuned = trained_metas([request for _, request in wanted_here.values()], Runtime.of(cfg), rows.directions.device)
    explained = {}
    for (key, (as_it_is, _)), learned in zip(wanted_here.items(), tuned, strict=True):
        explained[f"ve_{key}"] = score(as_it_is, rows.directions).batch.centred
        explained[f"ve_{key}_tuned"] = score(learned, rows.directions).batch.centred
    replaced, random = explained["ve_replaced_tuned"], explained["ve_random_decoder_tuned"]
    whole = score(meta, rows.directions).batch.centred
    return {**explained, "replaced_above_random": replaced - random, "replaced_below_meta": whole - replaced}


def replacements(
    cfg: DictConfig, meta: BatchTopK, rows: Rows, others: Mapping[int, Tensor]
) -> dict[str, tuple[BatchTopK, Request]]:
    """The meta-dictionary with other decoder rows, and the request for an encoder trained for them: the nearest latents
    of the smallest dictionaries, and random directions."""
    pool = torch.cat([others[place] for place in range(cfg.n_replacing)])
    W = directions(meta.W_dec, "meta")
    candidates = {
        "replaced": pool[geometry.max_cosines(W, pool)[1]],
        "random_decoder": random_directions(W.shape[0], W.shape[1], cfg.seed).to(W.device),
    }
    settings, precision = meta_node(cfg), cfg.trainer.precision
    changed = {key: replaced_decoder(meta, decoder) for key, decoder in candidates.items()}
    return {
        key: (other, meta_request(settings, rows.directions, precision, rows.frequency, other))
        for key, other in changed.items()
    }


def splits(cfg: DictConfig, meta: BatchTopK, rows: Rows, family: Mapping[int, Dictionary]) -> dict[str, float]:
    """Meta-latents of latents by the size of their dictionary, and what latents inherit that others split into, for the
    base and the next smaller dictionary."""
    codes = decompose(meta, rows.directions)
    per_row = codes.l0_per_row().double()
    ends = [*list(rows.first.values())[1:], len(per_row)]
    bounds = {place: (start, end) for (place, start), end in zip(rows.first.items(), ends, strict=True)}
    means = {place: float(per_row[start:end].mean()) for place, (start, end) in bounds.items()}
    small, large = (slice(*bounds[place]) for place in (cfg.base - 1, cfg.base))
    pairs = geometry.split_pairs(rows.directions[small], rows.directions[large])
    pairs = pairs + torch.tensor([small.start, large.start])
    return {
        **{f"meta_latents_of_{family[place].dict_size}": mean for place, mean in means.items()},
        "meta_latents_smallest": next(iter(means.values())),
        "meta_latents_largest": list(means.values())[-1],
        **geometry.inheritance(codes, pairs, (large.start, large.stop)).metrics(),
    }
