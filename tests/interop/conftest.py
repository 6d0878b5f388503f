"""Random dictionaries of every method, rows to score them on, and the environment of the other libraries."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from core.methods.base import DictionaryMethod

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
D, M, K = 24, 80, 6


@pytest.fixture(scope="session")
def rows() -> Tensor:
    """`[200, d]`; every coordinate has its own mean, and a row's standard deviation is about 6."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(200, D, generator=g) * 5 + torch.linspace(-6, 6, D)


@pytest.fixture(scope="session")
def dictionary(rows: Tensor) -> Callable[..., DictionaryMethod]:
    """Builds the method of a YAML with random weights that suit the scale of its normalised inputs."""

    def build(name: str, **changes: Any) -> DictionaryMethod:
        node = {"seed": 0, "model": {"d_model": D}, "method": OmegaConf.load(ROOT / f"conf/method/{name}.yaml")}
        options = OmegaConf.to_container(OmegaConf.create(node), resolve=True)["method"]
        method = instantiate(options | {"dict_size": M} | ({"k": K} if "k" in options else {}) | changes)
        g = torch.Generator().manual_seed(0)
        method.norm.fit(rows)
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=g) / 5)
            if hasattr(method, "threshold_ema"):
                method.threshold.fill_(0.7)
        return method.eval()

    return build


@pytest.fixture(scope="session")
def in_peers() -> Callable[[str, dict[str, Any]], None]:
    """Runs a script in the environment with the other libraries, with `arguments` as JSON in its first argument."""

    def run(script: str, arguments: dict[str, Any]) -> None:
        python = str(PEERS) if PEERS.is_file() else sys.executable
        quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        command = [python, "-c", script, json.dumps(arguments, default=str)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
        if "ModuleNotFoundError" in done.stderr:
            pytest.skip(f"{python}: {done.stderr.strip().splitlines()[-1]} (`make peers` makes .venv-peers)")
        assert done.returncode == 0, done.stderr[-3000:]

    return run
