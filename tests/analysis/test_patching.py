"""Edited activations and their KL, on tiny random models and crosscoders made by hand."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from core.analysis.paired_tokens import PairedTokens
from core.analysis.patching import (
    Intervention,
    PairOfActivations,
    PatchedKL,
    halves,
    kl_of_logits,
    members,
    patched_kl,
    random_half,
)
from core.errors import UserError
from core.methods.crosscoder import BatchTopKCrosscoder, L1Crosscoder
from core.models.language_model import LanguageModel
from core.text.chat import ROLES, answer_positions, first_of_answers
from core.text.paired_rows import Row
from tests.methods.test_crosscoders import BTK, L1, with_random_weights
from tests.text.test_chat_positions import roles

D, M, T, V, SITE = 8, 12, 14, 40, "resid_post.0"
TEXTS = ("btutaaaataaaat", "btutaaaat.....", "btuutaaaaaaat.")


def language_model(seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=V, n_positions=16, n_embd=D, n_layer=3, n_head=2, initializer_range=0.4)
    return LanguageModel(GPT2LMHeadModel(config), None, f"tiny {seed}")


BASE, CHAT = language_model(0), language_model(1)


class Pair:
    """A `ModelPair` without tokenizers."""

    site, chat, device = SITE, CHAT, CHAT.device

    def __init__(self, base: LanguageModel = BASE) -> None:
        self.base = base

    def capture(self, ids: Tensor) -> Tensor:
        return torch.stack([self.base.capture(ids, SITE), CHAT.capture(ids, SITE)], dim=2)


PAIR: Any = Pair()


def dialogues(texts: tuple[str, ...] = TEXTS, n_dropped: int = 1) -> PairedTokens:
    ids = torch.randint(V, (len(texts), T), generator=torch.Generator().manual_seed(5))
    rows = [Row(ids[i, : len(text.rstrip("."))], roles(text.rstrip(".")), True) for i, text in enumerate(texts)]
    return PairedTokens.of(rows, n_dropped)


def crosscoder(kind: str = "l1", norm: str = "none") -> Any:
    settings = {"d_model": D, "dict_size": M, "input_norm": norm}
    method: Any = L1Crosscoder(**L1 | settings) if kind == "l1" else BatchTopKCrosscoder(**BTK | settings)
    method = with_random_weights(method)
    if kind == "btk":
        method.threshold.fill_(2.0)
    if norm == "scalar":
        method.norm.scale.copy_(torch.tensor([[0.7], [1.6]]))
    return method.eval()


@pytest.fixture(params=[("l1", "none"), ("btk", "none"), ("btk", "scalar"), ("l1", "token_std")], ids=str)
def pair(request: Any) -> PairOfActivations:
    given = dialogues()
    return PairOfActivations(
        crosscoder(*request.param), PAIR.capture(given.ids), given.roles, torch.ones_like(given.valid)
    )


def test_replacing_every_latent_with_the_biases_is_the_chat_reconstruction_plus_the_base_error(pair):
    h_hat = pair.crosscoder.reconstruct(pair.h)
    wanted = h_hat[:, :, 1] + (pair.h - h_hat)[:, :, 0]
    every = Intervention("every", "replace", torch.ones(M, dtype=torch.bool), "all")
    torch.testing.assert_close(pair.edited(Intervention("all", "all", bias=True)), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(pair.edited(every), pair.edited(Intervention("all", "all")), rtol=0, atol=1e-5)


def test_the_error_is_the_base_reconstruction_plus_the_chat_error(pair):
    h_hat = pair.crosscoder.reconstruct(pair.h)
    wanted = h_hat[:, :, 0] + (pair.h - h_hat)[:, :, 1]
    torch.testing.assert_close(pair.edited(Intervention("error", "error", bias=True)), wanted, rtol=0, atol=1e-5)


def test_all_and_error_together_are_both_models(pair):
    both = pair.edited(Intervention("all", "all")) + pair.edited(Intervention("error", "error"))
    torch.testing.assert_close(both, pair.h.sum(2), rtol=0, atol=1e-5)


def test_no_latent_leaves_the_base_model_and_the_sum_over_single_latents_is_all(pair):
    base = pair.edited(Intervention("none", "none"))
    torch.testing.assert_close(base, pair.h[:, :, 0])
    nothing = torch.zeros(M, dtype=torch.bool)
    torch.testing.assert_close(pair.edited(Intervention("empty", "replace", nothing)), base)
    steps = [pair.edited(Intervention(str(j), "replace", members(torch.tensor([j]), M))) - base for j in range(M)]
    torch.testing.assert_close(
        torch.stack(steps).sum(0), pair.edited(Intervention("all", "all")) - base, rtol=0, atol=1e-5
    )


def test_adding_is_replacing_without_taking_the_base_decoder_away():
    given, method = dialogues(), crosscoder()
    pair = PairOfActivations(method, PAIR.capture(given.ids), given.roles, torch.ones_like(given.valid))
    chosen = members(torch.tensor([1, 4, 5]), M)
    f = method.encode(pair.h.flatten(0, 1)).dense()[:, chosen]  # [R T, 3]
    added = pair.edited(Intervention("add", "add", chosen)).flatten(0, 1) - pair.h[:, :, 0].flatten(0, 1)
    torch.testing.assert_close(added, f @ method.W_dec[chosen, 1], rtol=0, atol=1e-5)
    replaced = pair.edited(Intervention("replace", "replace", chosen)).flatten(0, 1) - pair.h[:, :, 0].flatten(0, 1)
    torch.testing.assert_close(added - replaced, f @ method.W_dec[chosen, 0], rtol=0, atol=1e-5)


def test_the_template_patch_takes_the_chat_model_at_template_tokens_only():
    given = dialogues()
    pair = PairOfActivations(crosscoder(), PAIR.capture(given.ids), given.roles, given.valid)
    edited, template = pair.edited(Intervention("template", "template")), given.roles == ROLES.index("template")
    assert torch.equal(edited[template], pair.h[:, :, 1][template])
    assert torch.equal(edited[~template], pair.h[:, :, 0][~template])


def test_positions_that_training_drops_keep_the_base_model():
    given = dialogues()
    pair = PairOfActivations(crosscoder(), PAIR.capture(given.ids), given.roles, given.valid)
    for kind in ("all", "error"):
        edited = pair.edited(Intervention(kind, cast(Any, kind)))
        assert torch.equal(edited[~given.valid], pair.h[:, :, 0][~given.valid])
        assert not torch.isclose(edited, pair.h[:, :, 0])[given.valid].all()


def test_a_set_of_latents_belongs_to_the_interventions_that_take_one():
    with pytest.raises(ValueError, match="replace needs latents"):
        Intervention("r", "replace")
    with pytest.raises(ValueError, match="all takes no latents"):
        Intervention("a", "all", torch.ones(M, dtype=torch.bool))


# ---- KL


def test_the_kl_by_hand():
    """p = (1/2, 1/2) and q = (1/4, 3/4) have ln(2 / sqrt 3); equal logits have 0."""
    p, q = torch.zeros(2, 2), torch.tensor([[0.0, math.log(3)], [7.0, 7.0]])
    assert kl_of_logits(p, q).tolist() == pytest.approx([math.log(2 / math.sqrt(3)), 0.0], abs=1e-6)


def test_the_kl_is_that_of_whole_models_at_answer_positions():
    """Each edit is compared with a forward pass in which the block's output is replaced by a hook."""
    given, method = dialogues(), crosscoder()
    answers = answer_positions(given.roles)
    wanted = [Intervention("none", "none"), Intervention("all", "all"), Intervention("template", "template")]
    result = patched_kl(PAIR, method, given, wanted, rows_per_batch=2)
    pair = PairOfActivations(method, PAIR.capture(given.ids), given.roles, given.valid)
    log_p = CHAT.model(given.ids).logits.log_softmax(-1)
    for i, intervention in enumerate(wanted):
        x = pair.edited(intervention).detach()
        hook = CHAT.model.transformer.h[0].register_forward_hook(lambda *_, x=x: x)
        log_q = CHAT.model(given.ids).logits.log_softmax(-1)
        hook.remove()
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[answers]
        np.testing.assert_allclose(result.kl[i], kl.numpy(), rtol=1e-4, atol=1e-6)
    assert result.kl.shape[1] == int(answers.sum()) and result.kl[0].mean() > 0.01
    assert result.dialogue.tolist() == answers.nonzero()[:, 0].tolist()
    assert int(result.first.sum()) == int(first_of_answers(given.roles, 10).sum()) < int(answers.sum())


def test_a_perfect_crosscoder_leaves_no_kl():
    """Latents +-e_i of each model, so that every activation is reconstructed: `all` is the chat model, `error` the base
    model, and a model against itself has no KL at all."""
    method = L1Crosscoder(**L1 | {"d_model": D, "dict_size": 4 * D}).eval()
    eye = torch.eye(2 * D).view(2 * D, 2, D)
    with torch.no_grad():
        method.W_enc.copy_(torch.cat([eye, -eye]))
        method.W_dec.copy_(torch.cat([eye, -eye]))
    every = [Intervention(kind, cast(Any, kind)) for kind in ("none", "all", "error")]
    everywhere = dialogues(n_dropped=0)
    none, all_, error = patched_kl(PAIR, method, everywhere, every, 3).kl
    np.testing.assert_allclose(all_, 0, atol=1e-5)
    np.testing.assert_allclose(error, none, atol=1e-4)
    itself: Any = Pair(CHAT)
    none, _, error = patched_kl(itself, method, everywhere, every, 3).kl
    np.testing.assert_allclose(none, 0, atol=1e-5)
    np.testing.assert_allclose(error, 0, atol=1e-5)


def test_dialogues_without_an_answer_are_refused():
    with pytest.raises(UserError, match="no dialogue has an answer"):
        patched_kl(PAIR, crosscoder(), dialogues(("btuut",)), [Intervention("none", "none")], 2)


def result_of(kl: list[list[float]], dialogue: list[int], first: list[bool]) -> PatchedKL:
    return PatchedKL(("none", "all"), np.array(kl), np.array(first), np.array(dialogue))


def test_means_and_token_errors_by_hand():
    """KL 1, 2, 3, 6 has mean 3 and variance 14/3; the first two are `first`."""
    result = result_of([[1, 2, 3, 6], [0, 0, 0, 2]], [0, 0, 1, 1], [True, True, False, False])
    mean = result.at("all").mean("none")
    assert mean.mean == 3 and mean.token_error == pytest.approx(1.96 * math.sqrt(14 / 3 / 4))
    assert mean.low == 1.5 and mean.high == 4.5  # one of two dialogues drawn twice
    assert result.at("first").mean("none").mean == 1.5
    assert result.at("all").reduction("all")[0] == pytest.approx(1 - 0.5 / 3)
    assert result.at("all").difference("none", "all")[0] == 2.5


def test_one_token_has_no_token_error():
    assert math.isnan(result_of([[1.0], [0.5]], [0], [True]).at("all").mean("none").token_error)


def test_the_interval_over_dialogues_is_wider_than_over_tokens_where_tokens_of_a_dialogue_agree():
    draw = np.random.default_rng(0)
    level, dialogue = draw.normal(5, 1, 40), np.repeat(np.arange(40), 25)
    kl = level[dialogue] + 0.1 * draw.normal(size=1000)
    mean = result_of([kl.tolist(), kl.tolist()], dialogue.tolist(), [True] * 1000).at("all").mean("none")
    assert (mean.high - mean.low) / 2 > 3 * mean.token_error
    assert (mean.high - mean.low) / 2 == pytest.approx(1.96 * level.std() / math.sqrt(40), rel=0.15)


def test_equal_interventions_differ_by_nothing_in_every_resample():
    result = result_of([[1, 2, 3, 6], [1, 2, 3, 6]], [0, 1, 2, 3], [True] * 4)
    assert result.at("all").difference("none", "all") == (0, 0, 0)


# ---- sets of latents


def test_halves_of_an_odd_pool_leave_the_middle_out():
    scores = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0, 9.0])
    pool = torch.tensor([True, True, True, True, True, False])
    best, worst = halves(scores, pool)
    assert best.nonzero().flatten().tolist() == [0, 4] and worst.nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("n", range(8))
def test_halves_never_overlap_and_are_of_one_size(n: int):
    scores, pool = torch.zeros(8), torch.arange(8) < n
    best, worst = halves(scores, pool)
    assert not (best & worst).any() and int(best.sum()) == int(worst.sum()) == n // 2
    half = random_half(pool, seed=1)
    assert int(half.sum()) == n // 2 and not (half & ~pool).any()


def test_a_latent_without_score_is_refused():
    with pytest.raises(ValueError, match="no score"):
        halves(torch.tensor([1.0, math.nan]), torch.tensor([True, True]))
