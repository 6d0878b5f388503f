"""What the results say about a claim: a verdict, our numbers, and the comparisons behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.metrics.statistics import sign_test
from reports.checks import Check, Comparison, compare
from reports.checks.base import effect_over_seeds
from reports.claims import Claim, Paper, Scale
from reports.collect import Cell
from reports.matching import AmbiguousCellsError

AGREES, DIRECTION, PARTLY, DISAGREES, NOT_RUN = "agrees", "direction agrees", "partly", "disagrees", "not run"
AMBIGUOUS = "cannot be judged"
NOT_APPLICABLE = "-"  # the claim is not judged at this scale


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the cells of one scale say about a claim."""

    verdict: str
    ours: str = ""
    n_seeds: int = 0
    comparisons: Sequence[Comparison] = ()
    effects: Sequence[str] = ()  # in words, one for each comparison
    holds: Sequence[bool | None] = ()  # None: not judged

    @property
    def word(self) -> str:
        """The verdict without the number of failed cells."""
        return self.verdict.partition(";")[0]


def judge(paper: Paper, claim: Claim, scale: Scale, cells: Sequence[Cell], n_failed: int) -> Judgement:
    """Judge a claim by the cells of its experiment at one scale. `n_failed` more cells ended in an error."""
    if scale not in claim.cells:
        return Judgement(verdict=NOT_APPLICABLE)
    check = paper.check(claim) if scale == "paper" else paper.check(claim).at_demo()
    if check is None:
        return Judgement(verdict=NOT_APPLICABLE)
    try:
        comparisons = compare(check, [cell for cell in cells if claim.includes(cell, scale)])
    except AmbiguousCellsError as error:
        return Judgement(verdict=AMBIGUOUS, ours=str(error))
    holds = [check.holds(comparison) if comparison.pairs else None for comparison in comparisons]
    effects = [check.effects(comparison) if comparison.pairs else {} for comparison in comparisons]
    measured = [comparison for comparison in comparisons if comparison.pairs]
    return Judgement(
        verdict=verdict(holds, scale, n_failed, check.directed),
        ours=_ours(check, measured, holds) if measured else "",
        n_seeds=_n_seeds(check, measured) if measured else 0,
        comparisons=comparisons,
        effects=[check.say(effect_over_seeds([by_seed])) if by_seed else "" for by_seed in effects],
        holds=holds,
    )


def verdict(holds: Sequence[bool | None], scale: Scale, n_failed: int, directed: bool) -> str:
    """One word for all comparisons. None stands for one that could not be judged.

    `agrees` needs every comparison to be judged and to hold. At demo scale, a check of a direction gives `direction
    agrees` instead. The number of failed cells stands beside the verdict, or alone where nothing could be judged.
    """
    judged = [held for held in holds if held is not None]
    failures = f"failed cells: {n_failed}" if n_failed else ""
    if not judged:
        return failures or NOT_RUN
    if all(held is True for held in holds):
        word = DIRECTION if scale == "demo" and directed else AGREES
    else:
        word = PARTLY if any(judged) else DISAGREES
    return f"{word}; {failures}" if failures else word


def _ours(check: Check, measured: Sequence[Comparison], holds: Sequence[bool | None]) -> str:
    """Our numbers in words, from the comparisons that have pairs."""
    judged = [held for held in holds if held is not None]
    n_shared, n_seeds = _n_seeds(check, measured), len({seed for comparison in measured for seed in comparison.pairs})
    everywhere = f" at every setting (of {n_seeds})" if n_seeds > n_shared else ""
    parts = [f"{check.summary(measured)}, {n_shared} seed{'s' if n_shared > 1 else ''}{everywhere}"]
    parts.append(f"{sum(judged)} of {len(judged)} settings")
    if len(judged) < len(holds):
        parts.append(f"{len(holds) - len(judged)} more not judged")
    if check.directed:
        differences = [a - b for comparison in measured for a, b in comparison.pairs.values()]
        parts.append(f"sign test p = {sign_test(differences):.2g} ({len(differences)} pairs)")
    return "; ".join(parts)


def _n_seeds(check: Check, measured: Sequence[Comparison]) -> int:
    """The number of seeds in the effect's interval: those that every comparison has."""
    return effect_over_seeds([check.effects(comparison) for comparison in measured]).n
