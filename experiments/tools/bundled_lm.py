"""Train the bundled language model and measure it on held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.artifacts import Store, content_key
from core.atomic import files_atomically, note_outside, write_atomically
from core.building import build, plain
from core.errors import UserError
from core.metrics.language import Trigram, by_tag, score_texts, total, xz_bits_per_byte
from core.models.pretrain import Pretraining, RowData, token_stream, train_tokenizer
from core.runtime import Runtime
from core.text.bundled import BundledText
from core.text.harvest import TAGS
from core.text.tokenizing import bos_token_id, token_ids
from core.training import Work, fit
from experiments.tools.settings import BundledLMSettings

SETTINGS = BundledLMSettings


def run(cfg: DictConfig) -> dict[str, float]:
    """Tokenizer, training, export, and bits per byte on held-out documents beside `xz -9e` and a token trigram."""
    source, store = build(cfg.data), Store(cfg.artifacts_dir)
    texts = (document.text for document in islice(source.documents("train", seed=1), cfg.lm.tokenizer_documents))
    tokenizer = train_tokenizer(texts, cfg.lm.architecture.vocab_size)
    tokens = token_stream(source, source.spec, tokenizer, "train", store)
    folder = Path(cfg.lm.export_dir or Path(cfg.cell_folder) / "model")
    trained = train(cfg, source, tokens, len(tokenizer))
    with files_atomically(folder) as scratch:
        trained.export(scratch, tokenizer)
    metrics = heldout_metrics(cfg, folder, source, tokens)
    write_atomically(folder / "README.md", card(cfg, source.card(), metrics))
    note_outside(file for file in folder.iterdir() if file.is_file())
    return metrics


def train(cfg: DictConfig, source: BundledText, tokens: Any, vocab_size: int) -> Pretraining:
    """Train with Lightning; resumes from the newest checkpoint of the same settings."""
    n_ctx, rows = cfg.lm.architecture.n_positions, cfg.lm.rows_per_step
    n_steps = cfg.lm.n_tokens // (n_ctx * rows)
    architecture = {**cfg.lm.architecture, "vocab_size": vocab_size}
    module = Pretraining(architecture, n_steps, seed=cfg.seed, compile=cfg.lm.compile, **cfg.lm.optimiser)
    data = RowData(tokens, n_ctx, rows, cfg.seed)
    decisive = {name: plain(cfg.lm[name]) for name in ("architecture", "optimiser", "rows_per_step", "n_tokens")}
    identity = {**decisive, "corpus": source.spec, "tokens": len(tokens), "seed": cfg.seed}
    work = Work("language model", n_steps * n_ctx * rows, n_ctx * rows)
    checkpoints = Store(cfg.artifacts_dir).path("pretraining", identity)
    fit(Runtime.of(cfg), module, data, n_steps, f"{cfg.name}-{content_key(identity)}", work, checkpoints)
    return module


def heldout_metrics(cfg: DictConfig, folder: Path, source: BundledText, train_tokens: Any) -> dict[str, float]:
    """Bits per byte of the exported half-precision weights, as read back, and of the baselines, on the same documents.

    The main figures are on the corpus that experiments use; `_with_repetitive` is on all held-out documents.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    documents = list(islice(source.documents("heldout", seed=0), cfg.lm.heldout_documents))
    texts = [document.text for document in documents]
    n_ctx, special = model.config.n_positions, source.special_tokens
    scores = score_texts(model, tokenizer, texts, n_ctx, cfg.lm.stride, batch_rows=16, special_tokens=special)
    trigram = Trigram(train_tokens, len(tokenizer))
    usual = {
        document.text
        for document in BundledText(source.mb_per_package, False, source.store.root).documents("heldout", 0)
    }
    kept = [index for index, text in enumerate(texts) if text in usual]
    if not kept:
        raise UserError("data.mb_per_package: no document of this corpus is held out to score on; raise it.")

    def compared(chosen: Sequence[int]) -> dict[str, float]:
        part = [texts[i] for i in chosen]
        ids = token_ids(tokenizer, part, source.special_tokens)
        baseline = trigram.score(ids, [scores[i].n_bytes for i in chosen], bos_token_id(tokenizer))
        ours, xz = total([scores[i] for i in chosen]).bits_per_byte, xz_bits_per_byte(part)
        return {
            "bits_per_byte": ours,
            "bits_per_byte_xz": xz,
            "bits_per_byte_trigram": total(baseline).bits_per_byte,
            "below_xz_fraction": 1 - ours / xz,
            "n_heldout_documents": len(part),
            "n_heldout_bytes": sum(scores[i].n_bytes for i in chosen),
        }

    tags = by_tag([scores[i] for i in kept], [documents[i].tag for i in kept])
    return {
        **compared(kept),
        **{f"{name}_with_repetitive": value for name, value in compared(range(len(texts))).items()},
        **{f"bits_per_byte_{tag}": score.bits_per_byte for tag, score in tags.items()},
        "nats_per_token": total([scores[i] for i in kept]).nats_per_token,
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "n_train_tokens": cfg.lm.n_tokens,
        "text_passes": max(1.0, cfg.lm.n_tokens / len(train_tokens)),
        "weights_megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
    }


def card(cfg: DictConfig, corpus: dict[str, Any], metrics: dict[str, float]) -> str:
    """The README beside the weights."""
    m, a = metrics, cfg.lm.architecture
    train_mb = sum(size for group, size in corpus["bytes"].items() if group.startswith("train/")) / 1e6
    n_steps = cfg.lm.n_tokens // (a.n_positions * cfg.lm.rows_per_step)
    what = {
        "": "this model",
        "_xz": "`xz -9e` on the same documents, joined",
        "_trigram": "token trigram (Witten-Bell)",
    }
    columns = ("", "_with_repetitive")
    table = [[f"{m[f'bits_per_byte{who}{part}']:.3f}" for part in columns] for who in what]
    sizes = [f"{m['n_heldout_documents' + p]:,.0f}, {m['n_heldout_bytes' + p] / 1e6:.2f} MB" for p in columns]
    rows = "\n".join(f"| {name} | {' | '.join(row)} |" for name, row in zip(what.values(), table, strict=True))
    tags = ", ".join(f"{tag} {m[f'bits_per_byte_{tag}']:.3f}" for tag in TAGS if f"bits_per_byte_{tag}" in m)
    return f"""# The bundled language model

A GPT-2-architecture causal language model, trained from scratch by this project on text that every Python
installation has. Made by `python run.py experiment=bundled_lm scale={cfg.scale} lm.export_dir=core/models/bundled`.

- **Size** {m["n_parameters"]:,.0f} parameters: {a.n_layer} layers, d_model {a.n_embd}, {a.n_head} heads, context
  {a.n_positions}, byte-level BPE vocabulary of {a.vocab_size}; {m["weights_megabytes"]:.1f} MB in half precision.
- **Data** the harvested corpus (`core/text/harvest.py`, at most {cfg.data.mb_per_package} MB of files per package):
  {train_mb:.1f} MB of training text, {corpus["documents"]:,} documents in all, sha256 `{corpus["sha256"][:16]}`.
- **Training** {m["n_train_tokens"]:,.0f} tokens, {n_steps:,} steps of {cfg.lm.rows_per_step} x {a.n_positions}; Muon
  for the matrices inside the blocks, AdamW for the rest; seed {cfg.seed}.

| held-out bits per byte | documents ({sizes[0]}) | with repetitive ones ({sizes[1]}) |
|---|---|---|
{rows}

By kind of document: {tags}. Repetitive documents are those that deflate shrinks to under a fifth (generated tables,
copied code): experiments do not use them; the training did. A hash of its file decides whether a document is held out.

Each document is scored on its own, from its beginning, with windows of {a.n_positions} tokens that advance by
{cfg.lm.stride}; the weights are the shipped ones. The role tokens `<|user|>`, `<|assistant|>`, `<|end|>` are in the
vocabulary but untrained: they are for a chat-tuned sibling.
"""
