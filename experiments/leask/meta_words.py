"""Meta-latents in words: whether the latents of a meta-latent share top tokens; the page and tables to browse them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis import directions as geometry
from core.analysis import top_activations as top
from core.analysis.meta_page import Latent, MetaLatent, write_page
from core.analysis.meta_sae import decompose
from core.atomic import write_table
from core.bench import Entry, save_table
from core.kernels.codes import SparseCodes
from core.methods.batchtopk import BatchTopK
from core.metrics.sparsity import firing_counts
from experiments.common import held_out_rows, language_model
from experiments.leask.meta_rows import Rows

META_LATENTS, PAGE = "meta_latents.parquet", "browse.html"
SHOWN = 12  # meta-latents in the report's table


def in_words(cfg: DictConfig, meta: BatchTopK, rows: Rows, strongest: top.Strongest, ve: float) -> dict[str, float]:
    """Do the latents with the largest weight on a meta-latent share top tokens, more than random latents and as much as
    neighbours? Writes the tables and the page."""
    e = cfg.examples
    words = top.top_tokens(strongest, held_out_rows(cfg), language_model(cfg).tokenizer, e.n_tokens)
    tokens = [words[latent] for latent in rows.latents.tolist()]
    fires = np.array([bool(words) for words in tokens])
    codes = decompose(meta, rows.directions)
    sets = [s for s in top.top_rows(codes, e.set_size, fires) if len(s) == e.set_size]
    random = top.random_sets(np.flatnonzero(fires).tolist(), e.set_size, e.n_random_sets, cfg.seed)
    near = neighbours(rows.directions, np.flatnonzero(fires), e.set_size, max(1, len(sets)), cfg.seed)
    overlap = {key: top.token_overlap(s, tokens) for key, s in (("meta", sets), ("random", random), ("near", near))}
    write_browsing(cfg, codes, rows, tokens, strongest, ve)
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
    cfg: DictConfig,
    codes: SparseCodes,
    rows: Rows,
    tokens: Sequence[Sequence[str]],
    strongest: top.Strongest,
    ve: float,
) -> None:
    """Write the page, the table of meta-latents, and the rows for the report."""
    e, lm, text, folder = cfg.examples, language_model(cfg), held_out_rows(cfg), Path(cfg.cell_folder)
    ids, fired = rows.latents.numpy(), strongest.counts[rows.latents.numpy()]
    members, active = top.top_rows(codes, codes.shape[0]), firing_counts(codes).cpu().numpy()
    shown = np.sort(np.argsort(-fired, kind="stable")[: e.max_latents])
    latents = [
        Latent(
            id=int(ids[i]),
            tokens=tokens[i],
            rate=float(fired[i] / max(1, strongest.n_tokens)),
            contexts=top.contexts(strongest.places[ids[i]][: e.n_shown], text, lm.tokenizer, e.before, e.after),
            metas=list(zip(*(part.tolist() for part in meta_latents_of(codes, i)), strict=True)),
        )
        for i in shown.tolist()
    ]
    common = [common_tokens([tokens[i] for i in members[j][: 2 * e.set_size]], e.n_tokens) for j in range(len(members))]
    metas = [
        MetaLatent(j, common[j], int(active[j]), [int(ids[i]) for i in members[j][: 2 * SHOWN]])
        for j in range(len(members))
    ]
    title = f"{len(strongest.counts):,} latents at {cfg.stream.site} of the model {cfg.model.name}"
    note = f"{len(metas)} meta-latents, {ve:.1%} of the variance of the decoder directions explained."
    if len(rows.latents) < len(strongest.counts):
        note += (
            f" {len(rows.latents):,} latents fire often enough on the held-out text; the page leaves out the others."
        )
    write_page(folder / PAGE, title, note, latents, metas, len(rows.latents))
    table = pd.DataFrame(
        {"meta_latent": range(len(metas)), "n_latents": active, "tokens": [", ".join(c) for c in common]}
    )
    table["top_latents"] = [[int(ids[i]) for i in members[j][: e.set_size]] for j in range(len(metas))]
    write_table(table, folder / META_LATENTS)
    frequent = np.argsort(-active, kind="stable")[:SHOWN]
    table_rows: list[dict[str, Entry]] = [
        {
            "meta-latent": int(j),
            "latents": int(active[j]),
            "common tokens": ", ".join(common[j]),
            "largest weights": "; ".join(f"{ids[i]} ({', '.join(tokens[i][:3])})" for i in members[j][:4]),
        }
        for j in frequent
    ]
    note = f"The {len(frequent)} most frequent meta-latents; all of them, and all latents: {PAGE} in the cell's folder."
    save_table(folder, table_rows, [note])


def meta_latents_of(codes: SparseCodes, row: int) -> tuple[Tensor, Tensor]:
    """The meta-latents of one row and their weights, largest first."""
    here = slice(int(codes.support.offsets[row]), int(codes.support.offsets[row + 1]))
    order = codes.values[here].argsort(descending=True)
    return codes.cols[here][order], codes.values[here][order]


def common_tokens(lists: Sequence[Sequence[str]], n: int) -> list[str]:
    """The n tokens that occur in most of the lists, and in at least two; ties go to the token seen first."""
    seen = Counter(word for words in lists for word in words)
    return [word for word, count in seen.most_common() if count > 1][:n]
