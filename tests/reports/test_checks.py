import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reports.checks import compare, make_check
from reports.checks.base import side_by_side
from reports.checks.outcomes import Effect, Finding, Region, ends, spelled
from reports.claims import Claim, ExperimentRows, Paper
from reports.collect import Cell
from reports.draws import Draws
from reports.verdicts import judge, rule, verdict

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


EVERY_SEED = Draws("seed", "seed")
ROW = {
    "id": "toy/1",
    "origin": "own",
    "experiment": "toy",
    "statement": "",
    "where": "",
    "source": "",
    "confidence": "",
}


def judged_as(rows, check, results, scale, n_failed=0, ranges=None, **claim):
    paper = Paper(name="toy", title="", short="", experiments={"toy": rows}, claims=[], ranges=ranges or {})
    return judge(paper, Claim(**ROW, paper_note="none", check=check, **claim), scale, results, n_failed)


def judged(check, results, scale="demo", n_failed=0, **claim):
    return judged_as(ExperimentRows(match=MATCH, draws=EVERY_SEED), check, results, scale, n_failed, **claim)


def pairs_of(batchtopk, topk, k=8):
    """Cells of two methods, one for each seed."""
    ours = [cell("BatchTopK", seed, k, nmse=value) for seed, value in enumerate(batchtopk)]
    return ours + [cell("TopK", seed, k, nmse=value) for seed, value in enumerate(topk)]


def test_a_direction_that_shows_at_every_setting_agrees():
    cells = pairs_of([0.9, 0.8, 0.85], [1.0] * 3) + pairs_of([0.45, 0.4, 0.425], [0.5] * 3, k=16)
    found = judged(BETTER, cells)
    assert found.verdict == "direction agrees"
    # per seed -10, -20 and -15 %, the same at both k; t(0.975, 2) = 4.3027 times a standard error of 5 % / sqrt 3
    assert found.ours.startswith("mean 15.0% lower [2.6%, 27.4%]; weakest: 15.0% lower [2.6%, 27.4%] (bundled, dict")
    assert found.ours.endswith("; 2 of 2 hold; 3 seeds (3 draws of data, 3 of initialisation)")
    assert judged(BETTER, cells, scale="paper").verdict == "agrees"


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5), st.sampled_from(["demo", "paper"]))
def test_a_reversed_direction_never_agrees(worse, scale):
    cells = pairs_of([1.0] * len(worse), worse)
    assert judged(BETTER, cells, scale).word in ("disagrees", "inconclusive")
    assert judged({**BETTER, "expect": "higher"}, cells, scale).word in ("agrees", "direction agrees", "inconclusive")
    mixed = cells + pairs_of([0.1], [0.2], k=16)
    assert judged(BETTER, mixed, scale).word in ("partly", "inconclusive")


def test_equal_values_do_not_show_a_direction():
    assert judged(BETTER, pairs_of([1.0], [1.0])).verdict == "disagrees (one value)"


def test_one_seed_gives_a_difference_without_an_interval():
    found = judged(BETTER, pairs_of([0.9], [1.0]))
    assert found.ours == "10.0% lower; 1 seed (1 draw of data, 1 of initialisation); n = 1"
    assert found.n_seeds == 1 and found.one_value and found.verdict == "direction agrees (one value)"


# a, b of each seed; the outcome of "a is lower than b", and how many independent values it stands on
DIRECTIONS = [
    ([0.90, 0.80, 0.85], "holds", 3),  # -.15 [-.274, -.026]
    ([1.10, 1.20, 1.15], "fails", 3),
    ([0.90, 1.10, 0.85], "inconclusive", 3),  # -.05 [-.379, .279]
    ([0.90], "holds", 1),
    ([1.10], "fails", 1),
    ([1.00], "fails", 1),  # equal is not lower
    ([0.90, 0.80], "inconclusive", 2),  # -.15 +- 12.706 * .05
    ([0.90, 0.901], "holds", 2),  # -.0995 +- 12.706 * .0005
    ([0.90, 0.90, 0.90], "holds", 1),  # one value, three times
    ([1.10, 1.10, 1.10], "fails", 1),
    ([0.90, 0.90, 0.90, 1.10], "inconclusive", 4),  # -.05 [-.209, .109]
]


@pytest.mark.parametrize(("values", "outcome", "n"), DIRECTIONS)
def test_a_direction_holds_or_fails_if_its_interval_does_not_cross_0(values, outcome, n):
    [found] = judged(BETTER, pairs_of(values, [1.0] * len(values))).findings
    assert (found.outcome, found.effect.n, found.single) == (outcome, n, n == 1)
    assert math.isnan(found.effect.low) == (n == 1)


WITHIN = {"kind": "within", "metric": "mcc", "methods": ["SC"], "at_least": 0.5, "at_most": 0.8}
BOUNDS = [
    ([0.70, 0.72, 0.74], "holds", 3),  # .72 +- 4.3027 * .02 / sqrt 3 = .0497
    ([0.40, 0.42, 0.44], "fails", 3),
    ([0.90, 0.92, 0.94], "fails", 3),
    ([0.50, 0.52, 0.54], "inconclusive", 3),  # every value is inside, the interval is not
    ([0.79, 0.81, 0.77], "inconclusive", 3),
    ([0.50], "holds", 1),  # the bound belongs to what is accepted
    ([0.49], "fails", 1),
    ([0.80, 0.80], "holds", 1),
    ([0.65, 0.66], "holds", 2),  # .655 +- .0635
    ([0.55, 0.56], "inconclusive", 2),  # .555 +- .0635
]


@pytest.mark.parametrize(("values", "outcome", "n"), BOUNDS)
def test_a_bound_holds_or_fails_if_its_interval_does_not_cross_it(values, outcome, n):
    [found] = judged_codes(WITHIN, over_seeds("SC", values)).findings
    assert (found.outcome, found.effect.n) == (outcome, n)


EQUAL = {"kind": "near", "metric": "mcc", "over": ["method"], "because": "ours", "margin": 0.05, "runs": 5}
EQUALITIES = [
    ([0.69, 0.71, 0.70], [0.7], "holds"),  # 0 +- 2.92 * .01 / sqrt 3 = .0169
    ([0.60, 0.61, 0.62], [0.7], "fails"),  # -.09 +- .0169
    ([0.66, 0.68, 0.70], [0.7], "inconclusive"),  # -.02 +- .0337 reaches -.0537, though no mean is off by more than .02
    ([0.70, 0.70, 0.70], [0.7], "holds"),  # one value
    ([0.64], [0.7], "fails"),
    ([0.69, 0.71, 0.70], [0.7, 0.05, 0.02], "holds"),  # the published spread counts: +- .0207
    ([0.69, 0.71, 0.70], [0.7, 0.05, 0.06], "inconclusive"),  # +- .0573: se .02745, t(.95, 4.4) = 2.09
]


@pytest.mark.parametrize(("values", "point", "outcome"), EQUALITIES)
def test_a_mean_is_equal_to_a_published_number_if_the_90_percent_interval_lies_within_the_margin(
    values, point, outcome
):
    [found] = judged_codes({**EQUAL, "points": [["SC", *point]]}, over_seeds("SC", values)).findings
    assert found.outcome == outcome


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.6, 0.8), min_size=2, max_size=6, unique=True),
    st.floats(0.001, 0.1),
    st.sampled_from([None, 0.01, 0.05]),
)
def test_equal_means_that_both_one_sided_tests_reject_at_5_percent(values, margin, sd):
    """The same decision by scipy's tests: against margin below and above, with the published runs if they are known."""
    point = ["SC", 0.7, margin] if sd is None else ["SC", 0.7, margin, sd]
    [found] = judged_codes({**EQUAL, "points": [point]}, over_seeds("SC", values)).findings
    p = []
    for bound, alternative in ((0.7 - margin, "greater"), (0.7 + margin, "less")):
        if sd is None:
            p.append(stats.ttest_1samp(values, bound, alternative=alternative).pvalue)
        else:
            mean, own = np.mean(values), np.std(values, ddof=1)
            p.append(
                stats.ttest_ind_from_stats(
                    mean, own, len(values), bound, sd, 5, equal_var=False, alternative=alternative
                ).pvalue
            )
    if abs(max(p) - 0.05) > 1e-6:
        assert (found.outcome == "holds") == (max(p) < 0.05)


def test_a_published_spread_widens_the_interval_by_welch():
    """se^2 = .01^2 / 3 + .02^2 / 5 = 1.1333e-4, 5.96 degrees of freedom, t(.95) = 1.9452: +- .02071."""
    [found] = judged_codes(
        {**EQUAL, "points": [["SC", 0.7, 0.05, 0.02]]}, over_seeds("SC", [0.69, 0.71, 0.70])
    ).findings
    assert found.effect.high == pytest.approx(0.02071, abs=2e-5) and found.effect.low == pytest.approx(
        -0.02071, abs=2e-5
    )


def finding(outcome, single=False):
    effect = Effect(0.5, math.nan, math.nan, 1) if single else Effect(0.5, 0.4, 0.6, 3)
    n = effect.n
    return Finding(
        outcome=outcome, effect=effect, region=Region(), values=(0.5,) * n, n_seeds=n, n_data=n, n_initialisations=n
    )


H, F, U = finding("holds"), finding("fails"), finding("inconclusive")
H1, F1 = finding("holds", single=True), finding("fails", single=True)
VERDICTS = [
    ([H, H], "agrees"),
    ([H, F], "partly"),
    ([H, F, U], "partly"),
    ([F, F], "disagrees"),
    ([F, U], "disagrees"),
    ([H, U], "inconclusive"),
    ([U], "inconclusive"),
    ([H, None], "inconclusive"),  # one that could not be judged is undecided
    ([F, None], "disagrees"),
    ([None], "not run"),
    ([], "not run"),
    ([H1], "agrees (one value)"),
    ([F1], "disagrees (one value)"),
    ([H1, F1], "partly (one value)"),
    ([H, H1], "agrees (one value)"),
    ([H, F1], "partly (one value)"),  # without the single one it would agree
    ([H, F, F1], "partly"),  # it is partly so without the single one too
    ([F, F1], "disagrees"),
    ([F1, U], "disagrees (one value)"),
    ([H1, U], "inconclusive"),
]


@pytest.mark.parametrize(("findings", "word"), VERDICTS)
def test_the_verdict_of_a_claim_from_its_comparisons(findings, word):
    assert verdict(findings, "paper", 0, directed=False) == word
    assert verdict(findings, "demo", 0, directed=False) == word
    assert verdict(findings, "demo", 0, directed=True) == word.replace("agrees", "direction agrees").replace(
        "disdirection agrees", "disagrees"
    )


CHECKS = [
    {"kind": "paired", "metric": "mcc", "expect": "higher", "a": "SC", "b": "SAE"},
    {"kind": "paired", "metric": "mcc", "expect": "higher", "a": "SC", "b": "SAE", "every_seed": True},
    {"kind": "ordered", "metric": "mcc", "expect": "higher", "methods": ["SC", "MLP", "SAE"]},
    {"kind": "monotone", "metric": "mcc", "expect": "higher", "methods": ["SC"], "along": "source.N"},
    {"kind": "peak", "metric": "mcc", "expect": "higher", "methods": ["SC"], "along": "source.N", "at": [32]},
    {"kind": "margin", "metric": "mcc", "a": "SC", "b": "SAE", "at_least": -0.2, "at_most": 0.2},
    {"kind": "margin", "metric": "mcc", "a": "SC", "b": "SAE", "at_least": -0.2, "relative": True},
    WITHIN,
    {**EQUAL, "over": ["method", "source.N"], "points": [["SC", 16, 0.6, 0.2], ["SC", 32, 0.7, 0.2, 0.03]]},
]
MCC = st.floats(0, 1, allow_subnormal=False)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(CHECKS),
    st.dictionaries(
        st.tuples(st.sampled_from(["SC", "MLP", "SAE"]), st.sampled_from([16, 32])),
        st.lists(MCC, min_size=1, max_size=6),
        min_size=1,
    ),
    st.booleans(),
)
def test_agreement_means_that_every_interval_lies_in_its_region(check, values, clustered):
    cells = [cell for (method, N), mcc in values.items() for cell in over_seeds(method, mcc, N=N)]
    rows = ExperimentRows(match=CODES, draws=EVERY_SEED, clustered={"mcc": "a test"} if clustered else {})
    found = judged_as(rows, check, cells, "paper", ranges={"mcc": (0.0, 1.0)})
    known = [one for one in found.findings if one is not None]
    if found.word == "agrees":
        assert len(known) == len(found.findings)
        assert all(one.region.contains(*ends(one.effect)) for one in known)
        assert found.one_value == any(one.single for one in known)
    if found.word == "disagrees":
        assert not any(one.outcome == "holds" for one in known)
    for one in known:
        low, high = ends(one.effect)
        assert low <= one.effect.mean <= high and one.effect.n <= one.n_seeds
        if one.outcome == "inconclusive":
            assert one.effect.n > 1


def test_no_interval_leaves_what_a_metric_can_be():
    """.98, 1 and .99 have the t interval [.965, 1.015]: an MCC above 1 is not possible."""
    cells = over_seeds("SC", [0.98, 1.0, 0.99])
    rows = ExperimentRows(match=CODES, draws=EVERY_SEED)
    found = judged_as(rows, {**WITHIN, "at_most": 1.0}, cells, "paper", ranges={"m*": (0.0, 1.0)})
    assert found.ours.startswith("0.99 [0.965, 1]") and found.verdict == "agrees"
    unknown = judged_as(rows, {**WITHIN, "at_most": 1.0}, cells, "paper")
    assert unknown.ours.startswith("0.99 [0.965, 1.01]") and unknown.verdict == "inconclusive"
    near = {**EQUAL, "points": [["SC", 0.99, 0.0149]]}
    assert ends(judged_as(rows, near, cells, "paper", ranges={"m*": (0.0, 1.0)}).findings[0].effect)[1] <= 0.01 + 1e-12


def test_outcomes_in_clusters_are_shown_as_runs_and_must_all_agree():
    """Four runs found every code, one lost two. The t interval, [.854, .985], lies above each of them."""
    cells = over_seeds("SC", [0.943, 0.945, 0.942, 0.943, 0.825])
    rows = ExperimentRows(match=CODES, draws=EVERY_SEED, clustered={"mcc": "a code is lost or found"})
    check = {**WITHIN, "at_least": 0.84, "at_most": 1.0}
    found = judged_as(rows, check, cells, "paper")
    assert found.verdict == "inconclusive" and "[" not in found.ours
    assert found.ours.startswith("0.92 (runs 0.943, 0.945, 0.942, 0.943, 0.825)")
    assert judged_codes(check, cells).verdict == "agrees"  # by the interval alone
    assert judged_as(rows, {**check, "at_least": 0.8}, cells, "paper").verdict == "agrees"
    assert judged_as(rows, {**check, "at_least": 0.99}, cells, "paper").verdict == "disagrees"
    near = judged_as(rows, {**EQUAL, "points": [["SC", 0.92, 0.1]]}, cells, "paper")
    assert near.ours.startswith("SC 0.92 (runs 0.943, 0.945, 0.942, 0.943, 0.825)") and near.verdict == "agrees"


def test_a_solver_without_randomness_on_one_data_set_is_one_value_whatever_its_seeds():
    """Five `seeds` that differ in the last digit are no five draws. With data of their own they are."""
    rows = ExperimentRows(match=CODES, draws=Draws("source.per_run", "seed unless coder.solver"))

    def found(per_run, solver):
        cells = over_seeds("SC", [0.6 + 1e-9 * i for i in range(5)])
        for cell in cells:
            cell.settings.update({"source.per_run": per_run, "coder.solver": solver})
        [one] = judged_as(rows, WITHIN, cells, "paper").findings
        return one.effect.n, one.n_data, one.n_initialisations

    assert found(False, "ito") == (1, 1, 0)
    assert found(True, "ito") == (5, 5, 0)
    assert found(False, None) == (5, 1, 5)


def test_a_solver_beside_an_encoder_has_as_many_draws_as_the_encoder():
    rows = ExperimentRows(match=CODES, draws=Draws("source.per_run", "seed unless coder.solver"))
    cells = over_seeds("SC", [0.9, 0.9, 0.9]) + over_seeds("SAE", [0.5, 0.52, 0.54])
    for cell in cells[:3]:
        cell.settings["coder.solver"] = "ito"
    found = judged_as(rows, {**ABOVE, "at_least": 0.2}, cells, "paper")
    assert found.verdict == "agrees"
    assert found.ours == "+0.38 [+0.33, +0.43]; 3 seeds (1 draw of data, 3 of initialisation)"


def test_the_links_of_a_chain_have_no_mean():
    """The middle method scatters: both links are open, though their mean over links is the same for every seed."""
    cells = over_seeds("ITO", [0.9] * 3) + over_seeds("MLP", [0.95, 0.5, 0.7]) + over_seeds("SAE", [0.4] * 3)
    check = {"kind": "ordered", "metric": "mcc", "expect": "higher", "methods": ["ITO", "MLP", "SAE"]}
    found = judged_codes(check, cells)
    assert found.verdict == "inconclusive" and "mean" not in found.ours
    assert (
        found.ours.startswith("weakest link: 79.2% higher [-60.9%, 219.2%] (MLP and SAE")
        and "0 of 2 hold, 2 inconclusive" in found.ours
    )


def test_a_sign_test_counts_draws_and_is_given_where_it_can_show_something():
    """Three seeds at three settings are three draws: p cannot be below .25. Six are six, whatever the settings."""
    three = [one for k in (8, 16, 32) for one in pairs_of([0.9, 0.8, 0.85], [1.0] * 3, k)]
    assert "sign test" not in judged(BETTER, three).ours
    six = [one for k in (8, 16, 32) for one in pairs_of([0.9, 0.8, 0.85, 0.87, 0.88, 0.89], [1.0] * 6, k)]
    assert judged(BETTER, six).ours.endswith("sign test p = 0.031 (6 draws)")


def test_a_row_says_for_how_many_published_numbers_chance_is_near_enough():
    cells = [codes("SC", seed, mcc=0.5, chance=0.45) for seed in range(2)] + over_seeds("SAE", [0.9])
    check = {**NUMBERS, "points": [["SC", 0.5, 0.1], ["SAE", 0.9, 0.1]], "chance": "chance"}
    assert judged_codes(check, cells).ours.endswith("chance lies within the margin for 1 of 2 numbers")


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Effect(0.87712, 0.87704, 0.87719, 5), "0.87712 [0.87704, 0.87719]"),
        (Effect(0.87712, 0.8768, 0.8774, 5), "0.8771 [0.8768, 0.8774]"),
        (Effect(0.8771, math.nan, math.nan, 1), "0.877"),
        (Effect(0.5, 0.25, 0.75, 3), "0.5 [0.25, 0.75]"),
        (Effect(0.5, 0.25, 0.75, 3, (0.25, 0.75)), "0.5 (runs 0.25, 0.75)"),
    ],
)
def test_an_interval_is_never_written_as_one_number_twice(interval, text):
    assert spelled(interval, ".3g") == text


def test_the_rule_is_told_item_by_item():
    items = rule()
    assert len(items) == 9 and all(item.endswith(".") and "  " not in item for item in items)


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
    assert found.verdict == "inconclusive"
    assert "1 of 2 holds, 1 not judged" in found.ours


def test_failed_cells_are_named_and_are_all_there_is_to_say_without_results():
    assert judged(BETTER, pairs_of([0.9], [1.0]), n_failed=2).verdict == "direction agrees (one value); failed cells: 2"
    assert judged(BETTER, [], n_failed=2).verdict == "failed cells: 2"
    assert judged(BETTER, []).verdict == "not run"


def test_along_a_key_only_settings_of_a_series_count():
    """k 8 is there at two dictionary sizes, k 16 at one only, where the direction is reversed."""
    cells = pairs_of([0.9], [1.0]) + pairs_of([3.0], [1.0], k=16)
    cells += [cell("BatchTopK", 0, 8, 1024, nmse=0.8), cell("TopK", 0, 8, 1024, nmse=0.9)]
    assert judged({**BETTER, "along": "method.dict_size"}, cells).word == "direction agrees"
    assert judged({**BETTER, "along": "method.k"}, cells).word == "partly"


def test_monotone_compares_neighbours_in_the_order_of_the_numbers():
    falls = {"kind": "monotone", "metric": "nmse", "expect": "lower", "methods": ["TopK"], "along": "method.k"}
    cells = [cell("TopK", 0, k, nmse=value) for k, value in ((128, 0.1), (16, 0.3), (8, 0.4))]
    found = judged(falls, cells)
    assert [comparison.values for comparison in found.comparisons] == [(0.3, 0.4), (0.1, 0.3)]
    assert found.word == "direction agrees"
    bump = [*cells, cell("TopK", 0, 256, nmse=0.2)]
    assert judged(falls, bump).word == "partly"
    assert judged({**falls, "expect": "higher"}, cells).word == "disagrees"
    assert judged(falls, cells[:1]).verdict == "not run"


def jumprelu(l0, nmse, coefficient, seed=0):
    return cell("JumpReLU", seed, settings={"method.l0_coefficient": coefficient}, l0_mean=l0, nmse=nmse)


def test_interpolation_reads_the_other_curve_at_the_same_l0():
    """Linear in log L0: at L0 8, halfway between 4 and 16, the curve through 0.8 and 0.4 stands at 0.6."""
    curve = [jumprelu(4, 0.8, 0.2), jumprelu(16, 0.4, 0.1)]
    found = judged(AT_EQUAL_L0, [*curve, cell("BatchTopK", 0, 8, l0_mean=8.0, nmse=0.59)])
    assert found.comparisons[0].values == (0.59, pytest.approx(0.6))
    assert found.word == "direction agrees"
    assert judged(AT_EQUAL_L0, [*curve, cell("BatchTopK", 0, 8, l0_mean=8.0, nmse=0.61)]).word == "disagrees"


def test_interpolation_refuses_to_extrapolate():
    curve = [jumprelu(4, 0.8, 0.2), jumprelu(16, 0.4, 0.1)]
    outside = cell("BatchTopK", 0, 32, l0_mean=32.0, nmse=0.01)
    found = judged(AT_EQUAL_L0, [*curve, outside])
    assert found.verdict == "not run"
    assert found.comparisons[0].note == "JumpReLU reaches 4 to 16 on these seeds"
    inside = cell("BatchTopK", 0, 8, l0_mean=8.0, nmse=0.1)
    assert judged(AT_EQUAL_L0, [*curve, outside, inside]).verdict == "inconclusive"
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
    assert judged(check, close).word == "agrees"
    off = cell("BatchTopK", 0, 32, l0_mean=34.0)
    assert judged(check, [*close, off]).word == "partly"
    assert judged(check, [off]).word == "disagrees"
    assert judged({**check, "metric": "no_such"}, close).verdict == "not run"


def test_a_ratio_to_nothing_is_left_out():
    check = {"kind": "within", "metric": "kept", "methods": ["TopK"], "reference": "metrics.by_chance", "at_least": 2.0}
    nothing, some = cell("TopK", 0, 8, kept=0.7, by_chance=0.0), cell("TopK", 1, 8, kept=0.6, by_chance=0.2)
    assert judged(check, [nothing]).verdict == "not run"
    found = judged(check, [nothing, some])
    assert found.word == "agrees" and list(found.comparisons[0].pairs) == [1]


def test_cells_of_a_claim_are_chosen_by_their_settings():
    """JumpReLU has no k, so a condition on k lets it pass."""
    curve = [jumprelu(4, 0.8, 0.2), jumprelu(64, 0.4, 0.1)]
    ours = [cell("BatchTopK", 0, k, l0_mean=float(k), nmse=value) for k, value in ((8, 0.1), (16, 0.1), (32, 9.0))]
    assert judged(AT_EQUAL_L0, [*curve, *ours], cells={"demo": {"method.k": [8, 16]}}).word == "direction agrees"
    assert judged(AT_EQUAL_L0, [*curve, *ours], cells={"demo": {"method.k": 32}}).word == "disagrees"
    assert judged(AT_EQUAL_L0, [*curve, *ours], cells={"paper": {}}).verdict == "-"


def test_cells_that_differ_in_an_undeclared_setting_are_compared_within_it():
    cells = [
        cell(method, 0, 8, settings={"stream.n_tokens": n}, nmse=value + n / 10)
        for n in (1, 2)
        for method, value in (("BatchTopK", 0.9), ("TopK", 1.0))
    ]
    found = judged(BETTER, cells)
    assert found.word == "direction agrees"
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
    return judged_as(ExperimentRows(match=CODES, draws=EVERY_SEED), check, results, scale, **claim)


def over_seeds(method, values, metric="mcc", **settings):
    return [codes(method, seed, **{metric: value}, **settings) for seed, value in enumerate(values)]


def test_a_margin_is_judged_by_its_interval():
    cells = over_seeds("SC", [0.70, 0.72]) + over_seeds("SAE", [0.60, 0.60])
    found = judged_codes(ABOVE, cells)
    # differences 0.10 and 0.12: mean 0.11, half width 12.706 * 0.01
    assert found.ours == "+0.11 [-0.0171, +0.237]; 2 seeds (2 draws of data, 2 of initialisation)"
    assert found.verdict == "inconclusive"
    assert judged_codes({**ABOVE, "at_least": -0.02}, cells).verdict == "agrees"
    assert judged_codes({**ABOVE, "at_least": 0.24}, cells).verdict == "disagrees"
    assert judged_codes({**ABOVE, "at_least": -0.02, "at_most": 0.05}, cells).verdict == "inconclusive"
    assert judged_codes({**ABOVE, "at_least": -0.03, "relative": True}, cells).verdict == "agrees"


@given(st.floats(0, 1), st.floats(0, 1))
def test_at_demo_scale_a_margin_is_a_direction_and_an_interval_around_zero_nothing(a, b):
    cells = over_seeds("SC", [a]) + over_seeds("SAE", [b])
    assert (judged_codes(ABOVE, cells, "demo").verdict == "direction agrees (one value)") == (a > b)
    around = {**ABOVE, "at_least": -0.02, "at_most": 0.05}
    assert judged_codes(around, cells, "demo").verdict == "-"
    below = {"kind": "margin", "metric": "mcc", "a": "SC", "b": "SAE", "at_most": -0.1}
    assert (judged_codes(below, cells, "demo").verdict == "direction agrees (one value)") == (a < b)


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
    assert judged_codes({**ABOVE, "at_least": 0.3}, cells, cells=where).verdict == "agrees (one value)"
    assert judged_codes({**ABOVE, "at_least": 0.3}, cells).verdict == "partly (one value)"


def test_methods_in_an_order_are_compared_with_the_next():
    cells = [codes(method, mcc=value) for method, value in (("ITO", 0.9), ("MLP", 0.8), ("SAE", 0.85))]
    found = judged_codes(
        {"kind": "ordered", "metric": "mcc", "expect": "higher", "methods": ["ITO", "MLP", "SAE"]}, cells
    )
    assert [(c.label, c.values) for c in found.comparisons] == [
        ("ITO and MLP, N 16", (0.9, 0.8)),
        ("MLP and SAE, N 16", (0.8, 0.85)),
    ]
    assert found.word == "partly"
    two = {"kind": "ordered", "metric": "mcc", "expect": "higher", "methods": ["ITO", "SAE"]}
    assert judged_codes(two, cells).word == "agrees"


def test_a_method_beside_several_is_compared_with_each():
    cells = [codes(method, mcc=value) for method, value in (("ITO", 0.9), ("MLP", 0.95), ("SAE", 0.85))]
    check = {"kind": "paired", "metric": "mcc", "expect": "higher", "a": "ITO", "b": ["MLP", "SAE"]}
    found = judged_codes(check, cells)
    assert [(c.label, c.values) for c in found.comparisons] == [
        ("ITO and MLP, N 16", (0.9, 0.95)),
        ("ITO and SAE, N 16", (0.9, 0.85)),
    ]
    assert found.word == "partly"
    reversed_check = {**check, "a": ["MLP", "SAE"], "b": "ITO"}
    assert [c.values for c in judged_codes(reversed_check, cells).comparisons] == [(0.95, 0.9), (0.85, 0.9)]


def test_every_seed_must_show_the_direction_where_a_claim_says_so():
    """Three differences of .2, .22 and .24, and one of -.01: the interval is above 0, one seed is not."""
    check = {"kind": "paired", "metric": "mcc", "expect": "higher", "a": "SC", "b": "SAE"}
    shown = over_seeds("SC", [0.70, 0.72, 0.74]) + over_seeds("SAE", [0.5] * 3)
    cells = over_seeds("SC", [0.70, 0.72, 0.74, 0.73, 0.72, 0.49]) + over_seeds("SAE", [0.5] * 6)
    assert judged_codes({**check, "every_seed": True}, shown).verdict == "agrees"
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
    assert found.ours.startswith("+0.07") and "2 seeds" in found.ours
    assert found.word == "agrees"
    assert judged_codes(check, cells, "demo").word == "direction agrees"
    assert judged_codes({**check, "before": "other"}, cells).verdict == "not run"
    with pytest.raises(ValueError, match="at_least or at_most"):
        make_check(CODES, **{key: value for key, value in check.items() if key != "at_least"})


def test_a_peak_is_above_each_of_the_other_values():
    values = {0.01: [0.50, 0.51, 0.52], 0.5: [0.80, 0.70, 0.75], 1.0: [0.90, 0.91, 0.92]}
    cells = [cell for l1, mcc in values.items() for cell in over_seeds("SC", mcc, l1=l1)]
    check = {"kind": "peak", "metric": "mcc", "expect": "higher", "methods": ["SC"], "along": "coder.l1", "at": [1.0]}
    found = judged_codes(check, cells)
    assert [(c.label, c.pairs[0]) for c in found.comparisons] == [
        ("SC, N 16, at 1 and 0.01", (0.9, 0.5)),
        ("SC, N 16, at 1 and 0.5", (0.9, 0.8)),
    ]
    assert found.verdict == "agrees (one value)"  # .4 in every seed against the first, .1 to .21 against the other
    assert judged_codes({**check, "at": [0.5]}, cells).verdict == "partly"
    assert judged_codes({**check, "at": [0.01], "expect": "lower"}, cells).word == "agrees"
    assert judged_codes({**check, "at": [7.0]}, cells).verdict == "not run"


NUMBERS = {
    "kind": "near",
    "metric": "mcc",
    "over": ["method"],
    "because": "ours",
    "margin": 0.03,
    "points": [["SC", 0.69], ["SAE", 0.57, 0.1]],
}


def test_published_numbers_stand_beside_ours_with_a_margin_each():
    cells = over_seeds("SC", [0.700, 0.701]) + over_seeds("SAE", [0.65])
    found = judged_codes(NUMBERS, cells)
    assert found.verdict == "agrees (one value)"
    # t(.95, 1) = 6.314 times .0005
    assert found.ours == (
        "SC 0.7 (+0.0105 [+0.00734, +0.0137]), SAE 0.65 (+0.08); 2 of 2 hold; "
        "1 to 2 seeds (1 to 2 draws of data, 1 to 2 of initialisation); n = 1 in 1 of 2"
    )
    assert found.comparisons[0].label == "SC, N 16" and found.comparisons[1].published.margin == 0.1
    assert judged_codes({**NUMBERS, "margin": 0.005}, cells).verdict == "partly (one value)"
    assert judged_codes(NUMBERS, cells[:2]).verdict == "inconclusive"  # one number could not be compared
    assert judged_codes(NUMBERS, []).verdict == "not run"
    assert judged_codes(NUMBERS, cells, "demo").verdict == "-"
    assert make_check(CODES, **NUMBERS).published == "SC 0.69 ± 0.03, SAE 0.57 ± 0.1 (± ours)"


def test_many_published_numbers_are_summed_up():
    table = {
        **NUMBERS,
        "margin": 0.035,
        "over": ["method", "source.N"],
        "points": [["SC", N, 0.5] for N in range(8)],
    }
    cells = [codes("SC", N=N, mcc=0.5 + N / 100) for N in range(8)]
    found = judged_codes(table, cells)
    assert found.verdict == "partly (one value)"
    assert found.ours.startswith("+0.035 from the numbers on average, 0.035 without signs; weakest: +0.07 (SC, N 7)")
    assert "4 of 8 hold, 4 fail" in found.ours
    assert make_check(CODES, **table).published == "8 numbers, setting by setting, within 0.035 (ours)"


@pytest.mark.parametrize(
    "points",
    [[["SC"]], [["SC", 0.1, 0.2, 0.3]], [["SC", 0.1, 0.2, 0.3, 4]], [["SC", 0.1, 0.0]], [["SC", "1e9"]], ["SC"], []],
)
def test_a_published_number_needs_its_keys_a_margin_and_how_many_runs_its_spread_is_of(points):
    with pytest.raises(ValueError, match="points"):
        make_check(CODES, **{**NUMBERS, "points": points})


@pytest.mark.parametrize("n_failed", [0, 2])
def test_failures_stand_beside_the_verdict(n_failed):
    word = verdict([H], "paper", n_failed, directed=True)
    assert word == ("agrees; failed cells: 2" if n_failed else "agrees")


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
