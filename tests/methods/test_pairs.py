"""A method with a decoder for two models, `[m, 2, d]`: what a crosscoder will be, in 20 lines, on the base class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from core.batch import Batch
from core.input_norm import InputNorm
from core.kernels import sparse
from core.kernels.codes import Codes
from core.kernels.mean_square import mse
from core.methods import topk
from core.methods.base import DictionaryMethod
from core.methods.decoder import project_gradient, uniform, unit_rows_
from core.methods.resampling import resample_if_due
from core.methods.saved import load_dictionary, save_dictionary
from core.methods.settings import Settings

D, M, B = 6, 10, 64


@dataclass(frozen=True, kw_only=True)
class PairSettings(Settings):
    k: int
    norm: Literal["per_model", "jointly"]


class Crosscoder(DictionaryMethod[PairSettings]):
    def declare_weights(self) -> None:
        s = self.settings
        self.axes = 1 if s.norm == "per_model" else 2
        W = uniform(1.0, s.seed, shape=(s.dict_size, 2, s.d_model))
        self.W_enc, self.W_dec = nn.Parameter(W), nn.Parameter(unit_rows_(W.clone(), self.axes))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(s.dict_size)), nn.Parameter(torch.zeros(2, s.d_model))

    def encode(self, x: Tensor) -> Codes:  # [B, 2, d] -> [B, m]
        return sparse.encode_topk(x, self.W_enc, self.b_enc, self.settings.k, centre=self.b_dec, path="auto")

    def losses(self, x: Tensor, codes: Codes) -> dict[str, Tensor]:
        return {"reconstruction": mse(x, self.decode(codes))}


SETTINGS: dict[str, Any] = {
    "d_model": D, "dict_size": M, "k": 2, "norm": "per_model", "lr": 1e-2, "betas": [0.9, 0.99], "input_norm": "scalar",
    "seed": 0, "decoder_norm": "after_step", "dead_after_tokens": 1000, "grad_clip": 1e5,
    "b_dec_init": "zeros", "warmup_steps": 0,
    "decay_fraction": 0.0,
}  # fmt: skip


NORMS = pytest.mark.parametrize("norm", ["per_model", "jointly"])
SCALES = torch.tensor([[3.0], [0.5]])  # of the two models' activations


def pairs(seed: int, n: int = B) -> Tensor:
    """`[n, 2, d]`: sums of two directions out of ten that both models share; the second model is six times smaller."""
    directions = nn.functional.normalize(torch.randn(10, 2, D, generator=torch.Generator().manual_seed(9)), dim=2)
    g = torch.Generator().manual_seed(seed)
    codes = torch.zeros(n, 10).scatter_(1, torch.rand(n, 10, generator=g).topk(2).indices, 1.0)
    return (codes @ directions.flatten(1)).view(n, 2, D) * SCALES


def trained(n_steps: int = 60, **changes: Any) -> tuple[Crosscoder, list[float]]:
    method = Crosscoder(**(SETTINGS | changes))
    optimizer = method.configure_optimizers()
    losses = [float(method.update(Batch(pairs(step)), optimizer)["loss"]) for step in range(n_steps)]
    return method.eval(), losses


@NORMS
def test_it_learns_and_every_norm_is_one_over_the_axes_that_it_declares(norm: str):
    method, losses = trained(norm=norm)
    assert losses[-1] < 0.5 * losses[0]
    squares = method.W_dec.detach().square().sum(2)  # [m, 2]
    if norm == "per_model":
        torch.testing.assert_close(squares, torch.ones(M, 2))
    else:
        torch.testing.assert_close(squares.sum(1), torch.ones(M))
        assert (squares - 0.5).abs().max() > 0.05


def test_norms_by_hand():
    """Rows (3, 4) and (0, 12): norms 5 and 12, together 13."""
    W = torch.tensor([[[3.0, 4.0], [0.0, 12.0]]])
    assert torch.equal(unit_rows_(W.clone(), 1), torch.tensor([[[0.6, 0.8], [0.0, 1.0]]]))
    torch.testing.assert_close(unit_rows_(W.clone(), 2), W / 13)


def test_the_gradients_part_along_a_row_goes_by_hand():
    """W = (1, 0), (0, 1), g = (5, 1), (2, 3). Per model 5 and 3 go; together (5 + 3) / 2 of each row of W."""
    W, g = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[5.0, 1.0], [2.0, 3.0]]])
    each, together = g.clone(), g.clone()
    project_gradient(each, W, 1)
    project_gradient(together, W, 2)
    assert torch.equal(each, torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]))
    assert torch.equal(together, torch.tensor([[[1.0, 1.0], [2.0, -1.0]]]))


@NORMS
def test_the_gradient_that_adam_sees_is_orthogonal_to_the_rows(norm: str):
    method = Crosscoder(**(SETTINGS | {"norm": norm}))
    method.update(Batch(pairs(0)), method.configure_optimizers(), step=lambda: None)
    products = (method.W_dec.grad * method.W_dec).sum(2).detach()
    along = products if norm == "per_model" else products.sum(1)
    assert along.abs().max() < 1e-6 < method.W_dec.grad.abs().max()


@NORMS
def test_a_stored_one_reconstructs_pairs_of_any_leading_axes(
    norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(topk, "Crosscoder", Crosscoder, raising=False)  # only names below core.methods are loaded
    monkeypatch.setattr(Crosscoder, "__module__", topk.__name__)
    method, _ = trained(norm=norm)
    save_dictionary(method, {}, tmp_path)
    again = load_dictionary(tmp_path)
    assert isinstance(again, Crosscoder) and again.input_shape == (2, D) and (again.d_model, again.dict_size) == (D, M)
    x = pairs(1000, 15).view(5, 3, 2, D)
    x_hat = again.reconstruct(x)
    assert x_hat.shape == x.shape and torch.equal(x_hat, method.reconstruct(x))
    scale = method.norm.scale
    codes = method.encode(x.flatten(0, 1) / scale).dense()  # [15, m]
    by_hand = scale * (torch.einsum("bm,mnd->bnd", codes, method.W_dec) + method.b_dec)
    torch.testing.assert_close(x_hat, by_hand.view(5, 3, 2, D))


def test_the_scalar_norm_keeps_one_scale_for_each_model():
    x = pairs(0, 500)
    norm, single = InputNorm("scalar", (2,)), InputNorm("scalar")
    norm.fit(x)
    by_hand = [float(x[:, i].square().sum(1).mean() / D) ** 0.5 for i in range(2)]
    assert norm.scale.shape == (2, 1) and norm.scale.flatten().tolist() == pytest.approx(by_hand)
    assert by_hand[0] == pytest.approx(6 * by_hand[1], rel=0.3)
    normalised, shift = norm(x)
    torch.testing.assert_close(normalised.square().sum(2).mean(0), torch.full((2,), float(D)))
    torch.testing.assert_close(norm.undo(normalised, shift), x)
    single.fit(x[:, 0])
    assert single.scale.shape == () and float(single.scale) == pytest.approx(by_hand[0])


@NORMS
def test_a_dead_latent_starts_anew_with_the_norm_that_the_method_declares(norm: str):
    method, _ = trained(2, norm=norm)
    optimizer = method.configure_optimizers()
    method.update(Batch(pairs(2)), optimizer)
    method.tokens_since_fired[:3] = 10_000
    before = method.W_dec.detach().clone()
    resample_if_due(method, method.W_enc, method.b_enc, optimizer, every=method.n_updates, like_decoder=True)
    assert not torch.equal(method.W_dec[:3], before[:3]) and torch.equal(method.W_dec[3:], before[3:])
    rows = method.W_dec[:3].flatten(0, 1) if norm == "per_model" else method.W_dec[:3].flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
