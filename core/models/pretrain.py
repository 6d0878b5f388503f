"""Train a small GPT-2-architecture language model from scratch: tokenizer, token rows, Lightning module.

Shapes: B rows in a step, T = n_ctx tokens in a row, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from core.artifacts import Store
from core.errors import UserError
from core.seeding import generator
from core.text.documents import Split, TextSource
from core.text.tokenizing import bos_token_id, token_ids

END_OF_TEXT = "<|endoftext|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")  # not used by the base model, only by its chat sibling


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text in any script encodes without unknown tokens and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        additional_special_tokens=list(ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
    )


def token_stream(
    source: TextSource, source_spec: dict[str, Any], tokenizer: PreTrainedTokenizerFast, split: Split, store: Store
) -> np.ndarray:
    """All documents of a split as one array of token ids (uint16). Each document starts with end-of-text. Cached."""
    if len(tokenizer) > 2**16:
        raise UserError(f"lm.vocab_size: {len(tokenizer)} token ids do not fit into 16 bits.")

    def make(folder: Path) -> None:
        texts = [document.text for document in source.documents(split, seed=0)]
        pieces: list[int] = []
        for start in range(0, len(texts), 256):
            for ids in token_ids(tokenizer, texts[start : start + 256], source.special_tokens):
                pieces.append(bos_token_id(tokenizer))
                pieces.extend(ids)
        np.save(folder / "tokens.npy", np.asarray(pieces, dtype=np.uint16))

    spec = {"source": source_spec, "tokenizer": tokenizer.backend_tokenizer.to_str(), "split": split}
    return np.load(store.get_or_make("tokens", spec, make) / "tokens.npy", mmap_mode="r")


class RowBatches:
    """Batches `[B, T]` of rows cut from a token stream, in a new random order every epoch, starting at any step.

    Row boundaries shift by a random offset every epoch. The batch of a step does not depend on the first step.
    """

    def __init__(self, tokens: np.ndarray, n_ctx: int, rows_per_step: int, seed: int, first_step: int = 0) -> None:
        self.tokens, self.n_ctx, self.rows_per_step, self.seed = tokens, n_ctx, rows_per_step, seed
        self.first_step = first_step
        self.steps_per_epoch = ((len(tokens) - n_ctx) // n_ctx) // rows_per_step
        if self.steps_per_epoch < 1:
            raise UserError(f"The corpus has {len(tokens)} tokens, too few for a step of {rows_per_step} x {n_ctx}.")

    def __iter__(self) -> Iterator[Tensor]:
        step = self.first_step
        while True:
            epoch, within = divmod(step, self.steps_per_epoch)
            g = generator(self.seed, "rows", epoch)
            offset = int(torch.randint(self.n_ctx, (), generator=g))
            order = torch.randperm(self.steps_per_epoch * self.rows_per_step, generator=g)
            for batch in order.view(self.steps_per_epoch, self.rows_per_step)[within:]:
                starts = (offset + batch * self.n_ctx).tolist()
                rows = np.stack([self.tokens[start : start + self.n_ctx] for start in starts])
                yield torch.from_numpy(rows.astype(np.int64))
                step += 1


class Pretraining(pl.LightningModule):
    """Next-token training: Muon for the matrices inside the blocks, AdamW for the rest.

    The learning rates rise over `warmup_steps`, stay constant, and fall linearly to zero over the last
    `decay_fraction` of the steps.
    """

    def __init__(
        self,
        lm_config: dict[str, Any],
        n_steps: int,
        lr_muon: float,
        lr_adam: float,
        weight_decay: float,
        warmup_steps: int,
        decay_fraction: float,
        seed: int,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.n_steps, self.warmup_steps, self.decay_fraction = n_steps, warmup_steps, decay_fraction
        self.lr_muon, self.lr_adam, self.weight_decay = lr_muon, lr_adam, weight_decay
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "init").initial_seed())
            self.lm = AutoModelForCausalLM.from_config(GPT2Config(**lm_config), attn_implementation="sdpa")
        # In a list, the compiled forward is not a submodule, so checkpoints hold only the plain model.
        self._forward = [torch.compile(self.lm.forward) if compile else self.lm.forward]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        inner = [p for p in self.lm.transformer.h.parameters() if p.ndim == 2]
        inner_ids = {id(p) for p in inner}
        rest = [p for p in self.lm.parameters() if id(p) not in inner_ids]
        return [
            torch.optim.Muon(inner, lr=self.lr_muon, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=self.lr_adam, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]

    def schedule(self, step: int) -> float:
        """The factor on the learning rates at an optimiser step."""
        decay = (self.n_steps - step) / max(1.0, self.decay_fraction * self.n_steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), max(0.0, decay))

    def training_step(self, rows: Tensor, batch_idx: int) -> None:  # rows [B, T]
        logits = self._forward[0](input_ids=rows).logits  # [B, T, V]
        self.take_step(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten()), batch_idx)

    def take_step(self, loss: Tensor, batch_idx: int) -> None:
        """One optimiser step, at the learning rates of the schedule."""
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
        factor = self.schedule(batch_idx)
        optimizers = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizers, list)
        for optimizer, lr in zip(optimizers, (self.lr_muon, self.lr_adam), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss.detach(), prog_bar=True)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the Hugging Face folder: config.json, model.safetensors (half precision), tokenizer.json."""
        folder.mkdir(parents=True, exist_ok=True)
        half = AutoModelForCausalLM.from_config(self.lm.config, dtype=torch.float16)
        half.load_state_dict(self.lm.state_dict())
        half.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class RowData(pl.LightningDataModule):
    """`RowBatches` from the current step of the training on."""

    def __init__(self, tokens: np.ndarray, n_ctx: int, rows_per_step: int, seed: int) -> None:
        super().__init__()
        self.tokens, self.n_ctx, self.rows_per_step, self.seed = tokens, n_ctx, rows_per_step, seed

    def train_dataloader(self) -> RowBatches:
        assert self.trainer is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return RowBatches(self.tokens, self.n_ctx, self.rows_per_step, self.seed, done)
