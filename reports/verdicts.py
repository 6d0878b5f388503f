"""What the results say about a claim: a verdict, our numbers, and the comparisons behind them.

The rule:

- Every comparison (one setting) is judged by itself, from one value for each independent draw. It holds if its interval
  lies wholly in what the check accepts, fails if it lies wholly outside, and is inconclusive if it crosses the bound.
- Intervals of bounds and directions are 95 % t intervals of the paired differences, ratios or values. A measured mean
  is equal to a published number by two one-sided tests at 5 %: the 90 % interval of measured minus published lies
  within the margin that the claim states. The spread of the published runs counts where it is known.
- Seeds that share their data and their initialisation are one draw. Where one value is left (one seed, a solver without
  randomness on one data set, a curve averaged over the seeds, values that are all the same) there is no spread, so no
  interval and no p. It is judged by its point, and says n = 1.
- An interval ends where the metric does, such as at an MCC of 1. Where outcomes come in clusters (a code is lost or
  found), the runs are shown in the place of an interval, and all of them must agree with it. A claim about every seed
  fails by one of them.
- Two seeds have an interval like any other number of them. It reaches 12.7 standard errors to either side, so two seeds
  decide only what is far from the bound.
- A sign test counts independent draws, each with its mean over settings. With fewer than six draws its p cannot be
  below .05, so it is not given. It never decides.
- Comparisons that share a side (links of a chain, a peak and its neighbours) are judged one by one and have no mean.
  The one that is nearest to failing is named.
- A claim agrees if all its comparisons hold. It is partly so if some hold and some fail, disagrees if some fail and
  none holds, and is inconclusive if none fails but not all hold. At demo scale "direction agrees" stands for a check of
  a direction.
- "(one value)" stands beside a verdict that rests on comparisons with n = 1: beside "agrees" if there is one, beside
  another word if it would be different without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from core.metrics.statistics import least_p, sign_test
from reports.checks import Check, Comparison, Near, compare
from reports.checks.base import over_settings
from reports.checks.outcomes import FAILS, HOLDS, INCONCLUSIVE, Finding, spread
from reports.checks.sizes import LISTED
from reports.claims import Claim, Paper, Scale
from reports.collect import Cell
from reports.matching import AmbiguousCellsError

AGREES, DIRECTION, PARTLY, DISAGREES = "agrees", "direction agrees", "partly", "disagrees"
UNDECIDED = "inconclusive"
NOT_RUN = "not run"
ONE_VALUE = " (one value)"
AMBIGUOUS = "cannot be judged"
NOT_APPLICABLE = "-"  # the claim is not judged at this scale
ALPHA = 0.05  # of the sign test


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the cells of one scale say about a claim."""

    verdict: str
    ours: str = ""
    n_seeds: int = 0  # the most of any comparison
    comparisons: Sequence[Comparison] = ()
    effects: Sequence[str] = ()  # in words, one for each comparison
    findings: Sequence[Finding | None] = ()  # None: not judged

    @property
    def word(self) -> str:
        """The verdict without the number of failed cells, and without whether it rests on one value."""
        return self.verdict.partition(";")[0].removesuffix(ONE_VALUE)

    @property
    def one_value(self) -> bool:
        """Whether the verdict rests on comparisons with one independent value."""
        return self.verdict.partition(";")[0].endswith(ONE_VALUE)


def judge(paper: Paper, claim: Claim, scale: Scale, cells: Sequence[Cell], n_failed: int) -> Judgement:
    """Judge a claim by the cells of its experiment at one scale. `n_failed` more cells ended in an error."""
    if scale not in claim.cells:
        return Judgement(verdict=NOT_APPLICABLE)
    check = paper.check(claim) if scale == "paper" else paper.check(claim).at_demo()
    if check is None:
        return Judgement(verdict=NOT_APPLICABLE)
    rows = paper.experiments[claim.experiment]
    try:
        comparisons = compare(check, [cell for cell in cells if claim.includes(cell, scale)])
    except AmbiguousCellsError as error:
        return Judgement(verdict=AMBIGUOUS, ours=str(error))
    clustered = check.metric in rows.clustered
    findings = [check.find(one, rows.draws, paper.ranges, clustered) if one.pairs else None for one in comparisons]
    judged = [(one, found) for one, found in zip(comparisons, findings, strict=True) if found is not None]
    return Judgement(
        verdict=verdict(findings, scale, n_failed, check.directed),
        ours=_ours(check, paper, claim, judged, len(comparisons)) if judged else "",
        n_seeds=max((found.n_seeds for _, found in judged), default=0),
        comparisons=comparisons,
        effects=[check.say(found.effect) if found else "" for found in findings],
        findings=findings,
    )


def verdict(findings: Sequence[Finding | None], scale: Scale, n_failed: int, directed: bool) -> str:
    """One word for all comparisons. None stands for one that could not be judged, which is undecided.

    The number of failed cells stands beside the verdict, or alone where nothing could be judged.
    """
    failures = f"failed cells: {n_failed}" if n_failed else ""
    judged = [found for found in findings if found is not None]
    if not judged:
        return failures or NOT_RUN
    outcomes = [found.outcome if found else INCONCLUSIVE for found in findings]
    firm = [INCONCLUSIVE if found is None else found.outcome for found in findings if not (found and found.single)]
    word = _word(outcomes)
    singles = any(found.single for found in judged)
    rests_on_one = singles and word != UNDECIDED and (word == AGREES or _word(firm) != word)
    if word == AGREES and scale == "demo" and directed:
        word = DIRECTION
    return "; ".join(part for part in (word + (ONE_VALUE if rests_on_one else ""), failures) if part)


def _word(outcomes: Sequence[str]) -> str:
    if outcomes and all(outcome == HOLDS for outcome in outcomes):
        return AGREES
    if FAILS not in outcomes:
        return UNDECIDED
    return PARTLY if HOLDS in outcomes else DISAGREES


def rule() -> list[str]:
    """The rule above, item by item, for the readers of a report."""
    _, _, items = (__doc__ or "").partition("The rule:")
    return [" ".join(item.split()) for item in items.split("\n- ")[1:]]


Judged = Sequence[tuple[Comparison, Finding]]


def _ours(check: Check, paper: Paper, claim: Claim, judged: Judged, n_comparisons: int) -> str:
    """Our numbers in words, from the comparisons that have pairs."""
    findings = [found for _, found in judged]
    outcomes = Counter(found.outcome for found in findings)
    counts = [f"{outcomes[HOLDS]} of {n_comparisons} {'holds' if outcomes[HOLDS] == 1 else 'hold'}"]
    counts += [_number(outcomes[FAILS], "fail")] if outcomes[FAILS] else []
    counts += [f"{outcomes[INCONCLUSIVE]} inconclusive"] if outcomes[INCONCLUSIVE] else []
    counts += [f"{n_comparisons - len(judged)} not judged"] if n_comparisons > len(judged) else []
    parts = [_summary(check, paper, claim, judged), ", ".join(counts) if n_comparisons > 1 else "", drawn(findings)]
    if singles := sum(found.single for found in findings):
        parts.append("n = 1" if singles == len(findings) else f"n = 1 in {singles} of {len(findings)}")
    if p := _sign_test(check, paper, claim, judged):
        parts.append(p)
    if isinstance(check, Near) and check.chance is not None:
        at_chance = sum(check.at_chance(one) for one, _ in judged)
        parts.append(f"chance lies within the margin for {at_chance} of {len(judged)} numbers" if at_chance else "")
    return "; ".join(part for part in parts if part)


def _number(n: int, verb: str) -> str:
    return f"{n} {verb}s" if n == 1 else f"{n} {verb}"


def _weakest(judged: Judged) -> tuple[Comparison, Finding]:
    """The comparison that is nearest to failing, or fails most clearly."""
    rank = (FAILS, INCONCLUSIVE, HOLDS)
    return min(judged, key=lambda one: (rank.index(one[1].outcome), one[1].relative_slack))


def _summary(check: Check, paper: Paper, claim: Claim, judged: Judged) -> str:
    """The effects in words: all of a few published numbers, else the mean where it says something, and the weakest."""
    if isinstance(check, Near):
        return _beside_published(check, judged)
    if len(judged) == 1:
        return check.say(judged[0][1].effect)
    weakest, found = _weakest(judged)
    what = "weakest link" if check.chained else "weakest"
    named = f"{what}: {check.say(found.effect)} ({weakest.label})"
    rows = paper.experiments[claim.experiment]
    averaged = over_settings(check, [one for one, _ in judged], rows.draws, paper.ranges)
    return f"mean {check.say(averaged[0])}; {named}" if averaged and averaged[0].n > 1 else named


def _beside_published(check: Near, judged: Judged) -> str:
    """Each measured mean and its difference from the published number, or, of many, their distances."""
    if len(judged) <= LISTED:
        return ", ".join(f"{check.name_of(one)} {_measured(check, one, found)}".strip() for one, found in judged)
    apart = [found.effect.mean for _, found in judged]
    weakest, found = _weakest(judged)
    return (
        f"{sum(apart) / len(apart):+.3f} from the numbers on average, {sum(map(abs, apart)) / len(apart):.3f} without "
        f"signs; weakest: {check.say(found.effect)} ({weakest.label})"
    )


def _measured(check: Near, one: Comparison, found: Finding) -> str:
    """The mean and, in brackets, its difference from the published number, or the runs."""
    runs = f"runs {', '.join(f'{a:.3g}' for a, _ in one.pairs.values())}" if found.effect.runs else ""
    return f"{one.values[0]:.3g} ({runs or check.say(found.effect)})"


def drawn(findings: Sequence[Finding]) -> str:
    """`5 seeds (1 draw of data, 5 of initialisation)`, with spans where the comparisons differ."""
    seeds = _span([found.n_seeds for found in findings])
    data = _span([found.n_data for found in findings])
    starts = _span([found.n_initialisations for found in findings])
    return (
        f"{seeds} seed{'' if seeds == '1' else 's'} "
        f"({data} draw{'' if data == '1' else 's'} of data, {'none' if starts == '0' else starts} of initialisation)"
    )


def _span(numbers: Sequence[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _sign_test(check: Check, paper: Paper, claim: Claim, judged: Judged) -> str:
    """The sign test of a direction over independent draws, where it could show something."""
    if not check.directed:
        return ""
    rows = paper.experiments[claim.experiment]
    averaged = over_settings(check, [one for one, _ in judged], rows.draws, paper.ranges)
    values = averaged[1] if averaged else _weakest(judged)[1].values
    if not spread(values) or least_p(len(values)) >= ALPHA:
        return ""
    return f"sign test p = {sign_test(values):.2g} ({len(values)} draws)"
