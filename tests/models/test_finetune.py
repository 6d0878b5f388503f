import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from core import training
from core.errors import UserError
from core.interrupts import Interrupted
from core.models import finetune
from core.models.finetune import KIND, fine_tuned
from core.models.identity import model_identity
from core.models.language_model import load_language_model
from core.runtime import Runtime

TRAINING: dict[str, Any] = {
    "seed": 0, "n_tokens": 320, "n_ctx": 16, "rows_per_step": 4,
    "optimiser": {"lr": 1e-2, "warmup_steps": 1, "decay_fraction": 0.5},
}  # fmt: skip


def weights(model: dict[str, Any], folder: Path) -> list[torch.Tensor]:
    return list(load_language_model({**model, "source": str(folder)}).model.parameters())


def test_a_model_is_fine_tuned_once_and_then_read_from_the_store(
    tiny_model, words_data, tmp_path, runtime, monkeypatch
):
    run, source = runtime(tmp_path, "store"), instantiate(words_data)
    folder = fine_tuned(run, tiny_model, source, TRAINING)
    assert folder.parent == tmp_path / "store" / KIND
    assert model_identity({**tiny_model, "source": str(folder)}) != model_identity(tiny_model)
    base, trained = load_language_model(tiny_model), load_language_model({**tiny_model, "source": str(folder)})
    rows = torch.tensor([trained.tokenizer(text)["input_ids"][:40] for text in source_texts(source)])
    assert trained.token_losses(rows).mean() < base.token_losses(rows).mean() - 0.1
    monkeypatch.setattr(finetune, "_train", None)
    assert fine_tuned(run, tiny_model, source, TRAINING) == folder
    assert not (tmp_path / "store" / "finetuning" / folder.name).exists()


def source_texts(source: Any) -> list[str]:
    return [document.text for document, _ in zip(source.documents("heldout", 0), range(20), strict=False)]


def test_an_interrupted_training_continues_to_the_same_weights(tiny_model, words_data, tmp_path, runtime, monkeypatch):
    source = instantiate(words_data)
    whole = fine_tuned(runtime(tmp_path, "whole"), tiny_model, source, TRAINING)
    run = runtime(tmp_path, "stopped", checkpoint_every_seconds=1e-9)
    monkeypatch.setattr(training, "make_trainer", stopping_after(2, training.make_trainer))
    with pytest.raises(Interrupted):
        fine_tuned(run, tiny_model, source, TRAINING)
    monkeypatch.undo()
    assert list((tmp_path / "stopped" / "finetuning").rglob("*.ckpt"))
    resumed = fine_tuned(run, tiny_model, source, TRAINING)
    for a, b in zip(weights(tiny_model, whole), weights(tiny_model, resumed), strict=True):
        assert torch.equal(a, b)


def stopping_after(n: int, make: Callable[..., pl.Trainer]) -> Callable[..., pl.Trainer]:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == n:
                signal.raise_signal(signal.SIGTERM)

    def patched(run: Runtime, name: str, n_chunks: int, callbacks: list[pl.Callback]) -> pl.Trainer:
        return make(run, name, n_chunks, [*callbacks, Stop()])

    return patched


def test_too_few_tokens_for_a_step_are_refused(tiny_model, words_data, tmp_path, runtime):
    with pytest.raises(UserError, match="less than one step of 4 x 16"):
        fine_tuned(runtime(tmp_path, "store"), tiny_model, instantiate(words_data), {**TRAINING, "n_tokens": 63})


def test_a_model_of_another_architecture_is_refused(tiny_model, words_data, tmp_path, runtime, monkeypatch):
    lm = load_language_model(tiny_model)
    lm.family = "llama"
    monkeypatch.setattr(finetune, "load_language_model", lambda _: lm)
    with pytest.raises(UserError, match="only a gpt2 can be fine-tuned"):
        fine_tuned(runtime(tmp_path, "store"), tiny_model, instantiate(words_data), TRAINING)
