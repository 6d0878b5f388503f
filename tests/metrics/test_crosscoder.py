"""Relative norms, classes and twins by hand."""

import torch

from core.metrics.crosscoder import in_class, relative_norm, twins


def test_the_relative_norm_by_hand():
    """Norms (base, chat): (0, 1) chat-only, (1, 0) base-only, (2, 2) shared, (0.3, 1) 0.85, (0, 0) nothing."""
    norms = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [0.3, 1.0], [0.0, 0.0]])
    W = norms[:, :, None] * torch.tensor([0.6, 0.8])
    delta = relative_norm(W)
    torch.testing.assert_close(delta[:4], torch.tensor([1.0, 0.0, 0.5, 0.85], dtype=torch.float64), rtol=1e-6, atol=0)
    assert delta[4].isnan()
    assert in_class(delta, "chat_only").tolist() == [True, False, False, False, False]
    assert in_class(delta, "base_only").tolist() == [False, True, False, False, False]
    assert in_class(delta, "shared").tolist() == [False, False, True, False, False]


def test_exchanging_the_models_mirrors_the_relative_norm():
    W = torch.randn(20, 2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relative_norm(W.flip(1)), 1 - relative_norm(W))


def test_twins_are_matched_one_to_one_with_the_largest_cosine_first():
    """Chat directions of latents 0 and 1 both lie near the base direction of latent 2; 1 is nearer. Latent 3 is near
    nothing."""
    angle = torch.tensor([0.3, 0.1, 0.0, 1.5])
    directions = torch.stack([angle.cos(), angle.sin()], dim=1)
    W = directions[:, None].repeat(1, 2, 1)
    chat, base = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])
    assert twins(W, chat, base).tolist() == [[1, 2]]
    assert twins(W, chat, base, cosine=0.999).shape == (0, 2)
    assert twins(W, ~chat & ~base, base).shape == (0, 2)
