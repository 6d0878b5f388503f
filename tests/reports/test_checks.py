from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.checks import compare, make_check
from reports.claims import Claim, ExperimentRows, Paper, judge, load_paper, load_papers, verdict
from reports.collect import Cell

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
    paper = Paper(name="toy", title="", experiments={"toy": ExperimentRows(match=MATCH)}, claims=[])
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


def test_every_claim_in_the_repository_can_be_checked():
    claims = [claim for paper in load_papers() for claim in paper.claims]
    assert len({claim.id for claim in claims}) == len(claims) > 20


def test_a_papers_value_is_never_compared_with_demo_results(tmp_path):
    row = """
name: toy
title: Toy
experiments: {toy: {match: [method.k]}}
claims:
  - {id: toy/1, experiment: toy, statement: s, where: w, source: s, confidence: high, paper: 0.3,
     check: {kind: within, metric: nmse, methods: [TopK], at_most: 0.3}}
"""
    (tmp_path / "toy.yaml").write_text(row)
    with pytest.raises(ValueError, match=r"toy/1.*never compared with demo"):
        load_paper(tmp_path / "toy.yaml")
