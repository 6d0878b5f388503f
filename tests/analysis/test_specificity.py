"""Effective sets, counts and correlations of tables written by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from core.analysis.latent_scaling import LatentScaling
from core.analysis.specificity import Specificity, correlation, default_size, latent_table, mirrored
from core.kernels.codes import DenseCodes
from tests.analysis.test_latent_scaling import problem


def table(delta: list[float], nu_error: list[float], nu_reconstruction: list[float], n: Any = 1000) -> pd.DataFrame:
    classes = ["chat_only" if d >= 0.9 else "base_only" if d <= 0.1 else "shared" if 0.4 <= d <= 0.6 else "other"
               for d in delta]  # fmt: skip
    columns = {"delta": delta, "class": classes, "n_active": n, "nu_error": nu_error}
    return pd.DataFrame(columns | {"nu_reconstruction": nu_reconstruction})


HAND = table(
    delta=[0.95, 0.97, 0.92, 0.99, 0.5, 0.55, 0.45, 0.0],
    nu_error=[0.0, 0.1, 0.6, 0.1, 1.0, 0.9, 1.1, 0.0],
    nu_reconstruction=[0.1, 0.8, 0.1, 0.2, 1.0, 0.7, 0.9, 0.0],
    n=[1000, 1000, 1000, 99, 1000, 1000, 1000, 1000],
)


def test_specific_needs_both_ratios_and_enough_activations():
    """Latent 1 is decoupled, latent 2 shrunk, latent 3 fires too rarely. Latent 7 is base-only: its ratios are low, and
    it is specific by them, whatever its class."""
    found = Specificity.of(HAND, n=None, by_class=True)
    assert found.effective.tolist() == [True] * 4 + [False] * 4 and not found.is_ranked
    assert found.specific.tolist() == [True, False, False, False, False, False, False, True]
    assert found.chosen().tolist() == [True, True, True, False, False, False, False, False]


def test_without_a_chat_only_latent_the_highest_relative_norms_are_compared():
    few = HAND[HAND["class"] != "chat_only"].reset_index(drop=True)
    found = Specificity.of(few, n=2, by_class=True)
    assert found.is_ranked and found.effective.tolist() == [True, True, False, False]


def test_dead_latents_and_those_without_a_relative_norm_are_never_compared():
    given = table([0.9, np.nan, 0.8, 0.7], [0.0] * 4, [0.0] * 4, n=[0, 500, 500, 500])
    assert Specificity.of(given, n=2, by_class=False).effective.tolist() == [False, False, True, True]


def test_the_size_of_the_set_is_the_papers_share_and_at_least_fifty():
    assert default_size(73_728) == 3205 and default_size(1024) == 50 and default_size(30) == 30


def test_the_curve_counts_what_is_below_one_threshold_in_both():
    """Larger |nu| of the judged effective latents: 0.1, 0.8, 0.6; thresholds are 0, 1/99, ..."""
    curve = Specificity.of(HAND, n=None, by_class=True).counts_by_threshold()
    assert curve[0] == 0 and curve[int(0.3 * 99)] == 1 and curve[int(0.7 * 99)] == 2 and curve[-1] == 3


def test_the_overlap_by_hand():
    """nu of shared latents 0, 1, ..., 100: the central half is 25 to 75, of 0, 50, 80 and 30 two lie in it."""
    shared = list(range(101))
    nu: list[float] = [0, 50, 80, 30, *shared]
    found = Specificity.of(table([0.95] * 4 + [0.5] * 101, nu, nu), n=None, by_class=True)
    assert found.overlap(0.5) == 0.5 and found.overlap(0.95) == 0.75
    assert found.overlap(0.5, name="base_only") is None


def test_ranks_and_their_sum_leave_out_ratios_out_of_range():
    given = table([0.99, 0.98, 0.97, 0.96], [0.1, 0.0, 0.3, 5.0], [0.0, 0.2, 0.1, 0.0])
    found = Specificity.of(given, n=4, by_class=False)
    assert found.ranked.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(found.rank_sum(), [2 + 1, 1 + 3, 3 + 2, np.nan])
    assert found.scores("rank_sum").tolist()[:3] == [-3, -4, -5]
    assert found.scores("delta").tolist() == given["delta"].tolist()


def test_where_the_rankings_agree_all_correlations_are_one_and_the_lowest_are_first():
    delta = np.linspace(0.99, 0.5, 120)
    nu = (1 - delta).tolist()
    found = Specificity.of(table(delta.tolist(), nu, nu, n=list(range(100, 220))), n=120, by_class=False)
    r = found.correlations()
    for name in ("spearman_delta_rank_sum", "correlation_delta_nu_error", "spearman_delta_nu_reconstruction"):
        assert r[name] == pytest.approx(1)
    assert found.ranks_of_lowest().tolist() == list(range(100))


def test_where_the_relative_norm_says_nothing_the_lowest_are_spread():
    draw = np.random.default_rng(0)
    nu = draw.random(1000).tolist()
    found = Specificity.of(table(draw.uniform(0.5, 1, 1000).tolist(), nu, nu), n=1000, by_class=False)
    assert abs(found.correlations()["spearman_delta_rank_sum"]) < 0.1
    assert found.ranks_of_lowest()[:5].max() > 10 and found.ranks_of_lowest()[-1] > 900


def test_a_correlation_of_constants_or_of_two_values_is_none():
    assert correlation([1, 1, 1], [1, 2, 3]) is None and correlation([1, 2], [1, 2]) is None
    assert correlation([1, 2, 3], [2, 4, 7], rank=True) == pytest.approx(1)


def test_the_mirrored_table_is_that_of_the_exchanged_models():
    weights, x, f = problem()
    sums, other = LatentScaling(weights), LatentScaling(weights.swapped())
    sums.add(x, DenseCodes(f))
    other.add(x.flip(1), DenseCodes(f))
    made, wanted = mirrored(latent_table(weights.W_dec, sums)), latent_table(weights.swapped().W_dec, other)
    pd.testing.assert_frame_equal(made, wanted[list(made.columns)])


def test_the_table_holds_both_probes():
    weights, x, f = problem()
    sums = LatentScaling(weights)
    sums.add(x, DenseCodes(f))
    made = latent_table(weights.W_dec, sums)
    for probe, prefix in (("chat", ""), ("base", "base_probe_")):
        result = sums.result(probe)  # type: ignore[arg-type]
        np.testing.assert_allclose(made[f"{prefix}nu_error"], result.nu("error"))
        np.testing.assert_allclose(made[f"{prefix}beta_reconstruction_base"], result.beta["reconstruction"][:, 0])
    assert (made["n_active"] == (f > 0).sum(0).numpy()).all() and torch.is_tensor(weights.W_dec)
