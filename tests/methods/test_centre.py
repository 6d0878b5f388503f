"""Where b_dec starts, in every method that has one."""

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from core.batch import Batch
from core.errors import UserError
from core.fleet import Start
from core.methods.base import DictionaryMethod
from core.methods.batchtopk import BatchTopK
from core.methods.centre import centre, geometric_median
from core.methods.jumprelu import JumpReLU
from core.methods.lca import LCA
from core.methods.relu_l1 import ReluL1
from core.methods.settings import rebuilt
from core.methods.topk import TopK
from tests.methods.test_lca import build as build_lca
from tests.methods.test_methods import METHODS, batches, build

POINTS: dict[str, tuple[list[list[float]], list[float]]] = {
    "a line: the middle one": ([[0.0], [1.0], [2.0], [10.0], [50.0]], [2.0]),
    "a square: where its diagonals meet": ([[0.0, 0.0], [3.0, 3.0], [0.0, 3.0], [3.0, 0.0]], [1.5, 1.5]),
    "a kite: where its diagonals meet": ([[0.0, 1.0], [0.0, -1.0], [-1.0, 0.0], [9.0, 0.0]], [0.0, 0.0]),
    "an equal-sided triangle: its centre": ([[0.0, 0.0], [2.0, 0.0], [1.0, 3**0.5]], [1.0, 3**-0.5]),
    "a triangle with an angle above 120 degrees: that corner": ([[0.0, 0.0], [5.0, 0.5], [-5.0, 0.5]], [0.0, 0.0]),
    "three in one place against two: that place": ([[1.0, 1.0]] * 3 + [[7.0, 2.0], [4.0, 9.0]], [1.0, 1.0]),
    "one point": ([[3.0, -4.0]], [3.0, -4.0]),
    "equal points": ([[3.0, -4.0]] * 4, [3.0, -4.0]),
    "an outlier that takes the mean away": (
        [[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1e6, 0.0]], [0.2, 0.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_the_geometric_median_is_where_it_is_known_to_be(name: str, scale: float):
    points, median = POINTS[name]
    x = scale * torch.tensor(points)
    tolerance = 0.21 if "outlier" in name else 2e-2
    torch.testing.assert_close(geometric_median(x), scale * torch.tensor(median), rtol=0, atol=tolerance * scale)


def test_no_point_nearby_has_a_smaller_sum_of_distances():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).exp()
    median = geometric_median(x)

    def total(point: Tensor) -> float:
        return float((x - point).norm(dim=1).double().sum())

    moved = median + 0.02 * torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    assert total(median) < min(map(total, moved)) and total(median) < total(x.mean(0))


def test_each_model_of_a_pair_has_a_centre_of_its_own():
    x = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0)).exp()
    for kind in ("mean", "geometric_median"):
        both = centre(x, kind)
        alone = torch.stack([centre(x[:, model], kind) for model in range(2)])
        torch.testing.assert_close(both, alone)


@METHODS
@pytest.mark.parametrize("input_norm", ["none", "token_std", "scalar"])
@pytest.mark.parametrize("kind", ["zeros", "mean", "geometric_median"])
def test_b_dec_starts_at_the_centre_of_the_normalised_first_batch(
    cls: type[DictionaryMethod], input_norm: str, kind: str, monkeypatch: pytest.MonkeyPatch
):
    method = build(cls, b_dec_init=kind, input_norm=input_norm)
    first = Batch(next(batches()).x + 2.0 * torch.arange(64) / 64)
    seen: list[Tensor] = []
    encode = type(method).encode
    monkeypatch.setattr(cls, "encode", lambda self, x: (seen.append(self.b_dec.detach().clone()), encode(self, x))[1])
    method.update(first, method.configure_optimizers())
    expected = {
        "zeros": lambda x: torch.zeros(64),
        "mean": lambda x: x.mean(0),
        "geometric_median": geometric_median,
    }[kind](method.norm(first.x)[0])
    torch.testing.assert_close(seen[0], expected)
    assert (kind == "zeros") == (not seen[0].any())


@METHODS
def test_only_the_first_batch_decides_where_b_dec_starts(cls: type[DictionaryMethod]):
    method = build(cls, b_dec_init="mean", lr=1e-6)
    optimizer = method.configure_optimizers()
    first, second = islice(batches(), 2)
    method.update(first, optimizer)
    method.update(Batch(second.x + 100.0 * torch.arange(64)), optimizer)
    torch.testing.assert_close(method.b_dec.detach(), method.norm(first.x)[0].mean(0), rtol=0, atol=1e-5)


@METHODS
def test_parameters_that_a_training_starts_from_are_kept(cls: type[DictionaryMethod]):
    given = build(cls, seed=1)
    with torch.no_grad():
        given.b_dec.copy_(torch.arange(64.0))
    method = build(cls, b_dec_init="mean", lr=1e-6)
    Start(given, fixed=("b_dec",)).apply(method)
    method.update(next(batches()), method.configure_optimizers())
    assert torch.equal(method.b_dec, given.b_dec)


@METHODS
def test_a_first_batch_that_is_not_finite_leaves_b_dec_finite(cls: type[DictionaryMethod]):
    method = build(cls, b_dec_init="mean", input_norm="none")
    x = next(batches()).x.clone()
    x[3, 5] = torch.nan
    method.update(Batch(x), method.configure_optimizers())
    assert not method.b_dec.any()


def off_centre_rows(n: int, seed: int) -> Tensor:
    """Planted rows with a large common part, as activations of language models have it."""
    common = 4.0 * torch.randn(64, generator=torch.Generator().manual_seed(7))
    return next(batches(seed=seed, n_rows=n)).x + common


@pytest.mark.parametrize("cls", [TopK, BatchTopK, JumpReLU, ReluL1])
def test_a_short_training_is_better_from_the_mean_than_from_zero(cls: type[DictionaryMethod]):
    errors = {}
    for kind in ("zeros", "mean", "geometric_median"):
        method = build(cls, b_dec_init=kind, input_norm="scalar", lr=1e-3)
        optimizer = method.configure_optimizers()
        for seed in range(60):
            loss = method.update(Batch(off_centre_rows(128, seed)), optimizer)
        errors[kind] = float(loss["reconstruction"])
    assert errors["mean"] < 0.9 * errors["zeros"] and errors["geometric_median"] < 0.9 * errors["zeros"]


def test_a_dictionary_without_a_bias_starts_at_zero_alone():
    with pytest.raises(UserError, match=r"method\.b_dec_init: 'mean' must be zeros"):
        build_lca(b_dec_init="mean")


@METHODS
@pytest.mark.parametrize("earlier", [None, "zero", "geometric_median"])
def test_dictionaries_stored_before_the_setting_existed_are_read(cls: type[DictionaryMethod], earlier: str | None):
    description: dict[str, Any] = build(cls).description()
    del description["hyperparameters"]["b_dec_init"]
    if earlier:
        description["hyperparameters"]["b_dec_init"] = earlier
    method = rebuilt(description)
    assert isinstance(method, DictionaryMethod)
    assert method.settings.b_dec_init == {None: "zeros", "zero": "zeros"}.get(earlier, earlier)


def test_reading_earlier_settings_changes_nothing_else():
    description = build_lca().description()
    description["hyperparameters"].pop("b_dec_init")
    method = rebuilt(description)
    assert isinstance(method, LCA) and method.hyperparameters() == build_lca().hyperparameters()
