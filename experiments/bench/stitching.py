"""The time to score every latent of a large dictionary against a small one, over that of the encoder products in it.

`score_latents` and the two bare products x W_enc^T run on the same rows in turn. Codes are as sparse as those of the
family that Leask et al. stitch; a second case has half of all latents active, which needs a dense product to score.
Weights are random: the time depends on sizes and sparsity only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from core.analysis.stitching import nearest, score_latents
from core.bench import Clock, PeakMemory, alternate, hardware, save_table, threads
from core.methods.pretrained import Pretrained
from core.runtime import resolve_device
from core.seeding import generator
from experiments.bench.settings import StitchingSettings

SETTINGS = StitchingSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """`stitching_over_products_m<large>` with quartiles, the same with dense codes, and the peak memory beyond weights
    and rows, as a share of what the codes of all rows `[n_rows, n + m]` would take."""
    device = resolve_device(cfg.trainer.accelerator)
    with threads(cfg.threads):
        batches = list(rows(cfg, device).split(cfg.rows_per_batch))
        small, large = (dictionary(cfg, size, cfg.l0, device) for size in (cfg.small, cfg.large))
        tasks = {
            "scores": lambda: score_latents(small, large, batches),
            "products": lambda: products(small, large, batches),
        }
        times = alternate(tasks, device, cfg.repetitions, cfg.warmup)
        cosines = Clock(device)
        nearest(small, large)
        seconds_nearest = cosines.seconds()
        peak = PeakMemory(device)
        peak.restart()
        score_latents(small, large, batches)
        extra = peak.extra()
        dense_small, dense_large = (dictionary(cfg, size, size / 2, device) for size in (cfg.small, cfg.large))
        few = batches[: max(1, len(batches) // 4)]
        dense = alternate(
            {
                "scores": lambda: score_latents(dense_small, dense_large, few),
                "products": lambda: products(dense_small, dense_large, few),
            },
            device,
            cfg.repetitions,
            cfg.warmup,
        )
        note = hardware(device, torch.get_num_threads())
    ratio, dense_ratio = times.ratio("scores", "products"), dense.ratio("scores", "products")
    name = f"m{cfg.large}"
    print(f"scores over encoder products: {ratio}; with dense codes {dense_ratio}", file=sys.stderr)
    whole = 4 * cfg.n_rows * (cfg.small + cfg.large)
    table = [
        {"what": what, "s": seconds, "rows": n}
        for what, seconds, n in (
            ("scores of all latents", times.median("scores"), cfg.n_rows),
            ("encoder products", times.median("products"), cfg.n_rows),
            ("scores, half of the latents active", dense.median("scores"), sum(map(len, few))),
            ("encoder products", dense.median("products"), sum(map(len, few))),
            ("largest cosines (once, whatever the rows)", seconds_nearest, 0),
        )
    ]
    sizes = f"{cfg.small:,} and {cfg.large:,} latents, d {cfg.d_model}, L0 {cfg.l0}, {cfg.rows_per_batch} rows a batch"
    save_table(Path(cfg.cell_folder), table, [note, sizes, f"peak memory: {extra / 1e6:,.0f} MB"])
    return {
        f"stitching_over_products_{name}": ratio.value,
        f"stitching_over_products_{name}_quartile1": ratio.low,
        f"stitching_over_products_{name}_quartile3": ratio.high,
        f"stitching_dense_over_products_{name}": dense_ratio.value,
        "stitching_rows_per_second": cfg.n_rows / times.median("scores"),
        "peak_extra_gb": extra / 1e9,
        "peak_extra_over_codes_of_all_rows": extra / whole,
    }


def rows(cfg: DictConfig, device: torch.device) -> Tensor:
    """`[n_rows, d]`, Gaussian."""
    return torch.randn(cfg.n_rows, cfg.d_model, generator=generator(cfg.seed, "rows")).to(device)


def dictionary(cfg: DictConfig, dict_size: int, l0: float, device: torch.device) -> Pretrained:
    """A ReLU dictionary with random unit rows, whose bias lets `l0` latents fire in a Gaussian row on average."""
    g = generator(cfg.seed, "dictionary", dict_size)
    W = torch.nn.functional.normalize(torch.randn(dict_size, cfg.d_model, generator=g), dim=1)
    bias = -torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - l0 / dict_size, dtype=torch.float64)).float()
    b_enc, b_dec = bias.expand(dict_size), torch.zeros(cfg.d_model)
    return Pretrained.of(W, W, b_enc, b_dec, activation="relu", subtract_b_dec=True).to(device)


@torch.no_grad()
def products(small: Pretrained, large: Pretrained, batches: list[Tensor]) -> None:
    """x W_enc^T of both dictionaries into buffers that are reused."""
    longest = max(map(len, batches))
    buffers = [batches[0].new_empty(longest, method.dict_size) for method in (small, large)]
    for x in batches:
        for method, buffer in zip((small, large), buffers, strict=True):
            torch.mm(x, method.W_enc.T, out=buffer[: len(x)])
