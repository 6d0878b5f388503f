"""Fine-tune a GPT-2-architecture model on other text, and store it as a folder that any experiment can load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.artifacts import Store, content_key
from core.errors import UserError
from core.hub import go_on_with_unfinished
from core.interrupts import remove_folder
from core.models.identity import commits_of, model_identity
from core.models.language_model import LanguageModel, load_language_model
from core.models.pretrain import Pretraining, RowData
from core.runtime import Runtime
from core.text.documents import TextSource
from core.text.rows import RowStream, say_counts
from core.training import Work, fit

KIND = "language_model"
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # too short to overfit


class FineTuning(Pretraining):
    """AdamW for everything: with the small steps of a short fine-tuning, Muon would cost as much as the model."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        inner = [p for p in self.lm.transformer.h.parameters() if p.ndim == 2]
        inner_ids = {id(p) for p in inner}
        rest = [p for p in self.lm.parameters() if id(p) not in inner_ids]
        return [
            torch.optim.AdamW(group, lr=self.lr_adam, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
            for group in (inner, rest)
        ]


def fine_tuned(run: Runtime, model: Mapping[str, Any], source: TextSource, training: Mapping[str, Any]) -> Path:
    """The folder of the fine-tuned model, in Hugging Face's format (half precision). Trained once, then stored.

    model     a configuration group `model`: the model to start from
    source    the text to train on: `train` documents, one pass over the rows
    training  n_tokens, n_ctx, rows_per_step, seed (of the text and its order); `optimiser` with lr, warmup_steps and
              decay_fraction as in `Pretraining`

    An interrupted training continues from its checkpoint. Raises UserError for a model of another architecture.
    """
    store = Store(run.artifacts_dir)
    go_on_with_unfinished(run.artifacts_dir)
    decisive = {"model": model_identity(model), "text": source.spec, "training": dict(training)}

    def make(folder: Path) -> None:
        lm = load_language_model({**model, "dtype": "float32"})
        checkpoints = store.path("finetuning", decisive)
        _train(run, lm, source, training, checkpoints, commits_of(model)).export(folder, lm.tokenizer)

    path = store.get_or_make(KIND, decisive, make)
    remove_folder(store.path("finetuning", decisive))
    return path


def _train(
    run: Runtime,
    lm: LanguageModel,
    source: TextSource,
    training: Mapping[str, Any],
    folder: Path,
    commits: Mapping[str, str],
) -> Pretraining:
    if lm.family != "gpt2":
        raise UserError(
            f"model: {lm.name} is a {lm.family}; only a gpt2 can be fine-tuned here, such as model=bundled."
        )
    n_ctx, rows_per_step, seed = training["n_ctx"], training["rows_per_step"], training["seed"]
    n_steps = training["n_tokens"] // (n_ctx * rows_per_step)
    if n_steps < 1:
        raise UserError(f"planting.n_tokens={training['n_tokens']} is less than one step of {rows_per_step} x {n_ctx}.")
    stream = RowStream(source, lm.tokenizer, "train", seed, n_ctx)
    tokens = stream.next_rows((n_steps + 1) * rows_per_step).flatten().numpy()  # one step more, since rows are shifted
    say_counts(stream.counts, "fine-tuning")
    o, config = training["optimiser"], {**lm.model.config.to_dict(), **WITHOUT_DROPOUT}
    module = FineTuning(config, n_steps, o["lr"], o["lr"], 0.0, o["warmup_steps"], o["decay_fraction"], seed)
    module.lm.load_state_dict(lm.model.state_dict())
    data = RowData(tokens, n_ctx, rows_per_step, seed)
    work = Work("fine-tuning", n_steps * n_ctx * rows_per_step, n_ctx * rows_per_step)
    name, read = f"{run.name}-{content_key(dict(training))}", {**commits, **getattr(source, "commits", {})}
    fit(run, module, data, n_steps, name, work, folder, commits=read)
    return module
