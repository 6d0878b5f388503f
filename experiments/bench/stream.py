"""Activations per second of a stream over those of a bare Hugging Face forward pass of the same layers.

The stream reads text, tokenises it, runs the model up to the site, shuffles and serves batches. The bare pass runs a
copy of the model cut off after the same layers, without hooks, on tokens in memory. Both process the same number of
rows, in turn, at the same batch size and dtype.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from core.bench import alternate, hardware, save_table, threads
from core.building import build, plain
from core.models.language_model import LanguageModel
from core.models.loading import SHIPPED
from core.models.sites import FAMILIES, parse_site
from core.streams.activations import ActivationStream
from core.text.rows import RowStream
from experiments.bench.settings import StreamSettings
from experiments.common import language_model

SETTINGS = StreamSettings

WHAT = {
    "bare": "bare forward pass of the same layers",
    "stream": "stream: text to shuffled batches",
    "rows": "text and tokenising alone",
}


def run(cfg: DictConfig) -> dict[str, float]:
    """Time whole fills of the shuffle buffer, the bare pass, and text with tokenising alone."""
    with threads(cfg.threads):
        lm = random_model(cfg) if cfg.random_architecture else language_model(cfg)
        stream, n_rows = open_stream(cfg, lm), cfg.stream.buffer_tokens // cfg.stream.n_ctx
        text = row_stream(cfg, lm)
        tokens = text.next_rows(n_rows).to(lm.device)
        bare = truncated(lm, cfg.stream.site)
        tasks = {
            "bare": lambda: forward(bare, tokens, cfg.stream.rows_per_forward),
            "stream": lambda: serve_one_fill(stream),
            "rows": lambda: text.next_rows(n_rows),
        }
        times = alternate(tasks, lm.device, cfg.repetitions, cfg.warmup, wall=True)
        note = hardware(lm.device, torch.get_num_threads())
    ratio = times.ratio("bare", "stream")  # of rates: the inverse of the ratio of times
    print(f"stream over bare forward: {ratio}", file=sys.stderr)
    n = cfg.stream.buffer_tokens
    lines = [{"what": WHAT[task], "activations/s": n / times.median(task), "s": times.median(task)} for task in tasks]
    layers = f"{lm.name}, {cfg.stream.site}, {str(lm.dtype).removeprefix('torch.')}"
    sizes = f"{n:,} tokens a fill, rows of {cfg.stream.n_ctx}, {cfg.stream.rows_per_forward} rows a pass"
    notes = [f"stream over bare forward: {ratio}, {cfg.repetitions} fills", note, f"{layers}, {sizes}"]
    save_table(Path(cfg.cell_folder), lines, notes)
    return {
        "stream_over_bare_forward": ratio.value,
        "stream_over_bare_forward_quartile1": ratio.low,
        "stream_over_bare_forward_quartile3": ratio.high,
        "rows_over_bare_forward_seconds": times.ratio("rows", "bare").value,
        "stream_activations_per_second": n / times.median("stream"),
        "bare_activations_per_second": n / times.median("bare"),
    }


def random_model(cfg: DictConfig) -> LanguageModel:
    """A GPT-2 of `random_architecture` with random weights and the bundled tokenizer, which do not affect speed."""
    torch.manual_seed(cfg.seed)
    config = GPT2Config(**plain(cfg.random_architecture), attn_implementation=cfg.model.attn_implementation)
    model = GPT2LMHeadModel(config).to(getattr(torch, cfg.model.dtype))
    if cfg.model.device != "cpu" and torch.cuda.is_available():
        model = model.to("cuda" if cfg.model.device == "auto" else cfg.model.device)
    return LanguageModel(model, AutoTokenizer.from_pretrained(SHIPPED["bundled"]), "random GPT-2")


def row_stream(cfg: DictConfig, lm: LanguageModel) -> RowStream:
    s = cfg.stream
    return RowStream(build(cfg.data), lm.tokenizer, "train", cfg.seed, s.n_ctx, s.packing, s.max_document_tokens)


def open_stream(cfg: DictConfig, lm: LanguageModel) -> ActivationStream:
    s = cfg.stream
    dtype = getattr(torch, s.buffer_dtype)
    return ActivationStream(
        lm, s.site, row_stream(cfg, lm), s.batch_size, s.buffer_tokens, s.rows_per_forward, cfg.seed, dtype
    )


def truncated(lm: LanguageModel, site: str) -> nn.Module:
    """A copy of the model, without its head, that ends with the last block that the site needs."""
    kind, layer = parse_site(site, lm.n_layers)
    n_blocks = layer if kind == "resid_pre" else layer + 1
    model = copy.deepcopy(lm.model)
    parent, _, name = FAMILIES[lm.family].blocks.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, name, nn.ModuleList(list(getattr(module, name))[:n_blocks]))
    model.config.num_hidden_layers = n_blocks
    base: nn.Module = model.base_model
    return base


@torch.no_grad()
def forward(model: nn.Module, tokens: Tensor, rows_per_forward: int) -> None:
    """Compute hidden states of rows `[R, T]`, a few rows at a time."""
    for rows in tokens.split(rows_per_forward):
        model(input_ids=rows, use_cache=False)


def serve_one_fill(stream: ActivationStream) -> None:
    for _ in range(stream.batches_per_fill):
        next(stream)
