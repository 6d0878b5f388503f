"""What tools report of changes that are planted, by hand and by chance."""

import pytest
import torch
from torch import Tensor

from core.analysis import model_changes
from core.analysis.latent_scaling import LatentScaling
from core.analysis.model_changes import BASE, CHAT, UNKNOWN, InBoth
from core.kernels.codes import DenseCodes
from core.seeding import generator

D, B = 8, 4000
AXES = torch.eye(D)


def activations(strengths: list[tuple[float, float]], noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """x `[B, 2, D]`, amplitudes `[B, n]`: concept i is along axis i, with a strength in each model, in 1 of 5 rows."""
    g = generator(0, "changes")
    amplitudes = (torch.rand(B, len(strengths), generator=g) < 0.2) * (0.5 + torch.rand(B, len(strengths), generator=g))
    per_model = amplitudes[:, None] * torch.tensor(strengths).T  # [B, 2, n]
    x = per_model @ AXES[: len(strengths)] + noise * torch.randn(B, 2, D, generator=g)
    return x, amplitudes


STRENGTHS = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.3, 1.0)]  # shared, chat-only, base-only, weaker in the base model


def perfect() -> tuple[Tensor, Tensor, DenseCodes]:
    """Activations, and the decoder `[4, 2, D]` and codes of the crosscoder that knows the truth."""
    x, amplitudes = activations(STRENGTHS)
    W_dec = torch.tensor(STRENGTHS)[:, :, None] * AXES[:4, None]
    return x, W_dec, DenseCodes(amplitudes)


def test_decoder_norms_report_what_one_model_lacks_and_which_model_has_it():
    _, W_dec, codes = perfect()
    changes = model_changes.one_sided_by_norm(W_dec, codes)
    assert changes.side.tolist() == [BASE, CHAT] and changes.one_sided
    torch.testing.assert_close(changes.directions, AXES[[2, 1]])
    torch.testing.assert_close(changes.strength, codes.dense()[:, [2, 1]])


def test_latent_scaling_refuses_a_latent_whose_base_decoder_was_taken_away():
    """The weaker concept's base decoder is set to zero: by its norm it is chat-only, by Latent Scaling it is not."""
    x, W_dec, codes = perfect()
    W_dec[3, 0] = 0
    assert model_changes.one_sided_by_norm(W_dec, codes).side.tolist() == [BASE, CHAT, CHAT]
    sums = LatentScaling(InBoth(W_dec, torch.zeros(2, D)))
    sums.add(x, codes)
    changes = model_changes.one_sided_by_scaling(W_dec, codes, sums)
    torch.testing.assert_close(changes.directions, AXES[[2, 1]])
    assert changes.side.tolist() == [BASE, CHAT]


def test_a_latent_that_fires_too_seldom_is_not_judged():
    x, W_dec, codes = perfect()
    few = codes.values.clone()
    few[few[:, 1].nonzero().squeeze(1)[99:], 1] = 0
    sums = LatentScaling(InBoth(W_dec, torch.zeros(2, D)))
    sums.add(x, DenseCodes(few))
    assert model_changes.one_sided_by_scaling(W_dec, DenseCodes(few), sums).side.tolist() == [BASE]


def test_a_dictionary_of_the_difference_reports_the_model_and_the_sense_of_each_change():
    """Latents along +axis 1 (chat-only), -axis 2 (what the base model alone has, with its sign in the difference), and
    +axis 3 (weaker in the base model); one that fires on noise has two betas of one size and is not reported."""
    x, _, codes = perfect()
    noise = ((x[:, 1, 7] - x[:, 0, 7]) > 0.1).float()
    W_dec = torch.stack([AXES[1], -AXES[2], AXES[3], AXES[7]])
    f = DenseCodes(torch.cat([codes.dense()[:, 1:4], noise[:, None]], dim=1))
    changes = model_changes.of_difference(W_dec, f, x)
    assert changes.side.tolist() == [CHAT, BASE, CHAT] and not changes.one_sided
    torch.testing.assert_close(changes.directions, AXES[[1, 2, 3]])


def test_principal_components_that_come_out_again_are_the_changes_and_a_model_beside_itself_has_none():
    x, _ = activations([(1.0, 1.0), (0.0, 3.0), (1.5, 0.0)])
    changes = model_changes.principal(x)
    assert changes.side.tolist() == [UNKNOWN] * 2
    assert (changes.directions @ AXES[[1, 2]].T).abs().diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    alike, _ = activations([(1.0, 1.0)] * 3)
    assert len(model_changes.principal(alike)) == 0


def test_the_mean_difference_is_reported_if_it_is_above_chance():
    x, _ = activations([(1.0, 1.0), (0.0, 1.0)])
    changes = model_changes.mean_shift(x, generator(0, "signs"))
    assert len(changes) == 1 and float(changes.directions[0] @ AXES[1]) > 0.99
    alike, _ = activations([(1.0, 1.0)] * 3)
    assert len(model_changes.mean_shift(alike, generator(0, "signs"))) == 0
