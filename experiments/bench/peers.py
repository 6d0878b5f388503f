"""One training step of the libraries that a user would pick instead, each timed in its own process.

`python -m experiments.bench.peers '<a Case as JSON>'` runs with the interpreter of the peers' environment, which has
torch but not this project's other packages. A step is everything that a library does per optimiser step once the batch
is in memory: forward, loss, backward, its own clipping or projection, its own count of dead latents and its own Adam.
No latent is dead in so short a run. `dense` is no library but a textbook dictionary in plain PyTorch.

Shapes: B rows in the batch, d = d_model, m = dict_size.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.bench import Times, alternate, threads
from core.errors import UserError
from core.seeding import generator
from core.synthetic.planted import PlantedEntities

Kind = Literal["batchtopk", "topk"]
Step = Callable[[Tensor], object]
LR = 1e-4
PACKAGES = {
    "dense": "torch",
    "saelens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "overcomplete": "Overcomplete",
    "llamascopium": "llamascopium",
    "sparsify": "eai-sparsify",
}
KINDS: dict[str, tuple[Kind, ...]] = dict.fromkeys(PACKAGES, ("batchtopk", "topk")) | {"sparsify": ("topk",)}
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """What one process times."""

    peer: str
    kind: Kind
    batch_size: int
    d_model: int
    dict_size: int
    k: int
    n_threads: int
    device: str
    repetitions: int
    warmup: int
    seed: int


@dataclass(frozen=True)
class Timed:
    """The library's version, and the seconds of `step` and `product`."""

    version: str
    times: Times


class PeerError(RuntimeError):
    """A peer could not be imported, or failed. The message is the last line of its process's output."""


def last_line_of(module: str, case: Mapping[str, Any], n_threads: int, python: str) -> str:
    """The last line that a module prints when it runs a case in a process of its own. Raises PeerError."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(n_threads),
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, "-m", module, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise PeerError(done.stderr.strip().rpartition("\n")[2])
    return done.stdout.strip().rpartition("\n")[2]


def time_peer(case: Case, python: str) -> Timed:
    """Run a case in its own process. Raises PeerError."""
    result = json.loads(last_line_of("experiments.bench.peers", asdict(case), case.n_threads, python))
    return Timed(result["version"], Times(result["seconds"]))


def measure(case: Case) -> Timed:
    """Time a case in this process: steps and encoder products `[B, d] x [d, m]` in turn."""
    device = torch.device(case.device)
    with threads(case.n_threads):
        torch.manual_seed(case.seed)
        x = structured_rows(case.batch_size, case.d_model, case.seed).to(device)
        step = STEPS[case.peer](case)
        tasks = {"product": product(x, case.dict_size), "step": lambda: step(x)}
        times = alternate(tasks, device, case.repetitions, case.warmup)
    return Timed(version(PACKAGES[case.peer]), times)


def structured_rows(n: int, d_model: int, seed: int) -> Tensor:
    """`[n, d]` mixtures of many directions, with a mean |x|^2 of d. All competitors train on them."""
    source = PlantedEntities(d_model, n_attributes=256, n_entities=2048, entities_per_row=(8, 40), seed=seed)
    x = source.rows(n, generator(seed, "bench")).x
    return x / x.square().mean().sqrt()


def product(x: Tensor, dict_size: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """One encoder product, written into a buffer that is allocated once."""
    W = torch.randn(dict_size, x.shape[1], device=x.device).to(dtype)
    out = torch.empty(x.shape[0], dict_size, device=x.device, dtype=dtype)
    x = x.to(dtype)
    return lambda: torch.mm(x, W.T, out=out)


class DenseDictionary(nn.Module):
    """Textbook TopK or BatchTopK: autograd through a row-wise or a flat top-k and two dense products."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        W = nn.functional.normalize(torch.randn(case.dict_size, case.d_model), dim=1)
        self.kind, self.k = case.kind, case.k
        self.W_enc, self.W_dec = nn.Parameter(W.clone()), nn.Parameter(W.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(case.dict_size)), nn.Parameter(torch.zeros(case.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, d]` -> the mean squared error, a scalar."""
        f = torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)  # [B, m]
        z = f.flatten() if self.kind == "batchtopk" else f
        n = self.k * len(x) if self.kind == "batchtopk" else self.k
        largest = z.topk(n, dim=-1, sorted=False)
        f = torch.zeros_like(z).scatter(-1, largest.indices, largest.values).view_as(f)
        return (f @ self.W_dec + self.b_dec - x).square().mean()


def dense(case: Case) -> Step:
    model = DenseDictionary(case).to(case.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    return step


def saelens(case: Case) -> Step:
    config, trainer = import_module("sae_lens.config"), import_module("sae_lens.training.sae_trainer")
    if case.kind == "batchtopk":
        saes = import_module("sae_lens.saes.batchtopk_sae")
        make, settings = saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig
    else:
        saes = import_module("sae_lens.saes.topk_sae")
        make, settings = saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig
    sae = make(settings(d_in=case.d_model, d_sae=case.dict_size, k=case.k, device=case.device))
    options = config.SAETrainerConfig(
        total_training_samples=10**9 * case.batch_size,
        train_batch_size_samples=case.batch_size,
        lr=LR,
        lr_end=LR,
        device=case.device,
    )
    running = trainer.SAETrainer(cfg=options, sae=sae, data_provider=iter(()))

    def step(x: Tensor) -> object:
        loss = running.step(x).loss.item()
        running.n_training_steps += 1
        return loss

    return step


def dictionary_learning(case: Case) -> Step:
    module, name = {"batchtopk": ("batch_top_k", "BatchTopKTrainer"), "topk": ("top_k", "TopKTrainer")}[case.kind]
    trainer = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)(
        steps=10**6,
        activation_dim=case.d_model,
        dict_size=case.dict_size,
        k=case.k,
        layer=0,
        lm_name="none",
        lr=LR,
        seed=case.seed,
        device=case.device,
    )
    steps = iter(range(2000, 10**6))  # after its geometric median at step 0, before it tracks a threshold

    return lambda x: trainer.update(next(steps), x)


def sparsify(case: Case) -> Step:
    """What its trainer does per batch, in one process and with Adam; its loop itself needs a language model."""
    package, coders = import_module("sparsify"), import_module("sparsify.sparse_coder")
    settings = package.SaeConfig(num_latents=case.dict_size, k=case.k)
    sae = coders.SparseCoder(case.d_model, settings, device=case.device, dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    fired = torch.zeros(case.dict_size, dtype=torch.bool, device=case.device)
    since = torch.zeros(case.dict_size, dtype=torch.long, device=case.device)

    def step(x: Tensor) -> object:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=None)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since.add_(len(x))
        since[fired] = 0
        fired.zero_()
        return out.fvu.item()

    return step


def overcomplete(case: Case) -> Step:
    _stand_in_for_torchvision()
    package = import_module("overcomplete.sae")
    per_batch = case.kind == "batchtopk"
    make, k = (package.BatchTopKSAE, case.k * case.batch_size) if per_batch else (package.TopKSAE, case.k)
    sae = make(case.d_model, nb_concepts=case.dict_size, top_k=k, device=case.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)

    def loss(x: Tensor, x_hat: Tensor, *_: object) -> Tensor:
        return (x - x_hat).square().mean()

    return lambda x: package.train_sae(
        sae, [x], loss, optimizer, nb_epochs=1, clip_grad=1.0, monitoring=0, device=case.device
    )


def _stand_in_for_torchvision() -> None:
    """Overcomplete imports torchvision's transforms, and uses them for pictures only."""
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    vars(package)["transforms"] = transforms
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


def llamascopium(case: Case) -> Step:
    logging.disable(logging.INFO)
    package, saes = import_module("llamascopium"), import_module("llamascopium.models.sae")
    settings = package.SAEConfig(
        hook_point_in="x",
        hook_point_out="x",
        d_model=case.d_model,
        expansion_factor=case.dict_size / case.d_model,
        act_fn=case.kind,
        top_k=case.k,
        norm_activation="inference",
        dtype=torch.float32,
        device=case.device,
    )
    sae = saes.SparseAutoEncoder(settings)
    with torch.no_grad():  # as in DenseDictionary; its own initialiser reads a stream
        W = nn.functional.normalize(torch.randn(case.dict_size, case.d_model), dim=1)
        sae.W_E.copy_(W.T)
        sae.W_D.copy_(W)
        sae.b_E.zero_()
        sae.b_D.zero_()
    options = package.TrainerConfig(
        amp_dtype=torch.float32,
        lr=LR,
        lr_scheduler_name="constant",
        l1_coefficient=None,
        initial_k=case.k,
        k_warmup_steps=0,
        total_training_tokens=case.batch_size,
        n_checkpoints=0,
        skip_metrics_calculation=True,
        exp_result_path=tempfile.mkdtemp(),
    )
    trainer = package.Trainer(options)

    def step(x: Tensor) -> None:
        tokens = torch.zeros(len(x), dtype=torch.long, device=x.device)
        batch = {"x": x, "tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            trainer.fit(sae, [batch])
        options.from_pretrained_path = "."  # the next call keeps its optimiser
        trainer.total_training_steps += 1

    return step


STEPS: dict[str, Callable[[Case], Step]] = {
    "dense": dense,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
    "llamascopium": llamascopium,
    "sparsify": sparsify,
}


def main(arguments: list[str]) -> int:
    """Print the result as the last line, in JSON; libraries may print before it."""
    case = Case(**json.loads(arguments[0]))
    timed = measure(case)
    print(json.dumps({"version": timed.version, "seconds": timed.times.seconds}))
    return 0


def available(python: str, peers: list[str]) -> dict[str, str | None]:
    """{peer: its version, or None if it is not installed} in the environment of an interpreter.

    Raises UserError if the interpreter cannot be run or a peer is unknown.
    """
    for peer in peers:
        if peer not in PACKAGES:
            raise UserError(f"peers.names: {peer!r} is not one of {', '.join(PACKAGES)}.")
    code = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        "for name in sys.argv[1:]:\n    try:\n        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n        found[name] = None\nprint(json.dumps(found))"
    )
    names = [PACKAGES[peer] for peer in peers]
    try:
        done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"peers_python: {python} cannot be run ({error}). `make peers` makes .venv-peers.") from error
    return {peer: json.loads(done.stdout)[PACKAGES[peer]] for peer in peers}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
