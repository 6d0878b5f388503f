"""Dictionaries as other libraries train them, on activations that lie in a file, in a process of their own.

`python -m experiments.bench.quality_peers '<a Case as JSON>'` runs with the interpreter of the peers' environment,
which has torch but not this project's other packages. A library keeps its own method, initialisation, optimiser,
clipping and treatment of dead latents, with its own defaults. Equal for all are the batches and their order, their
number, the learning rate and its decay.

Shapes: B rows in the batch, d = d_model, m = dict_size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.bench import threads
from core.seeding import generator
from experiments.bench.peers import PACKAGES, Kind, last_line_of

Peer = Literal["dictionary_learning", "saelens"]
Arrays = dict[str, np.ndarray]  # W_enc and W_dec [m, d], b_enc [m], b_dec [d]; threshold [] where the library has one


@dataclass(frozen=True)
class Case:
    """What one process trains: a dictionary for each seed.

    rows    `.npy` file `[n, d]` of activations, fp32
    folder  where `<seed>.npz` with the weights goes
    """

    peer: Peer
    kind: Kind
    rows: str
    folder: str
    batch_size: int
    n_steps: int
    dict_size: int
    k: int
    lr: float
    decay_fraction: float
    seeds: list[int]
    n_threads: int
    device: str


class Batches:
    """The batches of one training, from a file `[n, d]`: each seed has an order of its own. Without repetition as long
    as there are enough rows."""

    def __init__(self, rows: str | Path, batch_size: int, n_steps: int, seed: int, device: str) -> None:
        self.rows: np.ndarray = np.load(rows, mmap_mode="r")
        self.batch_size, self.device = batch_size, device
        n_there = len(self.rows) // batch_size
        order = torch.randperm(n_there, generator=generator(seed, "batches"))
        self.order = order.repeat(-(-n_steps // n_there))[:n_steps].tolist()

    def __iter__(self) -> Iterator[Tensor]:
        for place in self.order:
            part = self.rows[place * self.batch_size : (place + 1) * self.batch_size]
            yield torch.from_numpy(np.array(part)).to(self.device)


def train_peer(case: Case, python: str) -> str:
    """Run a case in its own process. Returns the library's version. Raises PeerError."""
    return last_line_of("experiments.bench.quality_peers", asdict(case), case.n_threads, python)


def dictionary_learning(case: Case, seed: int) -> Arrays:
    """Its trainer's `update` for every batch. Warm-up is off, since its 1000 steps are longer than short trainings;
    the threshold is tracked over the second half where the training is shorter than its 1000 steps."""
    module, name = {"batchtopk": ("batch_top_k", "BatchTopKTrainer"), "topk": ("top_k", "TopKTrainer")}[case.kind]
    batches = Batches(case.rows, case.batch_size, case.n_steps, seed, case.device)
    decay_start = round(case.n_steps * (1 - case.decay_fraction))
    trainer = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)(
        steps=case.n_steps,
        activation_dim=batches.rows.shape[1],
        dict_size=case.dict_size,
        k=case.k,
        layer=0,
        lm_name="none",
        lr=case.lr,
        warmup_steps=0,
        decay_start=decay_start if case.decay_fraction else None,
        threshold_start_step=min(1000, case.n_steps // 2),
        seed=seed,
        device=case.device,
    )
    for step, x in enumerate(batches):
        trainer.update(step, x)
    ae = trainer.ae
    tensors = {
        "W_enc": ae.encoder.weight,
        "W_dec": ae.decoder.weight.T,
        "b_enc": ae.encoder.bias,
        "b_dec": ae.b_dec,
        "threshold": torch.as_tensor(ae.threshold),
    }
    return arrays(tensors)


def saelens(case: Case, seed: int) -> Arrays:
    """Its trainer's `step` for every batch, and the weights as it saves them for inference."""
    config, trainer = import_module("sae_lens.config"), import_module("sae_lens.training.sae_trainer")
    if case.kind == "batchtopk":
        saes = import_module("sae_lens.saes.batchtopk_sae")
        make, settings = saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig
    else:
        saes = import_module("sae_lens.saes.topk_sae")
        make, settings = saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig
    torch.manual_seed(seed)
    batches = Batches(case.rows, case.batch_size, case.n_steps, seed, case.device)
    sae = make(settings(d_in=batches.rows.shape[1], d_sae=case.dict_size, k=case.k, device=case.device))
    options = config.SAETrainerConfig(
        total_training_samples=case.n_steps * case.batch_size,
        train_batch_size_samples=case.batch_size,
        lr=case.lr,
        lr_end=case.lr,
        lr_decay_steps=round(case.n_steps * case.decay_fraction),
        device=case.device,
    )
    running = trainer.SAETrainer(cfg=options, sae=sae, data_provider=iter(()))
    for x in batches:
        running.step(x)
        running.n_training_steps += 1
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    tensors = {"W_enc": state["W_enc"].T, "W_dec": state["W_dec"], "b_enc": state["b_enc"], "b_dec": state["b_dec"]}
    return arrays(tensors | ({"threshold": state["threshold"][0]} if "threshold" in state else {}))


def arrays(tensors: dict[str, Tensor]) -> Arrays:
    return {name: tensor.detach().float().cpu().contiguous().numpy() for name, tensor in tensors.items()}


TRAINERS: dict[str, Callable[[Case, int], Arrays]] = {"dictionary_learning": dictionary_learning, "saelens": saelens}


def main(arguments: list[str]) -> int:
    """Train, save, and print the library's version as the last line; libraries may print before it."""
    case = Case(**json.loads(arguments[0]))
    with threads(case.n_threads):
        for seed in case.seeds:
            np.savez(Path(case.folder) / f"{seed}.npz", **TRAINERS[case.peer](case, seed))  # type: ignore[arg-type]
    print(version(PACKAGES[case.peer]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
