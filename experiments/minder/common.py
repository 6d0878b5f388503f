"""What experiments on a pair of models share: the pair, held-out tokens, and crosscoders with equal numbers of active
latents.

A BatchTopK crosscoder is asked for k active latents per token. An L1 crosscoder is trained with one coefficient after
another, until it has as many (node `matching`): the comparison is fair only then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import cast

import torch
from omegaconf import DictConfig

from core.analysis.paired_tokens import PairedTokens, read_paired_tokens
from core.batch import Batch
from core.counts import count
from core.errors import UserError
from core.fleet import Request, load_or_train
from core.hub import go_on_with_unfinished
from core.methods.crosscoder import BatchTopKCrosscoder, L1Crosscoder
from core.methods.dictionary import Dictionary
from core.models.pair import ModelPair, load_pair
from core.notices import say_once
from core.runtime import Runtime
from core.streams.paired_source import PairedActivationSource
from experiments.common import method_node, once_per, source, stored, write_record

HELD_OUT = ("pair", "data", "dialogues", "stream.n_ctx", "stream.max_document_tokens", "evaluation")
FIRST_SLOPE = -1.5  # of log L0 over log mu, before two points are known
LARGEST_STEP = 8.0  # of mu, as a factor


def check(cfg: DictConfig) -> None:
    """Raises UserError for a crosscoder whose threshold would never be measured, and for a k that is not matched."""
    if not str(cfg.method["_target_"]).endswith(BatchTopKCrosscoder.__name__):
        return
    if cfg.method.k != cfg.matching.l0:
        raise UserError(
            f"method.k: {cfg.method.k} must be matching.l0 = {cfg.matching.l0}, the number that L1 crosscoders are "
            "matched to."
        )


def paired_source(cfg: DictConfig) -> PairedActivationSource:
    return cast(PairedActivationSource, source(cfg))


@once_per("pair")
def pair(cfg: DictConfig) -> ModelPair:
    """Both models, on their device."""
    go_on_with_unfinished(cfg.artifacts_dir)
    return load_pair(cfg.pair)


@once_per(*HELD_OUT)
def check_held_out_pairs(cfg: DictConfig) -> None:
    """Raises UserError if there is nothing to train or to measure on, which is better known before a training."""
    paired = paired_source(cfg)
    paired.check_rows("train", paired.seed)
    paired.check_rows("heldout", cfg.evaluation.seed)


@once_per(*HELD_OUT)
def held_out_pairs(cfg: DictConfig) -> PairedTokens:
    """`evaluation.n_rows` / 2 held-out dialogues, and text with as many tokens; one choice for all cells."""
    rows = paired_source(cfg).rows(pair(cfg).tokenizer, "heldout", cfg.evaluation.seed)
    tokens, counts = read_paired_tokens(rows, cfg.evaluation.n_rows)
    count(counts)
    return tokens


@once_per(*HELD_OUT)
def _kept(cfg: DictConfig) -> list[Batch]:
    return list(held_out_pairs(cfg).batches(pair(cfg), cfg.evaluation.rows_per_batch))


def held_out_batches(cfg: DictConfig) -> Iterable[Batch]:
    """The activations of both models on `held_out_pairs`; in memory, if `evaluation.keep_activations` is true."""
    if cfg.evaluation.keep_activations:
        return _kept(cfg)
    return held_out_pairs(cfg).batches(pair(cfg), cfg.evaluation.rows_per_batch)


# ---- crosscoders


def crosscoder_request(cfg: DictConfig, l1_coefficient: float | None = None) -> Request:
    """The cell's crosscoder; with another coefficient, where one is given."""
    node = method_node(cfg)
    if l1_coefficient is not None:
        node["l1_coefficient"] = l1_coefficient
    return Request(node, paired_source(cfg), cfg.trainer.precision, ready=partial(check_held_out_pairs, cfg))


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for a cell first."""
    return [crosscoder_request(cfg)]


def later_dictionaries(cfg: DictConfig) -> Iterator[list[Request]]:
    """What it trains then: crosscoders with other coefficients, until one has the wanted number of active latents."""
    search = Search(cfg)
    while (wanted := search.next()) is not None:
        yield [wanted]
        search.add(load_or_train(wanted, Runtime.of(cfg)))


def crosscoder(cfg: DictConfig) -> Dictionary:
    """The cell's crosscoder on the pair's device, in evaluation mode: of an L1 one that with the wanted number of
    active latents. `dictionary.json` in the cell's folder says how it was made."""
    search = Search(cfg)
    while (wanted := search.next()) is not None:
        search.add(load_or_train(wanted, Runtime.of(cfg)))
    chosen, best = search.best()
    write_record(cfg, "dictionary", stored(cfg, chosen.spec))
    return best.to(pair(cfg).device)


@torch.no_grad()
def l0_of(cfg: DictConfig, dictionary: Dictionary) -> float:
    """Active latents per held-out token."""
    dictionary = dictionary.to(pair(cfg).device)
    n_active, n_rows = 0.0, 0
    for batch in held_out_batches(cfg):
        codes = dictionary.encode(batch.normalised(dictionary.norm))
        n_active += float(codes.l0()) * len(batch.x)
        n_rows += len(batch.x)
    return n_active / n_rows


class Search:
    """The crosscoders of a cell, one after another, and how many active latents each has.

    The coefficient follows the line through two points in log L0 over log mu, between the closest on both sides where
    there are such. Other methods than L1 have one crosscoder.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.is_l1 = str(cfg.method["_target_"]).endswith(L1Crosscoder.__name__)
        self.wanted = float(cfg.matching.l0)
        self.tried: list[tuple[float, float, Request, Dictionary]] = []  # (mu, L0, ...)
        self._asked: Request | None = None
        self._mu = float(cfg.method.l1_coefficient) if self.is_l1 else math.nan

    def next(self) -> Request | None:
        """What to train next; None when the search is over."""
        if not self.tried:
            self._asked = crosscoder_request(self.cfg)
            return self._asked
        if not self.is_l1 or self.is_close or len(self.tried) >= self.cfg.matching.rounds:
            return None
        self._mu = next_coefficient([(mu, l0) for mu, l0, *_ in self.tried], self.wanted)
        self._asked = crosscoder_request(self.cfg, self._mu)
        return self._asked

    def add(self, trained: Dictionary) -> None:
        """The dictionary of the request before."""
        assert self._asked is not None
        l0 = l0_of(self.cfg, trained) if self.is_l1 else math.nan
        self.tried.append((self._mu, l0, self._asked, trained))

    @property
    def is_close(self) -> bool:
        return any(abs(l0 / self.wanted - 1) <= self.cfg.matching.tolerance for _, l0, *_ in self.tried)

    def best(self) -> tuple[Request, Dictionary]:
        """The one with the wanted number of active latents, or the closest, which is said."""
        _, l0, request, dictionary = min(self.tried, key=lambda one: _distance(one[1], self.wanted))
        if self.is_l1 and not self.is_close:
            say_once(
                f"matching: after {len(self.tried)} of matching.rounds={self.cfg.matching.rounds} trainings an L1 "
                f"crosscoder has {l0:.3g} active latents per token, not {self.wanted:g}. Raise matching.rounds, or "
                "begin nearer: method.l1_coefficient."
            )
        return request, dictionary


def _distance(l0: float, wanted: float) -> float:
    return 0.0 if math.isnan(l0) else abs(math.log(max(l0, 1e-9) / wanted))


def next_coefficient(tried: list[tuple[float, float]], wanted: float) -> float:
    """The coefficient at which L0 should be `wanted`, after pairs (mu, L0); rounded to four digits."""
    points = sorted((math.log(mu), math.log(max(l0, 1e-3) / wanted)) for mu, l0 in tried)
    below = [point for point in points if point[1] > 0]  # mu too small
    above = [point for point in points if point[1] <= 0]
    if below and above:
        (x, y), (x2, y2) = below[-1], above[0]
    elif len(points) > 1:
        (x, y), (x2, y2) = points[-2:] if below else points[:2]
    else:
        [(x, y)] = points
        x2, y2 = x + 1, y + FIRST_SLOPE
    slope = (y2 - y) / (x2 - x)
    nearest_x, nearest_y = min(points, key=lambda point: abs(point[1]))
    step = -nearest_y / (slope if slope < -0.1 else FIRST_SLOPE)
    limit = math.log(LARGEST_STEP)
    return float(f"{math.exp(nearest_x + max(-limit, min(limit, step))):.4g}")
