"""Answers written by a model, and latents as probes of behaviours."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from core.analysis.answers import answered, best_probe, largest_in_answers
from core.errors import UserError
from core.metrics.statistics import roc_auc
from core.models.language_model import LanguageModel
from core.text.chat import answer_positions, chat_tokens, prompt_of
from tests.analysis.test_patching import PAIR, M, crosscoder, dialogues

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim + '<|end|>' }}{% endfor %}"
)
QUESTION = [{"role": "user", "content": "abc fade"}]


@pytest.fixture(scope="module")
def lm(tiny_lm_folder: Any) -> LanguageModel:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_folder)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0
    )
    return LanguageModel(GPT2LMHeadModel(config), tokenizer, "tiny")


def test_a_prompt_ends_where_the_answer_begins(lm: LanguageModel):
    whole = chat_tokens(lm.tokenizer, [*QUESTION, {"role": "assistant", "content": "x y"}])
    prompt = prompt_of(lm.tokenizer, QUESTION)
    start = int(whole.is_role("assistant").nonzero()[0])
    assert torch.equal(prompt.chat.ids, whole.ids[:start]) and torch.equal(prompt.chat.roles, whole.roles[:start])
    last = int(whole.is_role("assistant").nonzero()[-1])
    assert prompt.end == int(whole.ids[last + 1])
    again = prompt_of(lm.tokenizer, [*QUESTION, {"role": "assistant", "content": "x y"}, *QUESTION])
    assert torch.equal(again.chat.ids[: len(whole.ids)], whole.ids) and len(again.chat.ids) > len(whole.ids)


def test_a_template_without_an_end_of_answers_is_refused(lm: LanguageModel):
    open_ended = AutoTokenizer.from_pretrained(lm.tokenizer.name_or_path)
    open_ended.chat_template = "{% for m in messages %}{{ ' ' + m['role'] + ' ' + m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="puts no token after an answer"):
        prompt_of(open_ended, QUESTION)


def test_the_answer_is_the_models_own_and_greedy(lm: LanguageModel):
    given = [*QUESTION, {"role": "assistant", "content": "never used"}]
    row = answered(lm, given, 6, n_ctx=64)
    assert row is not None and row.is_chat
    n = len(prompt_of(lm.tokenizer, QUESTION).chat.ids)
    assert torch.equal(row.ids[:n], prompt_of(lm.tokenizer, QUESTION).chat.ids) and len(row.ids) - n <= 6
    greedy = lm.model(row.ids[None]).logits[0].argmax(-1)
    assert torch.equal(row.ids[n:], greedy[n - 1 : -1])
    assert answer_positions(row.roles).nonzero().flatten().tolist() == list(range(n - 1, len(row.ids) - 1))


def test_an_answer_is_cut_at_the_context_and_a_long_question_has_none(lm: LanguageModel):
    n = len(prompt_of(lm.tokenizer, QUESTION).chat.ids)
    row = answered(lm, QUESTION, 6, n_ctx=n + 2)
    assert row is not None and len(row.ids) <= n + 2
    assert answered(lm, QUESTION, 6, n_ctx=n) is None


def test_the_largest_activation_in_answers_is_that_of_the_dense_codes():
    tokens, method = dialogues(), crosscoder()
    sizes = torch.linspace(1, 2, M)
    found = largest_in_answers(PAIR, method, sizes, tokens, torch.tensor([5, 0, 7]), rows_per_batch=2)
    v = method.encode(PAIR.capture(tokens.ids).flatten(0, 1)).dense() * sizes
    v = v.view(*tokens.ids.shape, M).where(answer_positions(tokens.roles)[..., None], 0)
    np.testing.assert_allclose(found, v.amax(1)[:, [5, 0, 7]].detach().numpy(), rtol=1e-5)


def test_the_area_under_the_curve_by_hand():
    """Of the 2 x 2 pairs of the first column three are in order, of the second one and two ties, of the third none."""
    labels = np.array([True, True, False, False])
    scores = np.array([[4, 1, 0], [2, 1, 0], [3, 1, 1], [1, 0, 1]], dtype=float)
    assert roc_auc(scores, labels).tolist() == [0.75, 0.75, 0.0]
    assert np.isnan(roc_auc(scores, np.ones(4))).all()


def test_the_best_probe_is_judged_on_dialogues_that_did_not_choose_it():
    """Column 0 is right everywhere; column 1 is right on even rows only; column 2 is noise."""
    draw = np.random.default_rng(0)
    labels = draw.random(400) < 0.3
    even = np.arange(400) % 2 == 0
    scores = np.stack([labels + 0.6 * draw.random(400), np.where(even, labels, 0.5), draw.random(400)], axis=1)
    overfit, honest = best_probe(scores[:, 1:], labels), best_probe(scores[:, [2, 0]], labels)
    assert overfit is not None and overfit.place == 0 and overfit.auc == 0.5
    assert honest is not None and honest.place == 1 and honest.auc == 1.0


def test_without_a_behaviour_there_is_no_probe():
    assert best_probe(np.ones((6, 2)), np.zeros(6, dtype=bool)) is None
    assert best_probe(np.ones((6, 0)), np.array([1, 0, 1, 0, 1, 1], dtype=bool)) is None
