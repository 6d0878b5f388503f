"""Stitching: closed forms against direct insertion, classes and recovery against a planted truth, walks whose ends are
the two dictionaries."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.analysis import stitching
from core.analysis.frankenstein import frankenstein
from core.analysis.stitch_path import Curve, StitchPath, insertion, insertion_in_order, interpolation, lowest, walk
from core.analysis.stitching import (
    DEAD,
    NOVEL,
    RECONSTRUCTION,
    UNDECIDED,
    LatentScores,
    components,
    error_and_bias,
    nearest,
    parents,
    predict_novel,
    score_latents,
)
from core.errors import UserError
from core.methods.base import DictionaryMethod
from core.methods.batchtopk import BatchTopK
from core.methods.pretrained import Pretrained
from core.methods.relu_l1 import ReluL1
from core.methods.saved import load_dictionary, save_dictionary
from core.methods.settings import settings_of
from core.methods.stitched import Stitched
from core.seeding import generator

COMMON: dict[str, Any] = {
    "lr": 1e-3, "betas": [0.9, 0.99], "decoder_norm": "none", "dead_after_tokens": 1000, "grad_clip": 1e5,
    "b_dec_init": "zeros", "warmup_steps": 0, "decay_fraction": 0.0, "path": "auto",
}  # fmt: skip


def relu(dict_size: int, d: int = 12, seed: int = 0, norm: str = "none", sparse: bool = True) -> ReluL1:
    """A ReLU dictionary with random weights, of which about one latent in ten (or in two) fires."""
    method = ReluL1(
        d_model=d, dict_size=dict_size, l1_coefficient=0.1, l1_warmup_steps=0, reconstruction="squared_error",
        subtract_b_dec=True, resample_every=0, input_norm=norm, seed=seed, **COMMON,
    )  # fmt: skip
    g = generator(seed, "weights", dict_size)
    with torch.no_grad():
        method.W_enc.copy_(torch.randn(dict_size, d, generator=g) / d**0.5)
        method.W_dec.copy_(torch.randn(dict_size, d, generator=g) / d**0.5)
        method.b_enc.fill_(-1.3 if sparse else 0.0)
        method.b_dec.copy_(0.1 * torch.randn(d, generator=g))
    return method.eval()


def batchtopk(dict_size: int, d: int = 12, seed: int = 0, k: int = 3, **changes: Any) -> BatchTopK:
    options = {
        "d_model": d, "dict_size": dict_size, "k": k, "use_enc_bias": False,
        "enc_init_norm": None, "threshold_rule": "posthoc_mean",
        "threshold_ema_rate": 0.01, "aux": "r1", "aux_coefficient": 1 / 32, "k_aux": 512, "input_norm": "none",
        "seed": seed, **COMMON, **changes,
    }  # fmt: skip
    method = BatchTopK(**options)
    method.threshold.fill_(0.8)
    return method.eval()


def rows(n: int, d: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed, "rows"))


def batches(n: int = 4, size: int = 64, d: int = 12) -> list[Tensor]:
    return list(rows(n * size, d).split(size))


PAIRS = {
    "relu": lambda: (relu(20), relu(40, seed=1)),
    "dense relu": lambda: (relu(20, sparse=False), relu(40, seed=1, sparse=False)),
    "batchtopk": lambda: (batchtopk(20), batchtopk(40, seed=1)),
    "relu into batchtopk, centred": lambda: (
        batchtopk(20, input_norm="token_center"),
        relu(40, seed=1, norm="token_center"),
    ),
}


# ---- single insertions


@pytest.mark.parametrize("pair", PAIRS)
def test_the_closed_form_is_the_change_by_direct_insertion(pair: str):
    small, large = PAIRS[pair]()
    scores = score_latents(small, large, batches())
    everything = torch.ones(small.dict_size, dtype=torch.bool)
    before = error_and_bias(small, batches())[0].mse
    for i in range(0, large.dict_size, 7):
        alone = torch.arange(large.dict_size) == i
        stitched = Stitched.of([(small, everything), (large, alone)], small.b_dec)
        change = error_and_bias(stitched, batches())[0].mse - before
        assert float(scores.delta_mse[i]) == pytest.approx(change, abs=2e-7)
    assert scores.metrics()["mse_small"] == pytest.approx(before, rel=1e-6)
    assert scores.metrics()["mse_large"] == pytest.approx(error_and_bias(large, batches())[0].mse, rel=1e-6)


def test_one_latent_by_hand():
    """x = (2, 0), nothing in the small dictionary; a latent with f = 1, w = (1, 0): error 4 -> 1, so dMSE = -3 / 2."""
    small, large = relu(1, d=2), relu(1, d=2, seed=1)
    with torch.no_grad():
        for method in (small, large):
            method.b_dec.zero_()
            method.b_enc.fill_(-1.0)
        small.W_enc.copy_(torch.tensor([[-1.0, 0.0]]))
        large.W_enc.copy_(torch.tensor([[1.0, 0.0]]))
        large.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
    scores = score_latents(small, large, [torch.tensor([[2.0, 0.0]])])
    assert scores.delta_mse.tolist() == [-1.5]
    assert scores.metrics() == {
        "n_rows_scored": 1.0, "mse_small": 2.0, "mse_large": 0.5, "l0_small": 0.0, "l0_large": 1.0,
    }  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(n_batches=st.integers(1, 9), n_blocks=st.integers(1, 5), size=st.integers(1, 20))
def test_scores_do_not_depend_on_how_rows_are_batched(n_batches: int, n_blocks: int, size: int):
    small, large = relu(10), relu(15, seed=1)
    x = rows(n_batches * size)
    together, apart = (score_latents(small, large, split, n_blocks) for split in ([x], x.split(size)))
    torch.testing.assert_close(together.delta_mse, apart.delta_mse, atol=1e-7, rtol=1e-5)
    assert torch.equal(together.fired, apart.fired) and together.total_rows == apart.total_rows


def test_scores_are_the_same_in_small_chunks(monkeypatch: pytest.MonkeyPatch):
    small, large = PAIRS["dense relu"]()
    whole = score_latents(small, large, batches())
    near, graph = nearest(small, large), components(small, large, 0.5)
    monkeypatch.setattr(stitching, "CHUNK_ENTRIES", 64)
    torch.testing.assert_close(score_latents(small, large, batches()).delta_mse, whole.delta_mse)
    torch.testing.assert_close(nearest(small, large).cosine, near.cosine)
    assert all(torch.equal(a, b) for a, b in zip(graph, components(small, large, 0.5), strict=True))


# ---- classes


def scores_of(changes: list[list[float]], fired: list[int]) -> LatentScores:
    K = len(changes)
    blocks = torch.tensor(changes, dtype=torch.float64)
    return LatentScores(blocks, torch.full((K,), 2.0, dtype=torch.float64), torch.tensor(fired), 1.0, 1.0, 1.0, 1.0, 4)


def test_classes_by_hand():
    """The same change in every block, up or down; one that goes either way; one seen in a single block; a dead one."""
    changes = [[-8.0, 8.0, (-1.0) ** block, -1.0 * (block == 0), 0.0] for block in range(16)]
    scores = scores_of(changes, [5, 5, 5, 1, 0])
    assert scores.delta_mse.tolist() == [-1.0, 1.0, 0.0, -1 / 128, 0.0]
    assert scores.classes(seed=0).tolist() == [NOVEL, RECONSTRUCTION, UNDECIDED, UNDECIDED, DEAD]


def test_the_bootstrap_covers_the_mean_and_depends_on_the_seed_alone():
    g = generator(0, "blocks")
    blocks = (3 + torch.randn(50, 400, generator=g, dtype=torch.float64)).tolist()
    scores = scores_of(blocks, [1] * 400)
    low, high = scores.interval(seed=1)
    covered = ((low < 3 / 8) & (high > 3 / 8)).double().mean()  # 2 rows of 4 coordinates in a block
    assert 0.9 < covered < 0.98
    assert torch.equal(low, scores.interval(seed=1)[0]) and not torch.equal(low, scores.interval(seed=2)[0])


# ---- decoder rows


def with_decoder(W_dec: list[list[float]], seed: int = 0) -> ReluL1:
    method = relu(len(W_dec), d=len(W_dec[0]), seed=seed)
    with torch.no_grad():
        method.W_dec.copy_(torch.tensor(W_dec))
    return method


def test_nearest_latents_and_components_by_hand():
    """Two of the large dictionary's latents lie at one of the small one's, one lies at a second, two apart from all."""
    small = with_decoder([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, -1.0]])
    large = with_decoder(
        [[2.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 1.0], [-1.0, -1.0, 0.0]], seed=1
    )
    near = nearest(small, large)
    torch.testing.assert_close(near.cosine, torch.tensor([1.0, 0.8, 1.0, 0.0, 0.0]))
    assert near.partner[:3].tolist() == [0, 0, 1]
    graph = components(small, large, 0.7)
    assert graph.large[0] == graph.large[1] == graph.small[0] and graph.large[2] == graph.small[1]
    assert graph.paired.sum() == 2 and sorted(graph.sizes.tolist()) == [1, 1, 1, 2, 3]
    joined = components(small, large, 0.6)  # the second latent now joins both
    assert joined.large[0] == joined.large[2] and joined.paired.sum() == 1
    apart = parents(near, 3, 0.6)  # with its most similar one alone
    assert apart.large[:3].tolist() == [0, 0, 1] and apart.paired.tolist() == [True, True, False, False, False]
    assert sorted(apart.sizes.tolist()) == [1, 1, 1, 2, 3]


def test_a_decoder_row_of_norm_zero_is_refused():
    with pytest.raises(UserError, match=r"large: 1 of 2 decoder rows are zero or not finite \(latents 1\)"):
        nearest(with_decoder([[1.0, 0.0]]), with_decoder([[1.0, 0.0], [0.0, 0.0]], seed=1))


def test_the_prediction_by_hand():
    """Novel at c = .1 .2 .6, others at c = .5 .8 .9: 8 of 9 pairs in order; best between .2 and .5 or .6 and .8."""
    cosine = torch.tensor([0.1, 0.2, 0.6, 0.5, 0.8, 0.9])
    found = predict_novel(cosine, torch.tensor([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    assert found is not None
    assert found.auc == pytest.approx(8 / 9)
    assert found.balanced_accuracy == pytest.approx(5 / 6) and found.balanced_accuracy_paper == pytest.approx(5 / 6)
    assert found.threshold in (pytest.approx(0.35), pytest.approx(0.7))
    assert found.spearman == pytest.approx(1 - 6 * 2 / (6 * 35))  # one neighbouring pair exchanged


def test_without_two_classes_there_is_no_prediction():
    assert predict_novel(torch.tensor([0.1, 0.2]), torch.tensor([-1.0, -2.0])) is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40))
def test_no_other_threshold_is_better_on_these_latents(latents: list[tuple[float, bool]]):
    c = np.array([value for value, _ in latents])
    novel = np.array([is_novel for _, is_novel in latents])
    found = predict_novel(torch.from_numpy(c), torch.from_numpy(np.where(novel, -1.0, 1.0)))
    if found is None:
        return

    def balanced(threshold: float) -> float:
        return float(((c < threshold)[novel].mean() + (c >= threshold)[~novel].mean()) / 2)

    assert max(map(balanced, [*c, 2.0])) == pytest.approx(found.balanced_accuracy)
    assert balanced(found.threshold) == pytest.approx(found.balanced_accuracy)


# ---- paths


@pytest.mark.parametrize("all_edges", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_an_interpolation_begins_and_ends_with_the_two_dictionaries(pair: str, all_edges: bool):
    small, large = PAIRS[pair]()
    near = nearest(small, large)
    graph = components(small, large, 0.6) if all_edges else parents(near, small.dict_size, 0.4)
    path = interpolation(near, graph, 5)
    curve = walk(small, large, batches(), {"way": path})["way"]
    for point, method in ((0, small), (-1, large)):
        alone = error_and_bias(method, batches())[0]
        assert float(curve.mse[point]) == pytest.approx(alone.mse, rel=1e-6)
        assert float(curve.mse_refit[point]) == pytest.approx(alone.mse_refit, rel=1e-5)
        assert float(curve.l0[point]) == pytest.approx(alone.l0, rel=1e-6)
    assert path.n_latents[[0, -1]].tolist() == [small.dict_size, large.dict_size]
    assert path.phases == ("insert",) * 5 + ("swap",) * 5 + ("remove",) * 5 + ("bias",)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_point_of_a_path_is_a_stitched_dictionary(pair: str):
    small, large = PAIRS[pair]()
    path = interpolation(nearest(small, large), components(small, large, 0.5), 3)
    curve = walk(small, large, batches(), {"way": path})["way"]
    for point in range(path.n_steps + 1):
        b_dec = large.b_dec if point >= path.bias_at else small.b_dec
        stitched = Stitched.of([(small, path.goes > point), (large, path.comes <= point)], b_dec)
        alone = error_and_bias(stitched, batches())[0]
        assert float(curve.mse[point]) == pytest.approx(alone.mse, rel=1e-5)
        assert float(curve.mse_refit[point]) == pytest.approx(alone.mse_refit, rel=1e-5)
        assert float(curve.l0[point]) == pytest.approx(alone.l0, rel=1e-6)
        assert int(path.n_latents[point]) == stitched.dict_size


def test_inserting_nothing_changes_nothing_and_a_set_is_inserted_at_once():
    small, large = PAIRS["relu"]()
    none, some = torch.zeros(40, dtype=torch.bool), torch.arange(40) % 3 == 0
    curves = walk(small, large, batches(), {"none": insertion(none, 20), "some": insertion(some, 20)})
    assert curves["none"].mse[0] == curves["none"].mse[1] and curves["none"].l0[0] == curves["none"].l0[1]
    direct = Stitched.of([(small, torch.ones(20, dtype=torch.bool)), (large, some)], small.b_dec)
    assert float(curves["some"].mse[1]) == pytest.approx(error_and_bias(direct, batches())[0].mse, rel=1e-6)


def test_latents_come_in_by_ascending_value_and_dead_ones_do_not():
    values = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.2])
    path = insertion_in_order(values, torch.tensor([True, True, True, True, False]), n_small=3, n_steps=2)
    assert path.comes.tolist() == [2, 1, 2, 1, 3] and path.n_latents.tolist() == [3, 5, 7]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12), m=st.integers(1, 24), seed=st.integers(0, 100), threshold=st.floats(0.05, 1.2),
    steps=st.integers(1, 6),
)  # fmt: skip
def test_an_interpolation_swaps_components_whole(n: int, m: int, seed: int, threshold: float, steps: int):
    small, large = relu(n, d=3, seed=seed), relu(m, d=3, seed=seed + 1000)
    near, graph = nearest(small, large), components(small, large, threshold)
    path = interpolation(near, graph, steps)
    swap = range(steps + 1, 2 * steps + 1)
    assert int(path.n_latents[-1]) == m and path.bias_at == path.n_steps
    for label in graph.paired.nonzero().flatten().tolist():
        when = {*path.comes[graph.large == label].tolist(), *path.goes[graph.small == label].tolist()}
        assert len(when) == 1 and when.pop() in swap
    alone = ~graph.paired[graph.large]
    assert torch.equal(alone, near.cosine < threshold) or n * m == 0
    first = path.comes[alone][near.cosine[alone].argsort()]
    assert bool((first.diff() >= 0).all()) and bool((first <= steps).all())
    assert bool((path.goes[~graph.paired[graph.small]] > 2 * steps).all())


# ---- stitched dictionaries


@pytest.mark.parametrize("pair", PAIRS)
def test_a_stitched_dictionary_of_everything_adds_both(pair: str):
    small, large = PAIRS[pair]()
    x = rows(50)
    both = Stitched.of([(m, torch.ones(m.dict_size, dtype=torch.bool)) for m in (small, large)], small.b_dec)
    normalised = small.norm(x)[0]
    expected = small.decode(small.encode(normalised)) + large.decode(large.encode(normalised)) - large.b_dec
    torch.testing.assert_close(both.decode(both.encode(normalised)), expected, atol=1e-5, rtol=1e-5)
    joined = torch.cat([m.encode(normalised).dense() for m in (small, large)], 1)
    torch.testing.assert_close(both.encode(normalised).dense(), joined)


def test_a_stitched_dictionary_is_stored_and_loaded(tmp_path):
    small, large = batchtopk(20), relu(40, seed=1)
    stitched = Stitched.of([(small, torch.arange(20) < 5), (large, torch.arange(40) % 2 == 0)], large.b_dec)
    nested = Stitched.of([(stitched, torch.arange(25) > 2), (relu(10, seed=2), torch.arange(10) > 7)], small.b_dec)
    save_dictionary(nested, {}, tmp_path / "stored")
    again = load_dictionary(tmp_path / "stored")
    assert isinstance(again, Stitched) and again.dict_size == 24
    assert torch.equal(again.reconstruct(rows(30)), nested.reconstruct(rows(30)))


def test_a_stitched_dictionary_is_not_trained_and_not_empty():
    small, _ = PAIRS["relu"]()
    with pytest.raises(UserError, match="without latents"):
        Stitched.of([(small, torch.zeros(20, dtype=torch.bool))], small.b_dec)
    with pytest.raises(UserError, match="Stitched is not trained"):
        settings_of({"_target_": "core.methods.stitched.Stitched"})


# ---- bad input


BAD: dict[str, tuple[DictionaryMethod, DictionaryMethod, str]] = {
    "other d": (relu(4, d=12), relu(8, d=6), "d_model=12, the large one 6"),
    "other normalisation": (relu(4), relu(8, norm="token_std"), "input_norm: the small dictionary has 'none'"),
}


@pytest.mark.parametrize("case", BAD)
def test_dictionaries_that_do_not_fit_together_are_refused(case: str):
    small, large, message = BAD[case]
    for attempt in (
        lambda: score_latents(small, large, batches()),
        lambda: nearest(small, large),
        lambda: walk(small, large, batches(), {"": insertion(torch.ones(8, dtype=torch.bool), 4)}),
        lambda: frankenstein([small, large], batches, seed=0),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_dictionaries_scaled_by_other_constants_or_of_other_sites_are_refused():
    small, large = relu(4, norm="scalar"), relu(8, norm="scalar")
    large.norm.scale.fill_(2.0)
    with pytest.raises(UserError, match="divide by 1 and 2"):
        score_latents(small, large, batches())
    small, large = relu(4), relu(8)
    elsewhere = [
        Pretrained.of(
            m.W_enc,
            m.W_dec,
            m.b_enc,
            m.b_dec,
            activation="relu",
            subtract_b_dec=True,
            source={"hook": f"resid_pre.{i}"},
        )
        for i, m in enumerate((relu(4), relu(8)))
    ]
    with pytest.raises(UserError, match=r"resid_pre\.0 and resid_pre\.1"):
        score_latents(*elsewhere, batches())


def test_one_dictionary_is_no_pair_and_no_family():
    one = relu(4)
    with pytest.raises(UserError, match="two of a family"):
        score_latents(one, one, batches())
    with pytest.raises(UserError, match="is no family"):
        frankenstein([one], batches, seed=0)


def test_nothing_to_score_on_and_too_few_blocks_are_refused():
    small, large = PAIRS["relu"]()
    with pytest.raises(UserError, match=r"raise evaluation\.n_rows"):
        score_latents(small, large, [])
    with pytest.raises(UserError, match="8 batches"):
        score_latents(small, large, batches(7)).classes(0)
    with pytest.raises(FloatingPointError, match="NaN"):
        score_latents(small, large, [torch.full((4, 12), torch.nan)])


def test_the_rule_of_training_is_refused():
    small, large = PAIRS["batchtopk"]()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        score_latents(small.train(), large, batches())


def test_a_path_counts_its_latents():
    path = StitchPath(torch.tensor([1, 3, 2]), torch.tensor([2, 3]), 2, ("a", "b"))
    assert path.n_latents.tolist() == [2, 3, 3]


def test_the_threshold_lies_where_the_error_is_lowest():
    values = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.2])
    path = insertion_in_order(values, torch.tensor([True, True, True, True, False]), n_small=3, n_steps=4)

    def at(*mse: float) -> float:
        return lowest(path, Curve(*[torch.tensor(mse)] * 3, shift=torch.zeros(5, 1)), values)

    assert at(5, 4, 3, 6, 7) == pytest.approx(0.4)  # after 0.1 and 0.3, before 0.5
    assert at(1, 4, 3, 6, 7) == pytest.approx(0.1) and at(5, 4, 3, 2, 1) > 0.9
