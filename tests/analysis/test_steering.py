"""Steering, on a tiny random model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from core.analysis.steering import continuation, push_of
from core.models.language_model import LanguageModel

D, V = 16, 30
PROMPT = torch.tensor([3, 1, 4, 1, 5])


class Numbers:
    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=24, n_embd=D, n_layer=2, n_head=2, initializer_range=0.5)
    return LanguageModel(GPT2LMHeadModel(config), Numbers(), "tiny")


def greedy(lm: LanguageModel, n: int, push: torch.Tensor, n_pushed: int) -> str:
    """Without a cache: the first `n_pushed` positions are pushed in every pass."""
    ids = PROMPT.tolist()
    for _ in range(n):
        hook = lm.model.transformer.h[0].register_forward_hook(
            lambda _m, _a, x: x + push * (torch.arange(x.shape[1]) < n_pushed)[None, :, None]
        )
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        hook.remove()
    return " ".join(map(str, ids[len(PROMPT) :]))


def test_a_push_is_added_at_all_tokens_or_at_those_of_the_prompt(lm: LanguageModel):
    push = push_of(torch.randn(D, generator=torch.Generator().manual_seed(1)), largest=20.0, alpha=1.5)
    plain = continuation(lm, PROMPT, 8, end=V - 1)
    everywhere = continuation(lm, PROMPT, 8, V - 1, push, "resid_post.0")
    prompt_only = continuation(lm, PROMPT, 8, V - 1, push, "resid_post.0", prompt_only=True)
    assert plain == greedy(lm, 8, push, 0)
    assert everywhere == greedy(lm, 8, push, 99)
    assert prompt_only == greedy(lm, 8, push, len(PROMPT))
    assert len({plain, everywhere, prompt_only}) == 3  # the seed was chosen so


def test_no_push_changes_nothing(lm: LanguageModel):
    assert continuation(lm, PROMPT, 6, V - 1, torch.zeros(D), "resid_post.1") == continuation(lm, PROMPT, 6, V - 1)


def test_a_push_has_the_length_of_the_largest_activation_times_alpha():
    push = push_of(torch.tensor([0.0, 3.0, 4.0]), largest=2.0, alpha=0.5)
    torch.testing.assert_close(push, torch.tensor([0.0, 0.6, 0.8]))
