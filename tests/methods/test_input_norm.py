import pytest
import torch

from core.input_norm import InputNorm

X = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * 3 + torch.linspace(-5, 5, 32)


def test_token_standardisation_gives_rows_of_mean_zero_and_variance_one():
    x, _ = InputNorm("token_std")(X)
    torch.testing.assert_close(x.mean(-1), torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(-1), torch.ones(50), atol=1e-3, rtol=0)


def test_centring_takes_the_mean_of_every_token_and_nothing_else():
    x, _ = InputNorm("token_center")(X)
    torch.testing.assert_close(x, X - X.mean(-1, keepdim=True))


def test_the_scalar_normalisation_gives_squared_norm_d_on_average():
    norm = InputNorm("scalar")
    norm.fit(X)
    assert abs(float(norm(X)[0].square().sum(-1).mean()) - 32) < 1e-3


def test_the_scalar_travels_with_the_weights():
    norm, other = InputNorm("scalar"), InputNorm("scalar")
    norm.fit(X)
    other.load_state_dict(norm.state_dict())
    assert torch.equal(norm(X)[0], other(X)[0])


@pytest.mark.parametrize("kind", ["token_std", "token_center", "scalar", "none", "layer_norm", "token_norm"])
def test_undoing_a_normalisation_gives_the_activations_back(kind):
    norm = InputNorm(kind)
    norm.fit(X)
    x = X.view(5, 10, 32)
    normalised, shift = norm(x)
    torch.testing.assert_close(norm.undo(normalised, shift), x, rtol=1e-4, atol=1e-4)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=r"input_norm: 'layer'.*token_std"):
        InputNorm("layer")


def test_layer_norm_makes_the_codes_space_of_token_std_and_is_undone_without_its_constant():
    (a, of_a), (b, of_b) = InputNorm("token_std")(X), InputNorm("layer_norm")(X)
    assert torch.equal(a, b)
    torch.testing.assert_close(of_a.scale - of_b.scale, torch.full((50, 1), 1e-5), atol=1e-6, rtol=0)
    torch.testing.assert_close(of_b.scale.squeeze(1), X.std(-1))


def test_token_norm_gives_every_row_the_norm_of_the_root_of_d():
    x, _ = InputNorm("token_norm")(X)
    torch.testing.assert_close(x.norm(dim=-1), torch.full((50,), 32**0.5))
