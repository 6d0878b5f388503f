from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.checks import compare, make_check
from reports.checks.base import side_by_side
from reports.claims import Claim, ExperimentRows, Paper
from reports.collect import Cell
from reports.verdicts import judge, verdict

MATCH = ["model.name", "method.dict_size", "method.k", "method.l0_coefficient"]
BETTER = {"kind": "paired", "metric": "nmse", "expect": "lower", "a": "BatchTopK", "b": "TopK"}
AT_EQUAL_L0 = {
    "kind": "interpolated",
    "metric": "nmse",
    "expect": "lower",
    "a": "BatchTopK",
    "b": "JumpReLU",
    "knobs": ["method.k", "method.l0_coefficient"],
}


def cell(method, seed=0, k=None, dict_size=512, model="bundled", settings=None, **metrics):
    found = {
        "method._target_": f"core.methods.x.{method}",
        "method.dict_size": dict_size,
        "model.name": model,
        "seed": seed,
    }
    if k is not None:
        found["method.k"] = k
    found |= settings or {}
    folder = Path(f"{method}-{k}-{dict_size}-{seed}-{settings}")
    return Cell("toy", "demo", seed, folder, metrics, found, {})


def judged(check, results, scale="demo", n_failed=0, **claim):
    row = {"id": "toy/1", "experiment": "toy", "statement": "", "where": "", "source": "", "confidence": ""}
    paper = Paper(name="toy", title="", short="", experiments={"toy": ExperimentRows(match=MATCH)}, claims=[])
    return judge(paper, Claim(**row, paper_note="lower", check=check, **claim), scale, results, n_failed)


def pairs_of(batchtopk, topk, k=8):
    """Cells of two methods, one for each seed."""
    ours = [cell("BatchTopK", seed, k, nmse=value) for seed, value in enumerate(batchtopk)]
    return ours + [cell("TopK", seed, k, nmse=value) for seed, value in enumerate(topk)]


def test_a_direction_that_shows_at_every_setting_agrees():
    cells = pairs_of([0.9, 0.8], [1.0, 1.0]) + pairs_of([0.45, 0.4], [0.5, 0.5], k=16)
    found = judged(BETTER, cells)
    assert found.verdict == "direction agrees"
    # per seed -10 % and -20 %, the same at both k; t(0.975, 1) = 12.706 times a standard error of 5 %
    assert found.ours.startswith("15.0% lower [-48.5%, 78.5%], 2 seeds; 2 of 2 settings; sign test p = 0.12 (4 pairs)")
    assert judged(BETTER, cells, scale="paper").verdict == "agrees"


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5), st.sampled_from(["demo", "paper"]))
def test_a_reversed_direction_never_agrees(worse, scale):
    cells = pairs_of([1.0] * len(worse), worse)
    assert judged(BETTER, cells, scale).verdict == "disagrees"
    assert judged({**BETTER, "expect": "higher"}, cells, scale).verdict in ("agrees", "direction agrees")
    mixed = cells + pairs_of([0.1], [0.2], k=16)
    assert judged(BETTER, mixed, scale).verdict == "partly"


def test_equal_values_do_not_show_a_direction():
    assert judged(BETTER, pairs_of([1.0], [1.0])).verdict == "disagrees"


def test_one_seed_gives_a_difference_without_an_interval():
    found = judged(BETTER, pairs_of([0.9], [1.0]))
    assert found.ours.startswith("10.0% lower, 1 seed; 1 of 1 settings")
    assert found.n_seeds == 1


def test_seeds_are_paired_and_never_mixed():
    """Seed 1 of TopK is far lower than everything else; without its partner it must not count."""
    cells = [cell("BatchTopK", 0, 8, nmse=0.9), cell("TopK", 0, 8, nmse=1.0), cell("TopK", 1, 8, nmse=0.1)]
    [comparison] = judged(BETTER, cells).comparisons
    assert comparison.pairs == {0: (0.9, 1.0)}
    alone = [cell("BatchTopK", 0, 8, nmse=0.9), cell("TopK", 1, 8, nmse=1.0)]
    assert judged(BETTER, alone).verdict == "not run"


def test_a_setting_with_a_missing_partner_keeps_a_claim_from_agreeing():
    cells = [*pairs_of([0.9], [1.0]), cell("BatchTopK", 0, 16, nmse=0.5)]
    found = judged(BETTER, cells)
    assert found.verdict == "partly"
    assert "1 of 1 settings; 1 more not judged" in found.ours


def test_failed_cells_are_named_and_are_all_there_is_to_say_without_results():
    assert judged(BETTER, pairs_of([0.9], [1.0]), n_failed=2).verdict == "direction agrees; failed cells: 2"
    assert judged(BETTER, [], n_failed=2).verdict == "failed cells: 2"
    assert judged(BETTER, []).verdict == "not run"


def test_along_a_key_only_settings_of_a_series_count():
    """k 8 is there at two dictionary sizes, k 16 at one only, where the direction is reversed."""
    cells = pairs_of([0.9], [1.0]) + pairs_of([3.0], [1.0], k=16)
    cells += [cell("BatchTopK", 0, 8, 1024, nmse=0.8), cell("TopK", 0, 8, 1024, nmse=0.9)]
    assert judged({**BETTER, "along": "method.dict_size"}, cells).verdict == "direction agrees"
    assert judged({**BETTER, "along": "method.k"}, cells).verdict == "partly"


def test_monotone_compares_neighbours_in_the_order_of_the_numbers():
    falls = {"kind": "monotone", "metric": "nmse", "expect": "lower", "methods": ["TopK"], "along": "method.k"}
    cells = [cell("TopK", 0, k, nmse=value) for k, value in ((128, 0.1), (16, 0.3), (8, 0.4))]
    found = judged(falls, cells)
    assert [comparison.values for comparison in found.comparisons] == [(0.3, 0.4), (0.1, 0.3)]
    assert found.verdict == "direction agrees"
    bump = [*cells, cell("TopK", 0, 256, nmse=0.2)]
    assert judged(falls, bump).verdict == "partly"
    assert judged({**falls, "expect": "higher"}, cells).verdict == "disagrees"
    assert judged(falls, cells[:1]).verdict == "not run"


def jumprelu(l0, nmse, coefficient, seed=0):
    return cell("JumpReLU", seed, settings={"method.l0_coefficient": coefficient}, l0_mean=l0, nmse=nmse)


def test_interpolation_reads_the_other_curve_at_the_same_l0():
    """Linear in log L0: at L0 8, halfway between 4 and 16, the curve through 0.8 and 0.4 stands at 0.6."""
    curve = [jumprelu(4, 0.8, 0.2), jumprelu(16, 0.4, 0.1)]
    found = judged(AT_EQUAL_L0, [*curve, cell("BatchTopK", 0, 8, l0_mean=8.0, nmse=0.59)])
    assert found.comparisons[0].values == (0.59, pytest.approx(0.6))
    assert found.verdict == "direction agrees"
    assert judged(AT_EQUAL_L0, [*curve, cell("BatchTopK", 0, 8, l0_mean=8.0, nmse=0.61)]).verdict == "disagrees"


def test_interpolation_refuses_to_extrapolate():
    curve = [jumprelu(4, 0.8, 0.2), jumprelu(16, 0.4, 0.1)]
    outside = cell("BatchTopK", 0, 32, l0_mean=32.0, nmse=0.01)
    found = judged(AT_EQUAL_L0, [*curve, outside])
    assert found.verdict == "not run"
    assert found.comparisons[0].note == "JumpReLU reaches 4 to 16 on these seeds"
    inside = cell("BatchTopK", 0, 8, l0_mean=8.0, nmse=0.1)
    assert judged(AT_EQUAL_L0, [*curve, outside, inside]).verdict == "partly"
    assert judged(AT_EQUAL_L0, [inside]).verdict == "not run"


def test_interpolation_stays_within_a_dictionary_size_and_a_seed():
    other_seed = [jumprelu(4, 0.8, 0.2, seed=1), jumprelu(16, 0.4, 0.1, seed=1)]
    assert judged(AT_EQUAL_L0, [*other_seed, cell("BatchTopK", 0, 8, l0_mean=8.0, nmse=0.1)]).verdict == "not run"
    same_seed = [jumprelu(4, 0.8, 0.2), jumprelu(16, 0.4, 0.1)]
    other_size = cell("BatchTopK", 0, 8, 1024, l0_mean=8.0, nmse=0.1)
    assert judged(AT_EQUAL_L0, [*same_seed, other_size]).verdict == "not run"


def test_within_holds_a_ratio_in_an_interval():
    check = {
        "kind": "within",
        "metric": "l0_mean",
        "methods": ["BatchTopK"],
        "reference": "method.k",
        "at_least": 0.95,
        "at_most": 1.05,
    }
    close = [cell("BatchTopK", 0, 8, l0_mean=8.2), cell("BatchTopK", 0, 16, l0_mean=15.5)]
    assert judged(check, close).verdict == "agrees"
    off = cell("BatchTopK", 0, 32, l0_mean=34.0)
    assert judged(check, [*close, off]).verdict == "partly"
    assert judged(check, [off]).verdict == "disagrees"
    assert judged({**check, "metric": "no_such"}, close).verdict == "not run"


def test_a_ratio_to_nothing_is_left_out():
    check = {"kind": "within", "metric": "kept", "methods": ["TopK"], "reference": "metrics.by_chance", "at_least": 2.0}
    nothing, some = cell("TopK", 0, 8, kept=0.7, by_chance=0.0), cell("TopK", 1, 8, kept=0.6, by_chance=0.2)
    assert judged(check, [nothing]).verdict == "not run"
    found = judged(check, [nothing, some])
    assert found.verdict == "agrees" and list(found.comparisons[0].pairs) == [1]


def test_cells_of_a_claim_are_chosen_by_their_settings():
    """JumpReLU has no k, so a condition on k lets it pass."""
    curve = [jumprelu(4, 0.8, 0.2), jumprelu(64, 0.4, 0.1)]
    ours = [cell("BatchTopK", 0, k, l0_mean=float(k), nmse=value) for k, value in ((8, 0.1), (16, 0.1), (32, 9.0))]
    assert judged(AT_EQUAL_L0, [*curve, *ours], cells={"demo": {"method.k": [8, 16]}}).verdict == "direction agrees"
    assert judged(AT_EQUAL_L0, [*curve, *ours], cells={"demo": {"method.k": 32}}).verdict == "disagrees"
    assert judged(AT_EQUAL_L0, [*curve, *ours], cells={"paper": {}}).verdict == "-"


def test_cells_that_differ_in_an_undeclared_setting_are_compared_within_it():
    cells = [
        cell(method, 0, 8, settings={"stream.n_tokens": n}, nmse=value + n / 10)
        for n in (1, 2)
        for method, value in (("BatchTopK", 0.9), ("TopK", 1.0))
    ]
    found = judged(BETTER, cells)
    assert found.verdict == "direction agrees"
    assert [c.label for c in found.comparisons] == [
        "bundled, dict_size 512, k 8, n_tokens 1",
        "bundled, dict_size 512, k 8, n_tokens 2",
    ]


def test_cells_that_cannot_be_told_apart_are_not_judged():
    twice = [*pairs_of([0.9], [1.0]), cell("TopK", 0, 8, nmse=0.5)]
    found = judged(BETTER, twice)
    assert found.verdict == "cannot be judged"
    assert "TopK-8-512-0" in found.ours


def codes(method, seed=0, l1=None, N=16, objective=None, scale="paper", **metrics):
    """One run of a small sparse-coding experiment; a setting that is None is one the run does not know."""
    known = {"coder.l1": l1, "source.N": N, "objective": objective}
    settings = {"coder.name": method, **{key: value for key, value in known.items() if value is not None}}
    return Cell("toy", scale, seed, Path("stack"), metrics, settings, {})


CODES = ["source.N", "coder.l1", "objective"]
ABOVE = {"kind": "margin", "metric": "mcc", "a": "SC", "b": "SAE", "at_least": 0.08}


def judged_codes(check, results, scale="paper", **claim):
    row = {"id": "toy/1", "experiment": "toy", "statement": "", "where": "", "source": "", "confidence": ""}
    paper = Paper(name="toy", title="", short="", experiments={"toy": ExperimentRows(match=CODES)}, claims=[])
    return judge(paper, Claim(**row, paper_note="none", check=check, **claim), scale, results, 0)


def over_seeds(method, values, metric="mcc", **settings):
    return [codes(method, seed, **{metric: value}, **settings) for seed, value in enumerate(values)]


def test_a_margin_is_judged_by_its_mean_and_shown_with_its_interval():
    cells = over_seeds("SC", [0.70, 0.72]) + over_seeds("SAE", [0.60, 0.60])
    found = judged_codes(ABOVE, cells)
    assert found.verdict == "agrees"
    # differences 0.10 and 0.12: mean 0.11, half width 12.706 * 0.01
    assert found.ours == "+0.11 [-0.0171, +0.237], 2 seeds; 1 of 1 settings"
    assert judged_codes({**ABOVE, "at_least": 0.12}, cells).verdict == "disagrees"
    assert judged_codes({**ABOVE, "at_least": -0.02, "at_most": 0.05}, cells).verdict == "disagrees"
    assert judged_codes({**ABOVE, "at_least": 0.18, "relative": True}, cells).verdict == "agrees"


@given(st.floats(0, 1), st.floats(0, 1))
def test_at_demo_scale_a_margin_is_a_direction_and_an_interval_around_zero_nothing(a, b):
    cells = over_seeds("SC", [a]) + over_seeds("SAE", [b])
    assert (judged_codes(ABOVE, cells, "demo").verdict == "direction agrees") == (a > b)
    around = {**ABOVE, "at_least": -0.02, "at_most": 0.05}
    assert judged_codes(around, cells, "demo").verdict == "-"
    below = {"kind": "margin", "metric": "mcc", "a": "SC", "b": "SAE", "at_most": -0.1}
    assert (judged_codes(below, cells, "demo").verdict == "direction agrees") == (a < b)


def test_a_margin_of_two_metrics_compares_a_method_with_itself():
    fall = {"kind": "margin", "metric": "peak", "b_metric": "mcc", "a": "SAE", "b": "SAE", "at_least": 0.03}
    [comparison] = judged_codes(fall, [codes("SAE", mcc=0.61, peak=0.71)]).comparisons
    assert comparison.pairs == {0: (0.71, 0.61)}


def test_a_setting_that_a_method_does_not_have_does_not_keep_it_from_being_compared():
    """The oracle has no penalty: it is compared with each of the other's. N is a setting of both and must agree."""
    cells = [codes("FISTA", l1=0.01, mcc=0.98), codes("FISTA", l1=0.5, mcc=0.95), codes("oracle", mcc=1.0)]
    check = {"kind": "paired", "metric": "mcc", "expect": "lower", "a": "FISTA", "b": "oracle"}
    found = judged_codes(check, cells)
    assert [(c.label, c.pairs) for c in found.comparisons] == [
        ("N 16, l1 0.01", {0: (0.98, 1.0)}),
        ("N 16, l1 0.5", {0: (0.95, 1.0)}),
    ]
    elsewhere = judged_codes(check, [*cells[:2], codes("oracle", N=32, mcc=1.0)])
    assert elsewhere.verdict == "not run" and len(elsewhere.comparisons) == 3


def test_a_setting_that_is_null_is_not_one_that_is_unknown():
    uniform, zipf = (codes("SAE", mcc=0.5), codes("SAE", mcc=0.4))
    uniform.settings["objective"], zipf.settings["objective"] = None, "zipf"
    other = codes("SC", mcc=0.6)
    other.settings["objective"] = None
    [(_, ours, theirs), (_, _, alone)] = side_by_side([other], [uniform, zipf], ("objective",))
    assert (ours[0], theirs[0], alone[0]) == (other, uniform, zipf)
    found = judged_codes(ABOVE, [uniform, zipf, other], cells={"paper": {"objective": None}})
    assert [c.pairs for c in found.comparisons] == [{0: (0.6, 0.5)}]


def test_cells_of_a_claim_may_be_any_of_several_settings():
    cells = [
        c
        for N, gain in ((16, 0.0), (32, 0.4), (64, 0.5))
        for c in (codes("SC", N=N, mcc=0.4 + gain), codes("SAE", N=N, mcc=0.4))
    ]
    where = {"paper": [{"source.N": 32}, {"source.N": 64}]}
    assert judged_codes({**ABOVE, "at_least": 0.3}, cells, cells=where).verdict == "agrees"
    assert judged_codes({**ABOVE, "at_least": 0.3}, cells).verdict == "partly"


def test_methods_in_an_order_are_compared_with_the_next():
    cells = [codes(method, mcc=value) for method, value in (("ITO", 0.9), ("MLP", 0.8), ("SAE", 0.85))]
    found = judged_codes(
        {"kind": "ordered", "metric": "mcc", "expect": "higher", "methods": ["ITO", "MLP", "SAE"]}, cells
    )
    assert [(c.label, c.values) for c in found.comparisons] == [
        ("ITO and MLP, N 16", (0.9, 0.8)),
        ("MLP and SAE, N 16", (0.8, 0.85)),
    ]
    assert found.verdict == "partly"
    assert (
        judged_codes({"kind": "ordered", "metric": "mcc", "expect": "higher", "methods": ["ITO", "SAE"]}, cells).verdict
        == "agrees"
    )


def test_every_seed_must_show_the_direction_where_a_claim_says_so():
    cells = over_seeds("SC", [0.7, 0.5]) + over_seeds("SAE", [0.4, 0.6])
    check = {"kind": "paired", "metric": "mcc", "expect": "higher", "a": "SC", "b": "SAE"}
    assert judged_codes(check, cells).verdict == "agrees"
    assert judged_codes({**check, "every_seed": True}, cells).verdict == "disagrees"


def test_a_change_compares_a_method_with_itself_at_two_values_of_a_setting():
    cells = over_seeds("SAE", [0.87, 0.88], objective="cosine") + over_seeds("SAE", [0.80, 0.81], objective="mse")
    check = {
        "kind": "change",
        "metric": "mcc",
        "methods": ["SAE", "MLP"],
        "along": "objective",
        "before": "mse",
        "after": "cosine",
        "at_least": 0.03,
    }
    found = judged_codes(check, cells)
    assert found.ours == "+0.07 [+0.07, +0.07], 2 seeds; 1 of 1 settings"
    assert found.verdict == "agrees"
    assert judged_codes(check, cells, "demo").verdict == "direction agrees"
    assert judged_codes({**check, "before": "other"}, cells).verdict == "not run"
    with pytest.raises(ValueError, match="at_least or at_most"):
        make_check(CODES, **{key: value for key, value in check.items() if key != "at_least"})


def test_a_peak_is_where_it_is_claimed_to_be():
    values = {0.01: [0.5, 0.6], 0.5: [0.8, 0.7], 1.0: [0.7, 0.9]}
    cells = [cell for l1, mcc in values.items() for cell in over_seeds("SC", mcc, l1=l1)]
    check = {"kind": "peak", "metric": "mcc", "expect": "higher", "methods": ["SC"], "along": "coder.l1", "at": [1.0]}
    found = judged_codes(check, cells)
    assert [(c.label, c.pairs) for c in found.comparisons] == [("SC, N 16, at 1", {0: (0.7, 0.8), 1: (0.9, 0.7)})]
    assert found.verdict == "agrees"  # 0.80 against 0.75
    assert judged_codes({**check, "at": [0.5]}, cells).verdict == "disagrees"
    assert judged_codes({**check, "at": [0.01], "expect": "lower"}, cells).verdict == "agrees"
    assert judged_codes({**check, "at": [7.0]}, cells).verdict == "not run"


NUMBERS = {
    "kind": "near",
    "metric": "mcc",
    "over": ["method"],
    "tolerance": 0.03,
    "points": [["SC", 0.69], ["SAE", 0.57, 0.1]],
}


def test_published_numbers_stand_beside_ours_with_a_tolerance_each():
    cells = over_seeds("SC", [0.70, 0.72]) + over_seeds("SAE", [0.65])
    found = judged_codes(NUMBERS, cells)
    assert found.verdict == "agrees"
    assert found.ours == "SC 0.71 [0.583, 0.837], SAE 0.65, 1 seed at every setting (of 2); 2 of 2 settings"
    assert found.comparisons[0].label == "SC, N 16" and found.comparisons[1].tolerance == 0.1
    assert judged_codes({**NUMBERS, "tolerance": 0.01}, cells).verdict == "partly"
    assert judged_codes(NUMBERS, cells[:2]).verdict == "partly"  # one number could not be compared
    assert judged_codes(NUMBERS, []).verdict == "not run"
    assert judged_codes(NUMBERS, cells, "demo").verdict == "-"
    assert make_check(CODES, **NUMBERS).published == "SC 0.69, SAE 0.57"


def test_many_published_numbers_are_summed_up():
    table = {
        **NUMBERS,
        "tolerance": 0.035,
        "over": ["method", "source.N"],
        "points": [["SC", N, 0.5] for N in range(8)],
    }
    cells = [codes("SC", N=N, mcc=0.5 + N / 100) for N in range(8)]
    found = judged_codes(table, cells)
    assert found.verdict == "partly"
    assert found.ours.startswith("+0.035 from the numbers on average, 0.035 without signs, farthest +0.070 (SC, N 7)")
    assert found.ours.endswith("4 of 8 settings")
    assert make_check(CODES, **table).published == "8 numbers, setting by setting"


@pytest.mark.parametrize("points", [[["SC"]], [["SC", 0.1, 0.2, 0.3]], [["SC", 0.1, 0.0]]])
def test_a_published_number_needs_its_keys_and_a_tolerance(points):
    with pytest.raises(ValueError, match="points"):
        make_check(CODES, **{**NUMBERS, "points": points})


@given(
    st.lists(st.sampled_from([True, False, None]), max_size=6), st.sampled_from(["demo", "paper"]), st.integers(0, 2)
)
def test_agreement_needs_every_comparison(holds, scale, n_failed):
    word = verdict(holds, scale, n_failed, directed=True)
    if word.startswith(("agrees", "direction agrees")):
        assert holds and all(held is True for held in holds)
    assert ("failed cells" in word) == (n_failed > 0)
    assert not (scale == "demo" and word.startswith("agrees"))


def test_a_misspelt_check_is_refused():
    with pytest.raises(ValueError, match="kind: 'pared'"):
        make_check(MATCH, "pared")
    with pytest.raises(ValueError, match="expects"):
        make_check(MATCH, **{**BETTER, "expects": "lower"})
    with pytest.raises(ValueError, match="neither lower nor higher"):
        make_check(MATCH, **{**BETTER, "expect": "less"})
    with pytest.raises(ValueError, match="along"):
        make_check(MATCH, **BETTER, along="method.m")
    assert compare(make_check(MATCH, **BETTER), []) == []
