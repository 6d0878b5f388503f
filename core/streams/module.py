"""The Lightning data module of a stream: it serves chunks of batches, so that one Lightning step covers many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from core.batch import Batch
from core.streams.source import Stream


class Chunk(list[Batch]):
    """Consecutive batches, and the state of the stream after them."""

    def __init__(self, batches: Iterable[Batch], state_after: dict[str, Any]) -> None:
        super().__init__(batches)
        self.state_after = state_after


class StreamData(pl.LightningDataModule):
    """`n_batches` batches of a stream as chunks of `batches_per_chunk`; the last chunk may be shorter.

    A checkpoint holds the stream's position after the last chunk that was trained on, not after one read ahead.
    """

    def __init__(self, stream: Stream, n_batches: int, batches_per_chunk: int) -> None:
        super().__init__()
        self.stream, self.n_batches, self.batches_per_chunk = stream, n_batches, batches_per_chunk
        self.trained_batches = 0
        self.state_after = stream.state_dict()

    @property
    def n_chunks(self) -> int:
        return -(-self.n_batches // self.batches_per_chunk)

    def train_dataloader(self) -> Chunks:
        return Chunks(self)

    def transfer_batch_to_device(self, batch: Chunk, device: torch.device, dataloader_idx: int) -> Chunk:
        """Lightning calls this before it trains on a chunk; checkpoints are written afterwards. The batches are not
        moved: the stream already serves them on the device."""
        self.trained_batches += len(batch)
        self.state_after = batch.state_after
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"trained_batches": self.trained_batches, "stream": self.state_after}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trained_batches, self.state_after = state_dict["trained_batches"], state_dict["stream"]
        self.stream.load_state_dict(self.state_after)


class Chunks:
    """The chunks that are still to be trained on."""

    def __init__(self, data: StreamData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Chunk]:
        done = self.data.trained_batches
        while done < self.data.n_batches:
            n = min(self.data.batches_per_chunk, self.data.n_batches - done)
            batches = [next(self.data.stream) for _ in range(n)]
            done += n
            yield Chunk(batches, self.data.stream.state_dict())
