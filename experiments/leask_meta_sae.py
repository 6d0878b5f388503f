"""Meta-SAEs (Leask et al. 2025): the decoder directions of a dictionary as sparse sums of fewer meta-latents.

Shapes: N rows, d = d_model, M meta-latents; "small" and "base" are two dictionaries of a family of growing sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis import directions as geometry
from core.analysis import top_activations as top
from core.analysis.meta_page import Latent, MetaLatent, write_page
from core.analysis.meta_sae import (
    MetaRequest,
    VarianceExplained,
    counts,
    decompose,
    null_rows,
    replaced_decoder,
    score,
    train_meta,
)
from core.artifacts import Store
from core.bench import Entry, save_table
from core.data.decoder_rows import directions, random_directions
from core.errors import UserError
from core.fleet import KIND, Request
from core.kernels.codes import SparseCodes
from core.methods.base import DictionaryMethod
from core.methods.batchtopk import BatchTopK
from experiments.common import (
    held_out_activations,
    held_out_rows,
    language_model,
    once_per,
    plain,
    requests,
    trained,
)

META, COSINES, META_LATENTS, PAGE = "meta_dictionary.json", "cosines.parquet", "meta_latents.parquet", "browse.html"
BINS = np.linspace(-0.2, 1.0, 61)  # of the histograms of cosines
SHOWN = 12  # meta-latents in the report's table


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell: the base dictionary, or the family where others are looked at."""
    check(cfg)
    return requests(cfg, *(member(cfg, i) for i in needed(cfg)))


def check(cfg: DictConfig) -> None:
    """Raises UserError for a family and places in it that do not fit."""
    n = len(cfg.family)
    if cfg.rows not in ("base", "family"):
        raise UserError(f"rows={cfg.rows!r} is neither base nor family.")
    if not 0 <= cfg.base < n:
        raise UserError(f"base={cfg.base} is no place in the family of {n} dictionaries.")
    if cfg.detail or cfg.rows == "family":
        if n < 2 or not 0 <= cfg.small < cfg.base:
            raise UserError(
                f"family has {n} dictionaries, small={cfg.small}, base={cfg.base}: the small one comes before. "
                "detail=false rows=base needs the base alone."
            )
        if not 1 <= cfg.n_replacing <= cfg.base:
            raise UserError(f"n_replacing={cfg.n_replacing} must be 1 to {cfg.base}, the dictionaries before the base.")


def check_family(family: Mapping[int, DictionaryMethod]) -> None:
    """Raises UserError unless all have one width and each is larger than the one before."""
    if len({method.d_model for method in family.values()}) > 1:
        raise UserError(f"family: widths differ: {', '.join(str(method.d_model) for method in family.values())}.")
    sizes = [method.dict_size for method in family.values()]
    if sorted(set(sizes)) != sizes:
        raise UserError(f"family: sizes must grow from one dictionary to the next, not {', '.join(map(str, sizes))}.")


def needed(cfg: DictConfig) -> list[int]:
    """Places in the family that the cell looks at."""
    return list(range(len(cfg.family))) if cfg.detail or cfg.rows == "family" else [cfg.base]


def member(cfg: DictConfig, place: int) -> dict[str, Any]:
    """The `method` node of one dictionary of the family."""
    return {**plain(cfg.method), **plain(cfg.family[place])}


def run(cfg: DictConfig) -> dict[str, float]:
    """Train a meta-dictionary and one on random directions of the same shape; compare. Claims: leask/meta-*."""
    check(cfg)
    family = {place: trained(cfg, member(cfg, place)) for place in needed(cfg)}
    check_family(family)
    rows = rows_of(cfg, cfg.base, family[cfg.base]) if cfg.rows == "base" else family_rows(cfg, family)
    null = null_rows(rows.directions, cfg.seed)
    real = MetaRequest.of(cfg.meta, rows.directions, cfg.trainer.precision, rows.frequency)
    meta = train_meta(real, cfg)
    null_meta = train_meta(MetaRequest.of(cfg.meta, null, cfg.trainer.precision, rows.frequency), cfg)
    found = score(meta, rows.directions).metrics() | score(null_meta, null).metrics("_null")
    metrics = {"n_rows": float(len(null)), "threshold": float(meta.threshold), **found, **excess(found)}
    if rows.frequency is not None and cfg.rows == "base":
        metrics |= weighted(meta, rows)
    if cfg.rows == "family":
        metrics |= splits(cfg, meta, rows, family)
    if cfg.detail and cfg.rows == "base":
        others = {place: rows_of(cfg, place, method).directions for place, method in family.items()}
        sizes = {place: method.dict_size for place, method in family.items()}
        metrics |= similarity(cfg, meta, null_meta, others, sizes) | pursuit(cfg, rows, others)
        metrics |= replacement(cfg, meta, rows, others)
        metrics |= geometry.graph_overlap(
            decompose(meta, rows.directions), rows.directions, others[cfg.small]
        ).metrics()
        metrics |= in_words(cfg, meta, rows, strongest(cfg, cfg.base, family[cfg.base]), found["ve"])
    write_where(cfg, real)
    return metrics


def excess(found: Mapping[str, float]) -> dict[str, float]:
    """Variance explained beyond what a meta-dictionary explains of random directions."""
    names = [name for name in found if name.startswith("ve") and not name.endswith("_null")]
    return {f"{name}_excess": found[name] - found[f"{name}_null"] for name in names}


# ---- the rows


@dataclass(frozen=True)
class Rows:
    """directions `[N, d]`, unit; `latents` `[N]`: whose they are, in their dictionary; `frequency` `[N]`: the share of
    the held-out tokens on which each fires, where it was measured; `first`: where each dictionary's rows begin."""

    directions: Tensor
    latents: Tensor
    frequency: Tensor | None
    first: Mapping[int, int]


def rows_of(cfg: DictConfig, place: int, method: DictionaryMethod) -> Rows:
    """The rows of a dictionary, without those of latents that `meta.min_firing_rate` leaves out."""
    looked_at = cfg.detail or cfg.meta.sampling == "frequency" or cfg.meta.min_firing_rate is not None
    frequency = strongest(cfg, place, method).frequency if looked_at else None
    latents = kept(cfg, method.dict_size, frequency)
    W = directions(method.W_dec[latents.to(method.W_dec.device)], f"family[{place}] ({method.dict_size} latents)")
    return Rows(W, latents, None if frequency is None else frequency[latents], {place: 0})


def family_rows(cfg: DictConfig, family: Mapping[int, DictionaryMethod]) -> Rows:
    """The rows of all dictionaries below one another, smallest first."""
    parts = [rows_of(cfg, place, method) for place, method in family.items()]
    starts = np.cumsum([0, *(len(part.latents) for part in parts[:-1])]).tolist()
    frequencies = [part.frequency for part in parts if part.frequency is not None]
    return Rows(
        torch.cat([part.directions for part in parts]),
        torch.cat([part.latents for part in parts]),
        torch.cat(frequencies) if frequencies else None,
        dict(zip(family, starts, strict=True)),
    )


def kept(cfg: DictConfig, m: int, frequency: Tensor | None) -> Tensor:
    """The latents whose rows are taken, int64. Raises UserError if none is left."""
    if cfg.meta.min_firing_rate is None or frequency is None:
        return torch.arange(m)
    latents = (frequency > cfg.meta.min_firing_rate).nonzero().flatten()
    if not len(latents):
        raise UserError(f"meta.min_firing_rate={cfg.meta.min_firing_rate}: no latent fires more often; lower it.")
    return latents


def strongest(cfg: DictConfig, place: int, method: DictionaryMethod) -> top.Strongest:
    """The strongest activations of a dictionary's latents on the held-out rows."""
    return _strongest_of(cfg)(place, method)


@once_per("method", "family", "model", "data", "stream", "evaluation", "examples")
def _strongest_of(cfg: DictConfig) -> Any:
    found: dict[int, top.Strongest] = {}

    def of(place: int, method: DictionaryMethod) -> top.Strongest:
        if place not in found:
            lm, rows, e = language_model(cfg), held_out_rows(cfg), cfg.evaluation
            captured = held_out_activations(cfg)
            found[place] = top.strongest_activations(
                method, lm, cfg.stream.site, rows, e.rows_per_batch, cfg.examples.n_strongest, captured
            )
        return found[place]

    return of


# ---- what is measured beside the variance explained


def weighted(meta: BatchTopK, rows: Rows) -> dict[str, float]:
    """Variance explained with rows weighted by how often their latents fire."""
    found = score(meta, rows.directions, rows.frequency)
    return {"ve_by_frequency": found.batch.centred, "ve_by_frequency_uncentred": found.batch.uncentred}


def similarity(
    cfg: DictConfig, meta: BatchTopK, null_meta: BatchTopK, others: Mapping[int, Tensor], sizes: Mapping[int, int]
) -> dict[str, float]:
    """Largest cosines of meta-latents with latents of every size, and within each set; their histograms as a table.

    The more latents, the larger the largest of their cosines with anything: `_null` is that of the null's meta-latents.
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
    pd.concat(tables).to_parquet(folder(cfg) / COSINES)
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
    """The baseline: k latents of the small dictionary for each row, chosen by matching pursuit; and of as many random
    directions."""
    k, W, small = cfg.meta.method.k, rows.directions, others[cfg.small]
    random = random_directions(small.shape[0], small.shape[1], cfg.seed).to(W.device)
    of_small, of_random = (
        VarianceExplained.of(W, geometry.matching_pursuit(W, atoms, k)).centred for atoms in (small, random)
    )
    return {"ve_pursuit": of_small, "ve_pursuit_random": of_random, "n_pursuit_atoms": float(len(small))}


def replacement(cfg: DictConfig, meta: BatchTopK, rows: Rows, others: Mapping[int, Tensor]) -> dict[str, float]:
    """Variance explained with other decoder rows: the nearest latents of the smallest dictionaries, and random
    directions; both with the encoder as it is, and trained for them (`_tuned`)."""
    pool = torch.cat([others[place] for place in range(cfg.n_replacing)])
    W = directions(meta.W_dec, "meta")
    candidates = {
        "replaced": pool[geometry.max_cosines(W, pool)[1]],
        "random_decoder": random_directions(W.shape[0], W.shape[1], cfg.seed).to(W.device),
    }
    found = {}
    for key, decoder in candidates.items():
        as_it_is = replaced_decoder(meta, decoder)
        tuned = train_meta(
            MetaRequest.of(cfg.meta, rows.directions, cfg.trainer.precision, rows.frequency, as_it_is), cfg
        )
        found[f"ve_{key}"] = score(as_it_is, rows.directions).batch.centred
        found[f"ve_{key}_tuned"] = score(tuned, rows.directions).batch.centred
    replaced, random = found["ve_replaced_tuned"], found["ve_random_decoder_tuned"]
    whole = score(meta, rows.directions).batch.centred
    return {**found, "replaced_above_random": replaced - random, "replaced_below_meta": whole - replaced}


def splits(cfg: DictConfig, meta: BatchTopK, rows: Rows, family: Mapping[int, DictionaryMethod]) -> dict[str, float]:
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
        **geometry.inheritance(codes, pairs, (large.start, large.stop), cfg.seed).metrics(),
    }


# ---- in words


def in_words(cfg: DictConfig, meta: BatchTopK, rows: Rows, found: top.Strongest, ve: float) -> dict[str, float]:
    """Whether the latents with the largest weight on a meta-latent share top tokens, more than latents drawn at random
    and as much as neighbours; writes the tables and the page."""
    e = cfg.examples
    words = top.top_tokens(found, held_out_rows(cfg), language_model(cfg).tokenizer, e.n_tokens)
    tokens = [words[latent] for latent in rows.latents.tolist()]
    fires = np.array([bool(words) for words in tokens])
    codes = decompose(meta, rows.directions)
    sets = [s for s in top.top_rows(codes, e.set_size, fires) if len(s) == e.set_size]
    random = top.random_sets(np.flatnonzero(fires).tolist(), e.set_size, e.n_random_sets, cfg.seed)
    near = neighbours(rows.directions, np.flatnonzero(fires), e.set_size, max(1, len(sets)), cfg.seed)
    overlap = {key: top.token_overlap(s, tokens) for key, s in (("meta", sets), ("random", random), ("near", near))}
    write_browsing(cfg, codes, rows, tokens, found, ve)
    mean = {key: float(values.mean()) if len(values) else 0.0 for key, values in overlap.items()}
    p = geometry.p_larger(*(torch.from_numpy(overlap[key]) for key in ("meta", "random"))) if sets else 1.0
    return {
        "token_overlap": mean["meta"],
        "token_overlap_random": mean["random"],
        "token_overlap_neighbours": mean["near"],
        "p_token_overlap": p,
        "n_compared_meta_latents": float(len(sets)),
    }


def neighbours(W: Tensor, among: np.ndarray, size: int, n: int, seed: int) -> list[list[int]]:
    """n latents drawn at random, each with the size - 1 nearest to it."""
    chosen = [s[0] for s in top.random_sets(among.tolist(), 1, n, seed)]
    nearest = (W[chosen] @ W[among].T).topk(min(size, len(among)), dim=1).indices.cpu().numpy()
    return [among[row].tolist() for row in nearest]


def write_browsing(
    cfg: DictConfig, codes: SparseCodes, rows: Rows, tokens: Sequence[Sequence[str]], found: top.Strongest, ve: float
) -> None:
    """The page, the table of meta-latents, and the rows of the report."""
    e, lm, text = cfg.examples, language_model(cfg), held_out_rows(cfg)
    ids, fired = rows.latents.numpy(), found.counts[rows.latents.numpy()]
    members, active = top.top_rows(codes, codes.shape[0]), counts(codes).cpu().numpy()
    shown = np.sort(np.argsort(-fired, kind="stable")[: e.max_latents])
    latents = [
        Latent(
            id=int(ids[i]),
            tokens=tokens[i],
            rate=float(fired[i] / max(1, found.n_tokens)),
            contexts=top.contexts(found.places[ids[i]][: e.n_shown], text, lm.tokenizer, e.before, e.after),
            metas=list(zip(*(part.tolist() for part in entries(codes, i)), strict=True)),
        )
        for i in shown.tolist()
    ]
    common = [common_tokens([tokens[i] for i in members[j][: 2 * e.set_size]], e.n_tokens) for j in range(len(members))]
    metas = [
        MetaLatent(j, common[j], int(active[j]), [int(ids[i]) for i in members[j][: 2 * SHOWN]])
        for j in range(len(members))
    ]
    title = f"{len(found.counts):,} latents at {cfg.stream.site} of the model {cfg.model.name}"
    note = f"{len(metas)} meta-latents, {ve:.1%} of the variance of the decoder directions explained."
    if len(rows.latents) < len(found.counts):
        note += f" {len(rows.latents):,} latents fire often enough on the text looked at; the others are left out."
    write_page(folder(cfg) / PAGE, title, note, latents, metas, len(rows.latents))
    table = pd.DataFrame(
        {"meta_latent": range(len(metas)), "n_latents": active, "tokens": [", ".join(c) for c in common]}
    )
    table["top_latents"] = [[int(ids[i]) for i in members[j][: e.set_size]] for j in range(len(metas))]
    table.to_parquet(folder(cfg) / META_LATENTS)
    frequent = np.argsort(-active, kind="stable")[:SHOWN]
    entries_of_table: list[dict[str, Entry]] = [
        {
            "meta-latent": int(j),
            "latents": int(active[j]),
            "common tokens": ", ".join(common[j]),
            "largest weights": "; ".join(f"{ids[i]} ({', '.join(tokens[i][:3])})" for i in members[j][:4]),
        }
        for j in frequent
    ]
    note = f"The {len(frequent)} most frequent meta-latents; all of them, and all latents: {PAGE} in the cell's folder."
    save_table(folder(cfg), entries_of_table, [note])


def entries(codes: SparseCodes, row: int) -> tuple[Tensor, Tensor]:
    """Meta-latents of one row, and their weights, largest first."""
    here = slice(int(codes.support.offsets[row]), int(codes.support.offsets[row + 1]))
    order = codes.values[here].argsort(descending=True)
    return codes.cols[here][order], codes.values[here][order]


def common_tokens(lists: Sequence[Sequence[str]], n: int) -> list[str]:
    """The n tokens that occur in most of the lists, and in two at least; of equals the first seen."""
    seen: dict[str, int] = {}
    for words in lists:
        for word in words:
            seen[word] = seen.get(word, 0) + 1
    return sorted((word for word in seen if seen[word] > 1), key=lambda word: -seen[word])[:n]


# ---- where things lie


def folder(cfg: DictConfig) -> Path:
    found = Path(cfg.cell_folder)
    found.mkdir(parents=True, exist_ok=True)
    return found


def write_where(cfg: DictConfig, request: MetaRequest) -> None:
    """`meta_dictionary.json`: the folder of the meta-dictionary, and how it was trained."""
    stored = Store(cfg.artifacts_dir).path(KIND, request.spec)
    told = {"folder": str(stored), **json.loads((stored / "manifest.json").read_text())}
    (folder(cfg) / META).write_text(json.dumps(told, indent=1))
