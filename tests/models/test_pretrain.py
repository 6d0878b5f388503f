from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from core.models.pretrain import Pretraining, RowBatches, RowData, train_tokenizer
from core.training import Checkpoints

TEXTS = ["def f(x):\n    return x + 1\n", "the cat sat on the mat " * 5, "naïve café — 你好 🙂"]
CONFIG = {
    "vocab_size": 64,
    "n_positions": 8,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@given(st.text(max_size=80))
def test_any_text_survives_the_tokenizer(text: str):
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_the_role_tokens_are_single_tokens_and_end_of_text_is_first():
    tokenizer = small_tokenizer()
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert [tokenizer.encode(t) for t in ("<|user|>", "<|assistant|>", "<|end|>")] == [[1], [2], [3]]


def test_rows_from_a_later_step_on_are_the_same_as_in_the_whole_run():
    tokens = np.arange(1000, dtype=np.uint16)
    whole = [b for b, _ in zip(RowBatches(tokens, 8, 4, seed=1), range(80), strict=False)]
    later = [b for b, _ in zip(RowBatches(tokens, 8, 4, seed=1, first_step=33), range(47), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(whole[33:], later, strict=True))


def test_an_epoch_has_every_row_once():
    tokens = np.arange(8 * 12 + 8, dtype=np.uint16)
    rows = RowBatches(tokens, 8, 4, seed=0)
    seen = torch.cat([b for b, _ in zip(rows, range(rows.steps_per_epoch), strict=False)])
    assert len(set(seen[:, 0].tolist())) == len(seen) == 12
    assert torch.equal(seen - seen[:, :1], torch.arange(8).expand(12, 8))


def test_a_corpus_too_small_for_a_step_is_refused():
    with pytest.raises(ValueError, match="too few"):
        RowBatches(np.arange(20, dtype=np.uint16), 8, 4, seed=0)


def fit(folder: Path, n_steps: int, stop_after: int | None = None) -> Pretraining:
    tokens = np.random.default_rng(0).integers(0, 64, 4000).astype(np.uint16)
    module = Pretraining(CONFIG, n_steps, 1e-2, 1e-2, 0.1, 2, 0.3, seed=0)
    checkpoints = Checkpoints(folder, every_seconds=1e-9)

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == stop_after:
                raise KeyboardInterrupt

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=n_steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[checkpoints, Stop()],
    )  # fmt: skip
    try:
        checkpoints.fit(trainer, module, RowData(tokens, 8, 4, 0))
    except (KeyboardInterrupt, SystemExit):
        assert stop_after is not None
    return module


@pytest.mark.parametrize("stop_after", [1, 7])
def test_a_stopped_training_continues_to_the_same_weights(tmp_path: Path, stop_after: int):
    whole = fit(tmp_path / "whole", 12)
    fit(tmp_path / "stopped", 12, stop_after)
    resumed = fit(tmp_path / "stopped", 12)
    for a, b in zip(whole.lm.parameters(), resumed.lm.parameters(), strict=True):
        assert torch.equal(a, b)


def test_at_most_two_checkpoints_are_kept_and_none_is_half_written(tmp_path: Path):
    fit(tmp_path, 12, stop_after=9)
    kept = ["000000008.ckpt", "000000008.ckpt.sha256", "000000009.ckpt", "000000009.ckpt.sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_training_lowers_the_loss_on_a_predictable_text():
    tokens = np.tile(np.arange(64), 100).astype(np.uint16)
    module = Pretraining(CONFIG, 60, 1e-2, 1e-2, 0.0, 2, 0.3, seed=0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=60, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=RowData(tokens, 8, 8, 0))
    assert float(trainer.logged_metrics["loss"]) < 1.0 < np.log(64)


def test_the_exported_folder_is_a_hugging_face_model_in_half_precision(tmp_path: Path):
    tokenizer = train_tokenizer(TEXTS, 300)
    module = Pretraining({**CONFIG, "vocab_size": len(tokenizer)}, 1, 1e-2, 1e-2, 0.0, 1, 0.0, seed=0)
    module.export(tmp_path, tokenizer)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.float16 and loaded.encode("the cat") == tokenizer.encode("the cat")
    for a, b in zip(model.parameters(), module.lm.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, atol=1e-3, rtol=1e-3)
