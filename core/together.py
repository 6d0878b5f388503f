"""Several dictionaries in one Lightning run on the same batches. Nothing else is shared: each comes out as if alone.

On the CPU a step of a small dictionary consists of small operations. A second thread speeds them up little, and waiting
for it costs much. So small dictionaries are trained on one thread each, as many at once as there are threads. Whether a
dictionary is small depends on its own size only, so its numbers do not depend on the other dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from core import distributed
from core.batch import Batch
from core.errors import NonFiniteLoss
from core.methods.base import DictionaryMethod
from core.optimizer import ClippingAdam
from core.streams.module import Chunk, StreamData

SMALL_PRODUCT = 1 << 30  # rows times `cost_per_row`; below it, one thread does a step

Outcome = dict[str, Tensor] | NonFiniteLoss


class Fleet(pl.LightningModule):
    """Dictionaries on the same batches, each with its own optimiser. One that diverges stops alone.

    names  of the dictionaries, to find them in the checkpoint of a larger fleet; their indices if None
    """

    def __init__(
        self,
        methods: Sequence[DictionaryMethod],
        data: StreamData,
        log_every_steps: int,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.methods = list(methods)
        self.names = list(names or map(str, range(len(methods))))
        self._registered = torch.nn.ModuleDict(dict(zip(self.names, methods, strict=True)))
        self.data = data
        self.log_every_chunks = max(1, log_every_steps // data.batches_per_chunk)
        self.stopped: dict[int, NonFiniteLoss] = {}
        self._last: dict[int, dict[str, Tensor]] = {}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [method.configure_optimizers() for method in self.methods]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fleet"] = {
            name: {
                "n_updates": method.n_updates,
                "stopped_at": self.stopped[index].step if index in self.stopped else None,
                "last": self._last.get(index),
            }
            for index, (name, method) in enumerate(zip(self.names, self.methods, strict=True))
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load these dictionaries; the checkpoint may contain others as well."""
        saved: dict[str, dict[str, Any]] = checkpoint["fleet"]
        optimizers = dict(zip(saved, checkpoint["optimizer_states"], strict=True))
        checkpoint["optimizer_states"] = [optimizers[name] for name in self.names]
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {key: value for key, value in weights if key.split(".")[1] in self.names}
        for index, (name, method) in enumerate(zip(self.names, self.methods, strict=True)):
            method.n_updates = saved[name]["n_updates"]
            if saved[name]["stopped_at"] is not None:
                self.stopped[index] = NonFiniteLoss(saved[name]["stopped_at"], type(method).__name__)
            if saved[name]["last"] is not None:
                self._last[index] = saved[name]["last"]

    def training_step(self, chunk: Chunk, batch_idx: int) -> None:
        running = [index for index in range(len(self.methods)) if index not in self.stopped]
        optimizers = [o for o in self.trainer.optimizers if isinstance(o, ClippingAdam)]

        def train(index: int) -> Outcome:
            try:
                return self.methods[index].train_on(chunk, optimizers[index])
            except NonFiniteLoss as error:
                return error

        small = [index for index in running if is_small(self.methods[index], chunk[0])]
        outcomes = dict(zip(small, one_thread_each(train, small), strict=True))
        outcomes |= {index: train(index) for index in running if index not in outcomes}
        for index, outcome in outcomes.items():
            if isinstance(outcome, NonFiniteLoss):
                self.stopped[index] = outcome
            else:
                self._last[index] = outcome
        if len(self.stopped) == len(self.methods):
            self.trainer.should_stop = True
        else:
            self._log(batch_idx)

    def last(self, index: int) -> dict[str, float]:
        """The values that a method logs, averaged over the last chunk."""
        return {name: float(value) for name, value in self._last[index].items()}

    def _log(self, batch_idx: int) -> None:
        running = [index for index in self._last if index not in self.stopped]
        for name in ("loss", "l0"):
            mean = torch.stack([self._last[index][name] for index in running]).mean()
            self.log(name, mean, prog_bar=True, logger=False)
        if self.logger is not None and batch_idx % self.log_every_chunks == 0:
            labels = {index: f"{index}-{type(self.methods[index]).__name__}" for index in running}
            metrics = {f"{label}/{n}": float(v) for i, label in labels.items() for n, v in self._last[i].items()}
            self.logger.log_metrics(metrics, step=self.data.trained_batches)


def is_small(method: DictionaryMethod, batch: Batch) -> bool:
    """Whether one CPU thread should do a step of this dictionary. Not on several ranks, which exchange in one order."""
    if batch.x.device.type != "cpu" or distributed.is_active():
        return False
    return len(batch.x) * method.settings.cost_per_row < SMALL_PRODUCT


def one_thread_each(train: Callable[[int], Outcome], indices: Sequence[int]) -> list[Outcome]:
    """Call `train` with every index, on one thread each; torch's number of threads is restored afterwards."""
    if not indices:
        return []
    n_threads = torch.get_num_threads()

    def alone(index: int) -> Outcome:
        torch.set_num_threads(1)  # for this worker, and for the whole matrix library
        return train(index)

    with ThreadPoolExecutor(min(n_threads, len(indices))) as workers:
        outcomes = list(workers.map(alone, indices))
    torch.set_num_threads(n_threads)
    return outcomes
