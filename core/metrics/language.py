"""How well text is predicted, in bits per byte: a causal language model, `xz -9e`, and a token trigram model.

Bits per byte can be compared across tokenizers: the cost of all tokens of a document over its UTF-8 bytes.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.text.documents import SpecialTokens
from core.text.tokenizing import bos_token_id, token_ids

NO_TOKEN = -1  # in a context that reaches back beyond the beginning of a text


@dataclass(frozen=True)
class TextScore:
    """The cost of some text, in sums: add over documents, divide once."""

    nats: float
    n_tokens: int
    n_bytes: int

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(self.nats + other.nats, self.n_tokens + other.n_tokens, self.n_bytes + other.n_bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.n_tokens


def total(scores: Sequence[TextScore]) -> TextScore:
    return sum(scores, TextScore(0.0, 0, 0))


def by_tag(scores: Sequence[TextScore], tags: Sequence[str]) -> dict[str, TextScore]:
    """The total score of each tag's documents, tags in alphabetical order. `tags` has the tag of each score."""
    pairs = list(zip(scores, tags, strict=True))
    return {tag: total([score for score, own in pairs if own == tag]) for tag in sorted(set(tags))}


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch `[start, end)` of a document's ids; its tokens from `scored_from` on are scored."""

    document: int
    start: int
    end: int
    scored_from: int


def windows_of(document: int, n_ids: int, n_ctx: int, stride: int) -> list[Window]:
    """Windows that score every id but the first (BOS) exactly once, `stride` apart and at most `n_ctx` long.

    A token sees all tokens before it, or at least `n_ctx - stride` of them.
    """
    windows, scored = [], 1
    for start in range(0, n_ids, stride):
        if scored >= n_ids:
            break
        end = min(start + n_ctx, n_ids)
        windows.append(Window(document, start, end, scored))
        scored = end
    return windows


@torch.no_grad()
def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    n_ctx: int,
    stride: int,
    batch_rows: int,
    special_tokens: SpecialTokens = "plain",
) -> list[TextScore]:
    """The cost of each text under a Hugging Face causal LM, each on its own from BOS, in sliding windows.

    Every token of a text is scored once; the end of a text is not scored. Windows of similar length are computed
    together, at most `batch_rows * n_ctx` tokens at a time. Padding is on the right, where causal attention ignores it.
    """
    if not 0 < stride < n_ctx:
        raise ValueError(f"stride: must lie between 1 and n_ctx - 1 = {n_ctx - 1}, not {stride}.")
    ids = [[bos_token_id(tokenizer), *one] for one in token_ids(tokenizer, texts, special_tokens)]
    windows = [window for i, one in enumerate(ids) for window in windows_of(i, len(one), n_ctx, stride)]
    windows.sort(key=lambda window: window.start - window.end)  # longest first
    nats = torch.zeros(len(texts), dtype=torch.float64, device=model.device)
    was_training = model.training
    model.eval()
    try:
        while windows:
            n_rows = batch_rows * n_ctx // (windows[0].end - windows[0].start)
            _add_nats(nats, model, ids, windows[:n_rows])
            windows = windows[n_rows:]
    finally:
        model.train(was_training)
    return [
        TextScore(cost, len(one) - 1, len(text.encode("utf-8", "surrogatepass")))
        for cost, one, text in zip(nats.tolist(), ids, texts, strict=True)
    ]


def _add_nats(nats: Tensor, model: PreTrainedModel, ids: Sequence[Sequence[int]], windows: Sequence[Window]) -> None:
    """Add the cost of the windows' scored tokens to their documents' `nats`. The first window is the longest."""
    tokens = torch.zeros(len(windows), windows[0].end - windows[0].start, dtype=torch.long)  # [R, T]
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    for row, window in enumerate(windows):
        length = window.end - window.start
        tokens[row, :length] = torch.tensor(ids[window.document][window.start : window.end])
        scored[row, window.scored_from - window.start : length] = True
    document = torch.tensor([window.document for window in windows])[:, None].expand_as(tokens)
    tokens, scored, document = (part.to(nats.device) for part in (tokens, scored, document))
    kept = scored[:, 1:]  # position t - 1 predicts token t
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1][kept]  # [n scored, V]
    costs = F.cross_entropy(logits.float(), tokens[:, 1:][kept], reduction="none")
    nats.index_add_(0, document[:, 1:][kept], costs.double())


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits per byte of the file that holds the texts, joined by newlines in the given order, after `xz -9e`."""
    joined = "\n".join(texts).encode()
    compressed = lzma.compress(joined, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(compressed) / len(joined)


class _Counts:
    """Counts of n-grams, keyed by `context * V + token`."""

    def __init__(self, keys: np.ndarray, vocab_size: int) -> None:
        self.keys, self.counts = np.unique(keys, return_counts=True)
        self.contexts, first, self.types = np.unique(self.keys // vocab_size, return_index=True, return_counts=True)
        self.totals = np.add.reduceat(self.counts, first)

    def smooth(self, context: np.ndarray, keys: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """p_n of n-grams given their p_{n-1}; a negative context is an unseen one."""
        counts = _find(self.keys, self.counts, keys)
        totals, types = (_find(self.contexts, values, context) for values in (self.totals, self.types))
        return np.where(totals > 0, (counts + types * shorter) / np.maximum(totals + types, 1), shorter)


def _find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values at the wanted keys (`keys` is sorted); 0 for keys that do not occur."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


class Trigram:
    """Token trigrams with Witten-Bell smoothing: a baseline for the language model.

    p_0(w)              = 1 / V
    p_n(w | context)    = (count(context w) + types(context) p_{n-1}(w | shorter context))
                          / (count(context) + types(context))

    `types(context)` is the number of different tokens seen after a context; an unseen context gives p_{n-1}
    (Witten & Bell 1991, interpolated as in Chen & Goodman 1999, section 2.4). Each p_n sums to one over the V tokens.
    Counts lie in sorted arrays: 21 M training tokens are counted in 3 s and 1.1 GB.

    Trained on one stream of token ids `[N]` in which a BOS token opens every document.
    """

    def __init__(self, train_ids: np.ndarray, vocab_size: int) -> None:
        if vocab_size >= 2**21:
            raise ValueError(f"vocab_size: trigrams of {vocab_size} tokens do not fit into 64 bits.")
        if len(train_ids) < 3:
            raise ValueError(f"A trigram model needs at least 3 training tokens, not {len(train_ids)}.")
        ids = np.asarray(train_ids, dtype=np.int64)
        self.vocab_size = vocab_size
        self.unigrams = _Counts(ids, vocab_size)
        keys = ids[:-1] * vocab_size + ids[1:]
        self.bigrams = _Counts(keys, vocab_size)
        keys = keys[:-1] * vocab_size + ids[2:]
        self.trigrams = _Counts(keys, vocab_size)

    def probabilities(self, before: np.ndarray, last: np.ndarray, token: np.ndarray) -> np.ndarray:
        """p(token | before, last) for arrays of ids; `NO_TOKEN` stands for a missing token."""
        before, last, token = (np.asarray(part, dtype=np.int64) for part in (before, last, token))
        V = self.vocab_size
        p = self.unigrams.smooth(np.zeros_like(token), token, np.full(token.shape, 1 / V))
        p = self.bigrams.smooth(last, last * V + token, p)
        context = np.where((before >= 0) & (last >= 0), before * V + last, NO_TOKEN)
        return self.trigrams.smooth(context, context * V + token, p)

    def score(self, documents: Sequence[Sequence[int]], n_bytes: Sequence[int], bos_token_id: int) -> list[TextScore]:
        """The cost of each document on its own from BOS. Ids are without BOS; `n_bytes` are their UTF-8 bytes."""
        return [
            TextScore(self._nats(np.asarray(ids, dtype=np.int64), bos_token_id), len(ids), size)
            for ids, size in zip(documents, n_bytes, strict=True)
        ]

    def _nats(self, ids: np.ndarray, bos_token_id: int) -> float:
        padded = np.concatenate([np.array([NO_TOKEN, bos_token_id]), ids])
        return -math.fsum(np.log(self.probabilities(padded[:-2], padded[1:-1], ids)))
