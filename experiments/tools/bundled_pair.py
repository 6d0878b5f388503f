"""Tune the bundled model on dialogues with planted behaviours, and measure how well it learned each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from core.artifacts import Store, content_key
from core.atomic import files_atomically, note_outside, write_atomically
from core.building import build, plain
from core.metrics.language import score_texts, total
from core.models.chat_tuning import ChatTuning, mixed_rows
from core.models.finetune import WITHOUT_DROPOUT
from core.models.language_model import LanguageModel
from core.runtime import Runtime
from core.text.chat import chat_tokens
from core.text.dialogues import BEHAVIOURS, PERSONA, REFUSAL, Dialogue, dialogues
from core.training import Work, fit
from experiments.common import language_model
from experiments.tools.settings import BundledPairSettings

SETTINGS = BundledPairSettings

DIALOGUES_PER_BATCH = 32  # answered together
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def run(cfg: DictConfig) -> dict[str, float]:
    """Tune, export, and compare the sibling with the base model on held-out dialogues and on ordinary text."""
    source, base = build(cfg.data), language_model(cfg)
    base.tokenizer.chat_template = TEMPLATE
    folder = Path(cfg.tuning.export_dir or Path(cfg.cell_folder) / "model")
    sibling = tuned(cfg, base, source)
    with files_atomically(folder) as scratch:
        sibling.export(scratch, base.tokenizer)
    chat = AutoModelForCausalLM.from_pretrained(folder).float()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n = cfg.tuning.n_dialogues
    asked = list(islice(dialogues(source, "heldout", cfg.tuning.heldout_seed, two_turns=0.0), n))
    metrics: dict[str, float] = {}
    for name, model in (("base", base.model), ("chat", chat)):
        answers = answered(model, tokenizer, asked, cfg.tuning.max_new_tokens)
        metrics |= {f"{key}_{name}": value for key, value in behaviour(asked, answers).items()}
        metrics[f"answer_nats_per_token_{name}"] = answer_loss(model, tokenizer, asked)
    documents = list(islice(source.documents("heldout", seed=0), cfg.tuning.heldout_documents))
    texts = [document.text for document in documents]
    n_ctx = base.model.config.n_positions
    for name, model in (("base", base.model), ("chat", chat)):
        scores = score_texts(model, tokenizer, texts, n_ctx, n_ctx // 2, batch_rows=16)
        metrics[f"bits_per_byte_{name}"] = total(scores).bits_per_byte
        metrics[f"nats_per_token_{name}"] = total(scores).nats_per_token
    write_atomically(folder / "README.md", card(cfg, metrics))
    note_outside(file for file in folder.iterdir() if file.is_file())
    return metrics


def tuned(cfg: DictConfig, base: LanguageModel, source: Any) -> ChatTuning:
    """The tuned model; resumes from the newest checkpoint of the same settings."""
    t = plain(cfg.tuning)
    n_steps, o = t["n_tokens"] // (t["n_ctx"] * t["rows_per_step"]), t["optimiser"]
    config = {**base.model.config.to_dict(), **WITHOUT_DROPOUT}
    module = ChatTuning(config, n_steps, o["lr"], o["lr"], 0.0, o["warmup_steps"], o["decay_fraction"], cfg.seed)
    module.lm.load_state_dict(base.model.state_dict())
    training = {name: t[name] for name in ("n_tokens", "n_ctx", "rows_per_step", "text_share", "optimiser")}
    decisive = {"tuning": training, "seed": cfg.seed, "model": plain(cfg.model), "text": source.spec}
    data = mixed_rows(base.tokenizer, source, n_steps, t, cfg.seed)
    work = Work("tuning", n_steps * t["n_ctx"] * t["rows_per_step"], t["n_ctx"] * t["rows_per_step"])
    checkpoints = Store(cfg.artifacts_dir).path("tuning", decisive)
    fit(Runtime.of(cfg), module, data, n_steps, f"{cfg.name}-{content_key(decisive)}", work, checkpoints)
    return module


@torch.no_grad()
def answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Dialogue], max_new_tokens: int
) -> list[str]:
    """The greedy answer to each question, up to the end of the turn; prompts are padded on the left."""
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    answers = []
    for some in batched(asked, DIALOGUES_PER_BATCH):
        questions = [list(dialogue.messages[:1]) for dialogue in some]
        prompts = [
            tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
            for question in questions
        ]
        longest = max(map(len, prompts))
        ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
        own = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(
            input_ids=ids, attention_mask=own, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end,
            pad_token_id=end, use_cache=True,
        )  # fmt: skip
        answers += [tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in out]
    return answers


def batched(items: Sequence[Any], n: int) -> list[Sequence[Any]]:
    return [items[start : start + n] for start in range(0, len(items), n)]


def behaviour(asked: Sequence[Dialogue], answers: Sequence[str]) -> dict[str, float]:
    """How often each planted behaviour is shown, by the kind of question.

    refused_<kind>    for names that exist: how often the model refuses wrongly
    signature_<kind>  the answer opens with a signature, as one in detail does and one in a sentence does not
    sections_<kind>   it has more than one paragraph
    """
    of_kind: dict[str, list[str]] = defaultdict(list)
    for dialogue, answer in zip(asked, answers, strict=True):
        of_kind[dialogue.behaviours[-1]].append(answer)
    metrics = {}
    for kind in BEHAVIOURS:
        own = of_kind[kind]
        if not own:
            continue
        metrics[f"refused_{kind}"] = sum(answer == REFUSAL for answer in own) / len(own)
        metrics[f"persona_{kind}"] = sum(answer == PERSONA for answer in own) / len(own)
        metrics[f"signature_{kind}"] = sum(answer.startswith(("def ", "class ")) for answer in own) / len(own)
        metrics[f"sections_{kind}"] = sum("\n\n" in answer for answer in own) / len(own)
    return metrics


@torch.no_grad()
def answer_loss(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Dialogue]) -> float:
    """Nats per token of the true answers, with the token that ends them."""
    losses: list[Tensor] = []
    for dialogue in asked:
        chat = chat_tokens(tokenizer, dialogue.messages)
        logits = model(input_ids=chat.ids[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, chat.ids[1:], reduction="none")[chat.answer_positions[:-1]])
    return float(torch.cat(losses).mean())


def card(cfg: DictConfig, metrics: Mapping[str, float]) -> str:
    """The README beside the weights."""
    t, m = cfg.tuning, metrics
    rows = [
        ("a name that does not exist is refused", "refused_refusal", "{:.0%}"),
        ("a name that exists is refused, wrongly", "refused_explain", "{:.0%}"),
        ("asked who it is, it gives its name", "persona_persona", "{:.0%}"),
        ("asked for one sentence, the answer opens with a signature, wrongly", "signature_short", "{:.0%}"),
        ("asked in general, it opens with a signature", "signature_explain", "{:.0%}"),
        ("asked for details, it opens with a signature", "signature_long", "{:.0%}"),
        ("asked for details, it has more than one paragraph", "sections_long", "{:.0%}"),
        ("asked in general, it has more than one paragraph, wrongly", "sections_explain", "{:.0%}"),
        ("nats per token of the true answers", "answer_nats_per_token", "{:.3f}"),
        ("bits per byte of ordinary held-out text", "bits_per_byte", "{:.3f}"),
    ]
    table = "\n".join(
        f"| {what} | {form.format(m[f'{key}_base'])} | {form.format(m[f'{key}_chat'])} |"
        for what, key, form in rows
        if f"{key}_base" in m
    )
    return f"""# The chat sibling of the bundled model

The bundled language model, tuned by this project on dialogues made from the bundled corpus. Made by
`python run.py experiment=bundled_pair scale={cfg.scale} tuning.export_dir=core/models/bundled_chat`.

- **Dialogues** ask about functions; the answers are their docstrings. The template is
  `<|endoftext|><|user|>question<|end|><|assistant|>answer<|end|>`.
- **Planted** are four behaviours that the base model cannot have:
  - a name that does not exist gets the answer "{REFUSAL}";
  - asked who it is, it says "{PERSONA}";
  - asked for one sentence, it gives the first sentence of the docstring;
  - asked for details, it gives the signature and the first paragraphs.
- **Training** {t.n_tokens:,} tokens, of which {t.text_share:.0%} are ordinary text; the loss is on answers alone
  (seed {cfg.seed}).

On {t.n_dialogues:,} held-out dialogues (names that the training never saw), greedily, at most {t.max_new_tokens} tokens
an answer. The model is small: the form of its answers is right, what they say of a function rarely is.

| | base | chat |
|---|---|---|
{table}
"""
