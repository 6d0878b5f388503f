"""What stacking runs gains: R runs at once against one by one, for each panel of O'Neill et al.

A third variant runs them one by one as one would first write them: `torch.nn` layers, autograd, plain
`torch.optim.Adam`. All have one thread, are timed in turn, and count CPU time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from core.bench import Task, alternate, hardware, save_table, threads
from core.errors import UserError
from core.stacked.adam import stepper
from core.stacked.coders import Coder, LinearCoder, LogCodes, MLPCoder
from core.stacked.objectives import Reconstruction, normalise_, random_dictionary
from core.synthetic.sparse_codes import SparseCodeLaw
from experiments.bench.settings import StackedSettings

SETTINGS = StackedSettings

CPU = torch.device("cpu")


def run(cfg: DictConfig) -> dict[str, float]:
    """`<panel>_speedup` (over one by one) and `<panel>_speedup_over_autograd`; milliseconds of a run's step."""
    with threads(cfg.threads):
        rows = [measure(cfg, name, panel) for name, panel in cfg.panels.items()]
    notes = [hardware(CPU, cfg.threads), f"{cfg.steps} steps in a task, medians of {cfg.repetitions}, CPU time"]
    save_table(Path(cfg.cell_folder), rows, notes)
    metrics = {}
    for row in rows:
        metrics[f"{row['panel']}_speedup"] = row["over one by one"]
        metrics[f"{row['panel']}_speedup_over_autograd"] = row["over autograd"]
        metrics[f"{row['panel']}_ms_per_run_step"] = row["ms per step of a run"]
    return metrics


def measure(cfg: DictConfig, name: str, panel: Mapping[str, Any]) -> dict[str, Any]:
    """One panel's runs: stacked, one by one, and one by one under autograd."""
    R, N, M = panel["runs"], panel["N"], panel["M"]
    p = SparseCodeLaw(N, M, panel["K"]).draw(cfg.n_train, 1, cfg.seed)
    X = p.X_train.expand(R, -1, -1).contiguous()
    stack = steps_of(panel, X, list(range(R)), cfg.steps)
    alone = [steps_of(panel, X[:1], [seed], cfg.steps) for seed in range(R)]
    plain = [autograd_steps(panel, p.X_train, seed, cfg.steps) for seed in range(R)]
    tasks: dict[str, Task] = {
        "stacked": stack,
        "one by one": lambda: [task() for task in alone],
        "autograd": lambda: [task() for task in plain],
    }
    times = alternate(tasks, CPU, cfg.repetitions, cfg.warmup)
    ours, theirs = times.ratio("one by one", "stacked"), times.ratio("autograd", "stacked")
    print(f"{name}: {ours} times as fast as one by one, {theirs} as autograd", file=sys.stderr)
    return {
        "panel": name,
        "coder": panel["coder"] + (str(panel["width"]) if panel.get("width") else ""),
        "N": N,
        "M": M,
        "runs": R,
        "ms per step of a run": 1000 * times.median("stacked") / (R * cfg.steps),
        "over one by one": ours.value,
        "quartile 1": ours.low,
        "quartile 3": ours.high,
        "over autograd": theirs.value,
    }


def steps_of(panel: Mapping[str, Any], X: Tensor, seeds: list[int], n_steps: int) -> Callable[[], None]:
    """`n_steps` steps of a stack, as `core.stacked.runs` takes them."""
    coder = coder_of(panel, seeds, X.shape[1])
    D = random_dictionary(seeds, panel["N"], panel["M"])
    objective = Reconstruction(X, torch.full((len(seeds),), 0.01), D, learn_D=True)
    update = stepper(torch.optim.Adam([*coder.parameters(), *objective.parameters()], lr=1e-3, fused=True))

    def task() -> None:
        with torch.no_grad():
            for step in range(n_steps):
                objective.gradients(coder, step)
                update()

    return task


def coder_of(panel: Mapping[str, Any], seeds: list[int], n: int) -> Coder:
    N, M = panel["N"], panel["M"]
    if panel["coder"] == "sae":
        return LinearCoder(seeds, M, N)
    if panel["coder"] == "mlp":
        return MLPCoder(seeds, M, N, panel["width"])
    if panel["coder"] == "sc":
        return LogCodes(seeds, M, N, n)
    raise UserError(f"panels.*.coder={panel['coder']!r} is none of sae, mlp, sc.")


def autograd_steps(panel: Mapping[str, Any], X: Tensor, seed: int, n_steps: int) -> Callable[[], None]:
    """The same steps of one run, written plainly."""
    N, M = panel["N"], panel["M"]
    D = nn.Parameter(random_dictionary([seed], N, M)[0].clone())
    if panel["coder"] == "sae":
        net: nn.Module = nn.Sequential(nn.Linear(M, N, bias=False), nn.ReLU())
    elif panel["coder"] == "mlp":
        h = panel["width"]
        net = nn.Sequential(nn.Linear(M, h, bias=False), nn.ReLU(), nn.Linear(h, N, bias=False), nn.ReLU())
    else:
        net = nn.ParameterList([nn.Parameter(torch.full((len(X), N), -10.0))])
    adam = torch.optim.Adam([*net.parameters(), D], lr=1e-3)

    def task() -> None:
        for _ in range(n_steps):
            adam.zero_grad()
            normalise_(D)
            S = net[0].exp() if isinstance(net, nn.ParameterList) else net(X)
            loss = (S @ D - X).square().mean() + 0.01 * S.abs().mean()
            loss.backward()
            adam.step()

    return task
