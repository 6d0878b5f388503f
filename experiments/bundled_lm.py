"""Train the bundled language model and measure it on held-out documents."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.artifacts import Store, content_key
from core.data.bundled import BundledText
from core.metrics.language import by_tag, score_texts, total, trigram_bits_per_byte, xz_bits_per_byte
from core.models.pretrain import Pretraining, RowData, token_stream, train_tokenizer
from core.training import Checkpoints, TokenProgress, make_trainer


def run(cfg: DictConfig) -> dict[str, float]:
    """Tokenizer, training, export, and bits per byte on held-out documents beside `xz -9e` and a token trigram."""
    source, store = instantiate(cfg.data), Store(cfg.artifacts_dir)
    texts = (document.text for document in islice(source.documents("train", seed=1), cfg.lm.tokenizer_documents))
    tokenizer = train_tokenizer(texts, cfg.lm.architecture.vocab_size)
    tokens = token_stream(source, source.spec, tokenizer, "train", store)
    folder = Path(cfg.lm.export_dir or Path(cfg.cell_folder) / "model")
    train(cfg, tokens, len(tokenizer)).export(folder, tokenizer)
    metrics = heldout_metrics(cfg, folder, source, tokens)
    (folder / "README.md").write_text(card(cfg, source.card(), metrics))
    return metrics


def train(cfg: DictConfig, tokens: Any, vocab_size: int) -> Pretraining:
    """The Lightning run; goes on from the newest checkpoint of the same settings."""
    n_ctx, rows = cfg.lm.architecture.n_positions, cfg.lm.rows_per_step
    n_steps = cfg.lm.n_tokens // (n_ctx * rows)
    architecture = {**OmegaConf.to_container(cfg.lm.architecture, resolve=True), "vocab_size": vocab_size}
    module = Pretraining(architecture, n_steps, seed=cfg.seed, compile=cfg.lm.compile, **cfg.lm.optimiser)
    data = RowData(tokens, n_ctx, rows, cfg.seed)
    identity = {"lm": OmegaConf.to_container(cfg.lm, resolve=True), "tokens": len(tokens), "seed": cfg.seed}
    checkpoints = Checkpoints(Store(cfg.artifacts_dir).path("pretraining", identity), cfg.trainer.checkpoint_every_seconds)
    progress = TokenProgress("language model", n_steps * n_ctx * rows, n_ctx * rows, cfg.logging.quiet_seconds)
    name = f"{cfg.name}-{content_key(identity)}"
    trainer = make_trainer(cfg, Path(cfg.output_dir) / "logs", name, n_steps, [progress, checkpoints])
    trainer.fit(module, datamodule=data, ckpt_path=checkpoints.newest(), weights_only=False)
    return module


def heldout_metrics(cfg: DictConfig, folder: Path, source: BundledText, train_tokens: Any) -> dict[str, float]:
    """Bits per byte of the exported half-precision weights, read back, and of the baselines, on the same documents."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    documents = list(islice(source.documents("heldout", seed=0), cfg.lm.heldout_documents))
    texts, tags = [document.text for document in documents], [document.tag for document in documents]
    scores = score_texts(model, tokenizer, texts, model.config.n_positions, cfg.lm.stride, batch_rows=16)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    n_bytes = [len(text.encode()) for text in texts]
    trigram = trigram_bits_per_byte(train_tokens, len(tokenizer), ids, n_bytes, tokenizer.bos_token_id)
    xz = xz_bits_per_byte(texts)
    ours = total(scores).bits_per_byte
    return {
        "bits_per_byte": ours,
        "bits_per_byte_xz": xz,
        "bits_per_byte_trigram": trigram,
        "below_xz_fraction": 1 - ours / xz,
        "nats_per_token": total(scores).nats_per_token,
        **{f"bits_per_byte_{tag}": score.bits_per_byte for tag, score in by_tag(scores, tags).items()},
        "n_heldout_documents": len(texts),
        "n_heldout_bytes": sum(n_bytes),
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "n_train_tokens": cfg.lm.n_tokens,
        "weights_megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
    }


def card(cfg: DictConfig, corpus: dict[str, Any], metrics: dict[str, float]) -> str:
    """The README beside the weights."""
    m, a = metrics, cfg.lm.architecture
    train_mb = sum(size for group, size in corpus["bytes"].items() if group.startswith("train/")) / 1e6
    n_steps = cfg.lm.n_tokens // (a.n_positions * cfg.lm.rows_per_step)
    tags = "\n".join(
        f"| {name.removeprefix('bits_per_byte_')} documents | {value:.3f} |"
        for name, value in m.items()
        if name.startswith("bits_per_byte_") and not name.endswith(("_xz", "_trigram"))
    )
    return f"""# The bundled language model

A GPT-2-architecture causal language model, trained from scratch by this project on text that every Python
installation has. Made by `python run.py experiment=bundled_lm scale={cfg.scale} lm.export_dir=core/models/bundled`.

- **Size** {m["n_parameters"]:,.0f} parameters: {a.n_layer} layers, d_model {a.n_embd}, {a.n_head} heads, context {a.n_positions}
  tokens, byte-level BPE vocabulary of {a.vocab_size}; weights {m["weights_megabytes"]:.1f} MB in half precision.
- **Data** the harvested corpus (`core/data/harvest.py`, {cfg.data.mb_per_package} MB per package): {train_mb:.1f} MB of training text,
  {corpus["documents"]:,} documents, sha256 `{corpus["sha256"][:16]}`. Held-out documents are chosen by a hash of their file.
- **Training** {m["n_train_tokens"]:,.0f} tokens in {n_steps:,} steps of {cfg.lm.rows_per_step} x {a.n_positions}; Muon for the blocks' matrices, AdamW for the rest; seed {cfg.seed}.

| bits per byte on {m["n_heldout_documents"]:,.0f} held-out documents ({m["n_heldout_bytes"] / 1e6:.2f} MB) | |
|---|---|
| this model | {m["bits_per_byte"]:.3f} |
| `xz -9e` on the same documents joined | {m["bits_per_byte_xz"]:.3f} |
| token trigram (Witten-Bell) of the same training text | {m["bits_per_byte_trigram"]:.3f} |
{tags}

Each document is scored on its own, from its beginning, with windows of {a.n_positions} tokens that advance by {cfg.lm.stride}; the
weights are the shipped half-precision ones. The role tokens `<|user|>`, `<|assistant|>`, `<|end|>` are in the
vocabulary and untrained: the chat sibling uses them.
"""
