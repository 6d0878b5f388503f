"""Crosscoders of a base and a chat model (Minder et al. 2025, sec. 3): L1 and BatchTopK at equal numbers of latents.

Shapes: m latents, M models (0 base, 1 chat), d = d_model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import cosine_similarity

from core.analysis.latent_use import TogetherOrApart, twin_pairs
from core.atomic import write_table
from core.kernels.codes import entries
from core.methods.crosscoder import L1Crosscoder, latent_sizes, scaled
from core.methods.dictionary import Dictionary
from core.metrics.crosscoder import CLASSES, ExplainedVariance, in_class, relative_norm
from experiments.minder import common, page
from experiments.minder.analysis import Trained
from experiments.minder.common import crosscoder, dictionaries, held_out_batches, later_dictionaries
from experiments.minder.settings import TrainingSettings

__all__ = ["SETTINGS", "check", "dictionaries", "later_dictionaries", "run"]

SETTINGS = TrainingSettings
N_BINS = 100  # of the histogram of Delta_norm, as in the paper's figure
SMALL = 1e-4  # v below which the authors' trainer calls a latent dead
RARE = 10  # activations on text, or on dialogues, below which their table calls it dead


def check(cfg: DictConfig) -> None:
    """Raises UserError for settings that do not fit together."""
    common.check(cfg)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train one crosscoder, and say what its decoder norms call chat-only, base-only and shared.

    It ends in a page to browse: `diff.html` in the cell's folder.
    Claims: minder/crosscoder-1 (counts) and -2 (twins) compare these cells with each other.
    """
    trained = crosscoder(cfg)
    use = Use.of(cfg, trained)
    W = trained.W_dec.detach().cpu()
    delta, alive = relative_norm(W), use.counts.sum(1) > 0
    folder = Path(cfg.cell_folder)
    write_table(latent_table(W, delta, use), folder / "latents.parquet")
    write_table(histogram(delta, alive), folder / "delta.parquet")
    metrics = {
        **use.metrics(),
        **class_counts(delta, alive),
        **cosines(W, delta, alive),
        **twin_metrics(cfg, trained, delta, alive, use.largest, folder),
        **({"l1_coefficient": trained.settings.l1_coefficient} if isinstance(trained, L1Crosscoder) else {}),
    }
    page.write(cfg, Trained.of(trained), metrics)
    return metrics


class Use:
    """What a crosscoder does on held-out tokens.

    counts   `[m, 2]`, tokens of text and of dialogues on which a latent is active
    largest  `[m]`, the largest v
    """

    def __init__(self, dictionary: Dictionary) -> None:
        m = dictionary.dict_size
        self.counts, self.largest = np.zeros((m, 2), dtype=np.int64), np.zeros(m)
        self.n_tokens = np.zeros(2, dtype=np.int64)
        self.explained = ExplainedVariance()

    @classmethod
    @torch.no_grad()
    def of(cls, cfg: DictConfig, dictionary: Dictionary) -> Use:
        use, sizes = cls(dictionary), latent_sizes(dictionary.W_dec.detach(), "sum")
        for batch in held_out_batches(cfg):
            x = batch.normalised(dictionary.norm)
            codes = dictionary.encode(x)
            use.explained.add(x, dictionary.decode(codes))
            rows, cols, v = (part.cpu() for part in entries(scaled(codes, sizes)))
            kind = batch.truth["is_chat"].cpu().long()
            use.n_tokens += np.bincount(kind.numpy(), minlength=2)
            active = v > 0
            places = (cols * 2 + kind[rows])[active].numpy()
            use.counts += np.bincount(places, minlength=use.counts.size).reshape(use.counts.shape)
            np.maximum.at(use.largest, cols.numpy(), v.double().numpy())
        return use

    def metrics(self) -> dict[str, float]:
        """L0, explained variance, and dead latents by each of three definitions in use."""
        l0 = self.counts.sum(0) / self.n_tokens
        return {
            "l0": float(self.counts.sum() / self.n_tokens.sum()),
            "l0_text": float(l0[0]),
            "l0_chat": float(l0[1]),
            **self.explained.metrics(),
            "n_dead": float((self.counts.sum(1) == 0).sum()),
            "n_dead_small": float((self.largest <= SMALL).sum()),
            "n_dead_rare": float((self.counts < RARE).any(1).sum()),
        }


def latent_table(W: Tensor, delta: Tensor, use: Use) -> pd.DataFrame:
    """A row for each latent."""
    norms = torch.linalg.vector_norm(W, dim=2)
    return pd.DataFrame(
        {
            "latent": np.arange(len(W)),
            "delta": delta.numpy(),
            "norm_base": norms[:, 0].numpy(),
            "norm_chat": norms[:, 1].numpy(),
            "cosine": cosine_similarity(W[:, 0], W[:, 1], dim=1).numpy(),
            "n_active_text": use.counts[:, 0],
            "n_active_chat": use.counts[:, 1],
            "largest": use.largest,
        }
    )


def histogram(delta: Tensor, alive: np.ndarray) -> pd.DataFrame:
    """Latents by Delta_norm, in bins of equal width: those that are active, and all."""
    edges = np.linspace(0, 1, N_BINS + 1)
    values = delta.numpy()
    counts = {
        "n_alive": np.histogram(values[alive], edges)[0],
        "n": np.histogram(values[np.isfinite(values)], edges)[0],
    }
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], **counts})


def class_counts(delta: Tensor, alive: np.ndarray) -> dict[str, float]:
    """Latents by class: those that are active, and with the dead ones (the paper leaves them out)."""
    masks = {name: in_class(delta, name).numpy() for name in CLASSES}
    masks["other"] = ~np.logical_or.reduce(list(masks.values()))
    alive_counts = {f"n_{name}": float((mask & alive).sum()) for name, mask in masks.items()}
    return {**alive_counts, **{f"n_{name}_with_dead": float(mask.sum()) for name, mask in masks.items()}}


def cosines(W: Tensor, delta: Tensor, alive: np.ndarray) -> dict[str, float]:
    """The median cosine of the two decoders of active latents, by class."""
    cosine = cosine_similarity(W[:, 0], W[:, 1], dim=1).numpy()
    chosen = {name: cosine[in_class(delta, name).numpy() & alive] for name in CLASSES}
    return {f"cosine_{name}": float(np.median(values)) for name, values in chosen.items() if len(values)}


def twin_metrics(
    cfg: DictConfig, trained: Dictionary, delta: Tensor, alive: np.ndarray, largest: np.ndarray, folder: Path
) -> dict[str, float]:
    """Chat-only and base-only latents of one direction: how many pairs, and how often one fires without the other,
    beside pairs drawn at random. `twins.parquet` has them."""
    living = torch.from_numpy(alive)
    chat, base = (living & in_class(delta, name) for name in ("chat_only", "base_only"))
    pairs = twin_pairs(trained.W_dec.detach().cpu(), chat, base, cfg.seed)
    both = torch.cat([pairs.true, pairs.false])
    together = TogetherOrApart(both, largest)
    sizes = latent_sizes(trained.W_dec.detach(), "sum")
    if len(both):
        with torch.no_grad():
            for batch in held_out_batches(cfg):
                together.add(scaled(trained.encode(batch.normalised(trained.norm)), sizes))
    divergence, is_true = together.divergence, np.arange(len(both)) < len(pairs.true)
    columns = {"chat": both[:, 0].numpy(), "base": both[:, 1].numpy(), "true": is_true, "divergence": divergence}
    write_table(pd.DataFrame(columns), folder / "twins.parquet")
    metrics = {"n_twins": float(len(pairs.true))}
    for name, chosen in (("twins", is_true), ("false_twins", ~is_true)):
        known = divergence[chosen & np.isfinite(divergence)]
        if len(known):
            metrics[f"divergence_{name}"] = float(known.mean())
            metrics[f"apart_share_{name}"] = float((known > 0.5).mean())
    return metrics
