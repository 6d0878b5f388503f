"""The rows of a decoder as a source: training data of a dictionary of dictionaries (Leask et al. 2025, meta-SAEs).

Shapes: N rows, d = d_model, B rows in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.batch import Batch
from core.checked import positive
from core.digest import digest
from core.errors import UserError
from core.runtime import Runtime
from core.seeding import generator
from core.streams.source import Source

Sampling = Literal["shuffled", "replacement", "frequency"]
MAX_NAMED = 5  # bad rows listed in an error


class DecoderRows:
    """An endless stream of batches of rows `[N, d]`, deterministic in the seed and resumable.

    shuffled     every epoch is a permutation; the last N mod B rows of it are dropped (the meta-SAE authors' loader)
    replacement  each row is drawn anew from all of them (SAEBench's evaluation)
    frequency    the same, with probabilities proportional to `weights` `[N]`: how often each latent fires

    Raises UserError for a batch larger than N (`shuffled`), and for weights that cannot be probabilities.
    """

    def __init__(
        self, rows: Tensor, batch_size: int, sampling: Sampling, seed: int, weights: Tensor | None = None
    ) -> None:
        if sampling not in get_args(Sampling):
            raise UserError(f"meta.sampling: {sampling!r} is not one of {', '.join(get_args(Sampling))}.")
        if sampling == "shuffled" and batch_size > len(rows):
            raise UserError(
                f"meta.batch_size={batch_size}: an epoch has only {len(rows)} rows. Choose a smaller batch."
            )
        if sampling == "frequency":
            weights = _distribution(weights, len(rows))
        self.rows, self.batch_size, self.sampling, self.seed, self.weights = rows, batch_size, sampling, seed, weights
        self.served = 0
        self._epoch: tuple[int, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        chosen = self._chosen(self.served).to(self.device)
        self.served += 1
        return Batch(self.rows[chosen])

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]

    def _chosen(self, number: int) -> Tensor:
        """The rows of one batch, int64 `[B]`."""
        n = len(self.rows)
        if self.sampling == "shuffled":
            epoch, place = divmod(number, n // self.batch_size)
            if self._epoch is None or self._epoch[0] != epoch:
                self._epoch = epoch, torch.randperm(n, generator=generator(self.seed, "decoder rows", "epoch", epoch))
            return self._epoch[1][place * self.batch_size : (place + 1) * self.batch_size]
        g = generator(self.seed, "decoder rows", "batch", number)
        if self.sampling == "replacement":
            return torch.randint(n, (self.batch_size,), generator=g)
        assert self.weights is not None
        drawn = torch.rand(self.batch_size, generator=g, dtype=torch.float64)
        return torch.searchsorted(self.weights.cumsum(0), drawn).clamp_(max=n - 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderRowSource(Source):
    """Rows `[N, d]`, for `n_steps` batches of `batch_size`.

    rows            unit directions (`directions`)
    sampling, seed  which rows a batch has: `DecoderRows`
    weights         `[N]`, for `sampling: frequency`; ignored otherwise
    """

    node = "meta"
    rows: Tensor
    n_steps: int = positive()
    sampling: Sampling
    seed: int
    weights: Tensor | None = None

    @property
    def n_batches(self) -> int:
        return self.n_steps

    @property
    def row_width(self) -> int:
        return int(self.rows.shape[1])

    @cached_property
    def batches_spec(self) -> dict[str, Any]:
        weighted = self.sampling == "frequency" and self.weights is not None
        names = ("n_steps", "batch_size", "sampling", "seed", "calibration_batches", "batches_per_chunk")
        return {
            "rows": digest(self.rows),
            "n_rows": len(self.rows),
            "weights": digest(self.weights) if weighted and self.weights is not None else None,
            **{name: getattr(self, name) for name in names},
        }

    def open(self, run: Runtime) -> DecoderRows:
        rows = self.rows.to(run.device)
        return DecoderRows(rows, self.batch_size, self.sampling, self.seed, self.weights)


def directions(W_dec: Tensor, name: str, remedy: str = "Leave these latents out of the dictionary.") -> Tensor:
    """The rows of `W_dec` `[N, d]` at unit norm, detached, in fp32.

    Raises UserError for a decoder of several models, and for rows without a direction: zero, or not finite. The message
    contains `name` (of the dictionary) and `remedy`.
    """
    if W_dec.ndim != 2:
        raise UserError(f"{name}: the decoder has the shape {list(W_dec.shape)}; rows of one model are needed, [N, d].")
    W = W_dec.detach().float()
    norms = W.norm(dim=1)
    bad = (~(norms > 0) | ~norms.isfinite()).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:MAX_NAMED])) + (", ..." if len(bad) > MAX_NAMED else "")
        raise UserError(
            f"{name}: {len(bad)} of {len(W)} decoder rows are zero or not finite (latents {shown}) and have no "
            f"direction. {remedy}"
        )
    return normalize(W, dim=1)


def random_directions(n: int, d: int, seed: int) -> Tensor:
    """`[n, d]` unit rows, uniform on the sphere: data without any structure, to compare with."""
    return normalize(torch.randn(n, d, generator=generator(seed, "random directions", n, d)), dim=1)


def _distribution(weights: Tensor | None, n: int) -> Tensor:
    """The weights divided by their sum, float64 on the CPU."""
    if weights is None or weights.shape != (n,):
        raise UserError(f"meta.sampling=frequency needs one firing frequency for each of {n} rows.")
    w = weights.detach().to("cpu", torch.float64)
    if not (w.isfinite().all() and (w >= 0).all() and w.sum() > 0):
        raise UserError("meta.sampling=frequency: frequencies must be finite, 0 or more, and not all 0.")
    return w / w.sum()
