"""Several ranks train the dictionary that one process trains on the joined batches."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from core import distributed, fleet
from core.artifacts import Store
from core.data.batch import Batch
from core.errors import NonFiniteLoss, UserError
from core.fleet import KIND, Request, load_or_train, train_together
from core.kernels import reference, sparse
from core.kernels.across import mask_of_batchtopk
from core.methods.saved import load_dictionary
from core.workers import Task, run_tasks

COMMON = {
    "d_model": 32, "dict_size": 64, "lr": 1e-3, "betas": [0.9, 0.99], "input_norm": "token_std", "seed": 0,
    "decoder_norm": "before_step", "dead_after_tokens": 256, "grad_clip": 0.5, "warmup_steps": 4, "decay_fraction": 0.5,
}  # fmt: skip
K_SPARSE = {"k": 4, "use_enc_bias": True, "aux": "r1", "aux_coefficient": 1 / 32, "k_aux": 16, "path": "auto"}
TOPK = {"_target_": "core.methods.topk.TopK", **K_SPARSE, **COMMON}
BATCHTOPK = {
    "_target_": "core.methods.batchtopk.BatchTopK", "threshold_rule": "posthoc_mean", "threshold_ema_rate": 0.1,
    **K_SPARSE, **COMMON,
}  # fmt: skip
JUMPRELU = {
    "_target_": "core.methods.jumprelu.JumpReLU", "l0_coefficient": 0.01, "l0_warmup_steps": 0, "bandwidth": 0.1,
    "ste": "correct", "initial_threshold": 1.0, "subtract_b_dec": False, "lr_threshold": 0.01, "path": "auto", **COMMON,
}  # fmt: skip
RELU_L1 = {
    "_target_": "core.methods.relu_l1.ReluL1", "l1_coefficient": 0.01, "l1_warmup_steps": 0,
    "b_dec_init": "geometric_median", "path": "auto", **COMMON,
}  # fmt: skip
METHODS = {
    "topk": TOPK,
    "topk, auxk normalized": {**TOPK, "aux": "normalized", "decoder_norm": "after_step"},
    "batchtopk": BATCHTOPK,
    "batchtopk, dense": {**BATCHTOPK, "path": "dense", "threshold_rule": "ema", "aux": "r2_compat"},
    "batchtopk, scalar norm": {**BATCHTOPK, "input_norm": "scalar", "aux": "normalized"},
    "jumprelu": JUMPRELU,
    "relu_l1": RELU_L1,
    "relu_l1, dense, scalar norm": {**RELU_L1, "path": "dense", "input_norm": "scalar"},
}
STREAM = {
    "site": "resid_pre.1", "n_tokens": 1536, "n_ctx": 16, "packing": "concat", "max_document_tokens": 64,
    "batch_size": 64, "buffer_tokens": 512, "buffer_dtype": "float32", "rows_per_forward": 8, "batches_per_chunk": 4,
    "calibration_batches": 3,
}  # fmt: skip


@pytest.fixture
def setting(tmp_path: Path, tiny_model: dict[str, Any], words: Any):
    """(configuration for a store of its own, request maker)."""
    text = tmp_path / "words.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in words.texts))
    data = {"_target_": "core.data.local.LocalText", "path": str(text)}

    def cfg(name: str) -> DictConfig:
        return OmegaConf.create({
            "name": name, "artifacts_dir": str(tmp_path / name), "output_dir": str(tmp_path / "outputs"),
            "trainer": {
                "accelerator": "cpu", "precision": "32-true", "checkpoint_every_seconds": 0, "processes": "auto",
            },
            "logging": {"logger": "none", "quiet_seconds": 1000, "log_every_steps": 50},
        })  # fmt: skip

    def request(method: dict[str, Any], devices: int, **stream: Any) -> Request:
        return Request(method, {**STREAM, **stream}, tiny_model, data, "32-true", 0, devices)

    return cfg, request


def weights(request: Request, cfg: DictConfig) -> dict[str, Tensor]:
    return load_dictionary(Store(cfg.artifacts_dir).path(KIND, request.spec)).state_dict()


class JoinedStream:
    """The ranks' batches one after the other, as one batch."""

    def __init__(self, request: Request) -> None:
        self.streams = [fleet.open_stream(request, rank) for rank in range(request.devices)]
        self.device = self.streams[0].device

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return Batch(torch.cat([next(stream).x for stream in self.streams]))

    def state_dict(self) -> dict[str, Any]:
        return {}


def train_joined(requests: list[Request], cfg: DictConfig) -> None:
    """In this process, on the global batches of several ranks."""
    methods, _ = fleet._build(requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet, "training_stream", lambda request, cfg: JoinedStream(request))
        fleet._train(requests, methods, Store(cfg.artifacts_dir), cfg)


@pytest.mark.parametrize("n", [2, 3])
def test_ranks_train_what_one_process_trains_on_the_same_global_batches(setting, n):
    cfg, request = setting
    sizes = {"batch_size": 32 * n, "buffer_tokens": 256 * n, "n_tokens": 768 * n}
    requests = [request(method, n, **sizes) for method in METHODS.values()]
    assert train_together(requests, cfg("ranks")) == {}
    train_joined(requests, cfg("joined"))
    for name, one in zip(METHODS, requests, strict=True):
        a, b = weights(one, cfg("ranks")), weights(one, cfg("joined"))
        assert a.keys() == b.keys()
        for part in a:
            if part == "tokens_since_fired":
                assert torch.equal(a[part], b[part]), name
            torch.testing.assert_close(a[part], b[part], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}, {part}: {m}")
