"""The strongest activations of every latent, with their tokens and contexts, and the tokens that latents share.

Shapes: R rows of T tokens, m = dict_size, n strongest kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.analysis.held_out import HeldOut
from core.kernels.codes import Codes, SparseCodes, entries
from core.methods.dictionary import Dictionary
from core.seeding import generator

MAX_TEXT = 60  # characters of a context on either side of its token


@dataclass(frozen=True)
class Strongest:
    """The strongest activations of every latent over some text, strongest first.

    counts  `[m]`, tokens on which the latent fires
    n_tokens  number of tokens seen
    values, places  `[m, n]`; places are positions in the flattened rows, -1 if there are fewer than n
    """

    counts: np.ndarray
    n_tokens: int
    values: np.ndarray
    places: np.ndarray

    @property
    def frequency(self) -> Tensor:
        """Share of the tokens on which each latent fires, `[m]`."""
        return torch.from_numpy(self.counts / max(1, self.n_tokens))


@torch.no_grad()
def strongest_activations(method: Dictionary, held_out: HeldOut, n: int) -> Strongest:
    """The `n` strongest of each latent over all held-out tokens, except those that begin a text."""
    m, n_ctx = method.dict_size, held_out.rows.shape[1]
    counts, n_tokens = np.zeros(m, dtype=np.int64), 0
    kept = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64))
    for start in range(0, len(held_out.rows), held_out.rows_per_batch):
        here = slice(start, start + held_out.rows_per_batch)
        x = held_out.activations(here).flatten(0, 1).float()  # [r T, d]
        inside = ~held_out.starts[here].flatten().cpu().numpy()
        token, latent, value = _positive_entries(method.encode(method.norm(x)[0]))
        token, latent, value = (a[inside[token]] for a in (token, latent, value))
        counts += np.bincount(latent, minlength=m)
        n_tokens += int(inside.sum())
        kept = _largest(kept, (latent, value, token + start * n_ctx), n)
    return Strongest(counts, n_tokens, *_as_table(kept, m, n))


def _positive_entries(codes: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, latent, value) of all entries > 0."""
    row, latent, value = entries(codes)
    positive = value > 0
    return row[positive].cpu().numpy(), latent[positive].cpu().numpy(), value[positive].cpu().numpy()


Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # latent, value, place


def _largest(kept: Entries, new: Entries, n: int) -> Entries:
    """The n largest entries of every latent, sorted by latent and falling value; ties go to the first."""
    latent, value, place = (np.concatenate(pair) for pair in zip(kept, new, strict=True))
    order = np.lexsort((place, -value, latent))
    latent, value, place = latent[order], value[order], place[order]
    chosen = _rank(latent) < n
    return latent[chosen], value[chosen], place[chosen]


def _rank(latent: np.ndarray) -> np.ndarray:
    """The rank of each entry among those of its latent, which are adjacent."""
    first = np.flatnonzero(np.r_[True, latent[1:] != latent[:-1]]) if len(latent) else np.empty(0, dtype=np.int64)
    return np.arange(len(latent)) - np.repeat(first, np.diff(np.r_[first, len(latent)]))


def _as_table(kept: Entries, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    latent, value, place = kept
    values, places = np.zeros((m, n), dtype=np.float32), np.full((m, n), -1, dtype=np.int64)
    values[latent, _rank(latent)], places[latent, _rank(latent)] = value, place
    return values, places


# ---- in words


def top_tokens(strongest: Strongest, rows: Tensor, tokenizer: Any, n: int) -> list[list[str]]:
    """For every latent the first n different tokens among its strongest activations; case and surrounding space are
    ignored."""
    flat = rows.flatten().cpu()
    words = {int(i): tokenizer.decode([int(i)]) for i in flat.unique()}
    lists = []
    for places in strongest.places:
        texts = (words[int(flat[place])] for place in places if place >= 0)
        lists.append(list({normal(text): None for text in texts})[:n])
    return lists


def normal(token: str) -> str:
    """A token without surrounding space and case. A token of space only is written as in code, with its length."""
    if words := token.strip().lower():
        return words
    return re.sub("  +", lambda run: f"\u2423\u00d7{len(run.group())}", repr(token)[1:-1])


def contexts(
    places: Sequence[int], rows: Tensor, tokenizer: Any, before: int, after: int
) -> list[tuple[str, str, str]]:
    """(text before, the token, text after) for positions in the flattened rows; -1 is skipped."""
    n_ctx = rows.shape[1]
    texts = []
    for place in (int(p) for p in places if p >= 0):
        row, at = divmod(place, n_ctx)
        tokens = rows[row].tolist()
        parts = tokens[max(0, at - before) : at], [tokens[at]], tokens[at + 1 : at + 1 + after]
        left, token, right = (tokenizer.decode(part) for part in parts)
        texts.append((left[-MAX_TEXT:], token, right[:MAX_TEXT]))
    return texts


# ---- token overlap: how much a set of latents has in common, without a judge


def token_overlap(sets: Iterable[Sequence[int]], tokens: Sequence[Sequence[str]]) -> np.ndarray:
    """The mean Jaccard index of the top tokens over all pairs in each set of latents: `[number of sets]`."""
    as_sets = [frozenset(words) for words in tokens]

    def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
        return len(a & b) / max(1, len(a | b))

    return np.array([
        np.mean([jaccard(as_sets[i], as_sets[j]) for i, j in combinations(latents, 2)]) for latents in sets
    ])  # fmt: skip


def random_sets(latents: Sequence[int], size: int, n: int, seed: int) -> list[list[int]]:
    """n sets of `size` different latents."""
    g = generator(seed, "random sets")
    return [[latents[i] for i in torch.randperm(len(latents), generator=g)[:size].tolist()] for _ in range(n)]


def top_rows(codes: SparseCodes, n: int, among: np.ndarray | None = None) -> list[list[int]]:
    """For every column of codes `[N, M]` the rows with the n largest entries, or fewer, largest first. `among`, bool
    `[N]`, selects the rows that count."""
    row, column, value = _positive_entries(codes)
    if among is not None:
        row, column, value = (a[among[row]] for a in (row, column, value))
    column, _, row = _largest((column[:0], value[:0], row[:0]), (column, value, row), n)
    bounds = np.searchsorted(column, np.arange(codes.shape[1] + 1))
    return [row[a:b].tolist() for a, b in pairwise(bounds)]
