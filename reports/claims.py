"""Claims of the papers (reports/paper/*.yaml) and what the results say about each of them.

A paper's file names the paper, says per experiment on which settings its cells are matched and what its table shows,
and lists the claims. A claim's `cells` says at which scales it can be judged and on which cells, for example
`{paper: {model.name: gpt2_small}}`: a cell passes if it does not know the setting or has one of the values; of a list
of such conditions it must pass one. Without `cells`, all cells of both scales count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from core.metrics.statistics import sign_test
from reports.checks import Check, Comparison, Within, compare, make_check
from reports.checks.base import effect_over_seeds
from reports.collect import Cell
from reports.matching import AmbiguousCellsError

PAPERS = Path(__file__).parent / "paper"
Scale = Literal["paper", "demo"]
Conditions = Mapping[str, Any] | Sequence[Mapping[str, Any]]
SCALES: tuple[Scale, ...] = ("paper", "demo")  # smoke results are never reported

AGREES, DIRECTION, PARTLY, DISAGREES, NOT_RUN = "agrees", "direction agrees", "partly", "disagrees", "not run"
AMBIGUOUS = "cannot be judged"
NOT_APPLICABLE = "-"  # the claim is not judged at this scale


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of a paper's file.

    `paper` is its value, or None with the reason in `paper_note`; `anchors` are values that were published elsewhere:
    in the authors' repository, or by others.
    """

    id: str
    experiment: str
    statement: str
    where: str
    source: str
    confidence: str
    check: Mapping[str, Any]
    paper: str | float | None = None
    paper_note: str = ""
    tolerance: str | None = None
    anchors: Sequence[Mapping[str, Any]] = ()
    cells: Mapping[Scale, Conditions] = field(default_factory=lambda: {"paper": {}, "demo": {}})

    @property
    def paper_says(self) -> str:
        return str(self.paper) if self.paper is not None else self.paper_note

    @property
    def others_say(self) -> str:
        return "; ".join(f"{_range(anchor['value'])} ({anchor['mark']}: {anchor['what']})" for anchor in self.anchors)


@dataclass(frozen=True, kw_only=True)
class ExperimentRows:
    """How an experiment's cells are matched, and what its table shows: `columns` are metrics."""

    match: Sequence[str]
    columns: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One file of claims."""

    name: str
    title: str
    experiments: Mapping[str, ExperimentRows]
    claims: Sequence[Claim]

    def check(self, claim: Claim) -> Check:
        return make_check(self.experiments[claim.experiment].match, **claim.check)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the cells of one scale say about a claim."""

    verdict: str
    ours: str = ""
    n_seeds: int = 0
    comparisons: Sequence[Comparison] = ()
    effects: Sequence[str] = ()  # in words, one for each comparison
    holds: Sequence[bool | None] = ()  # None: not judged


def load_papers(folder: Path = PAPERS) -> list[Paper]:
    """Every paper's claims, checked: a key that does not exist, or a check that cannot be made, raises ValueError."""
    return [load_paper(path) for path in sorted(folder.glob("*.yaml"))]


def load_paper(path: Path) -> Paper:
    content = yaml.safe_load(path.read_text())
    try:
        experiments = {name: ExperimentRows(**rows) for name, rows in content.pop("experiments").items()}
        paper = Paper(experiments=experiments, claims=[Claim(**row) for row in content.pop("claims")], **content)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    for claim in paper.claims:
        try:
            _checked(paper, claim)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: {claim.id}: {error}") from error
    return paper


def _checked(paper: Paper, claim: Claim) -> None:
    check = paper.check(claim)
    if claim.paper is None and not claim.paper_note:
        raise ValueError("paper: null needs a paper_note that says why")
    if unknown := set(claim.cells) - set(SCALES):
        raise ValueError(f"cells: {', '.join(sorted(unknown))} is not one of {', '.join(SCALES)}")
    if isinstance(check, Within) and "demo" in claim.cells and (claim.paper is not None or claim.anchors):
        raise ValueError("a paper's value is never compared with demo results: set cells: {paper: {...}}")


def judge(paper: Paper, claim: Claim, scale: Scale, cells: Sequence[Cell], n_failed: int) -> Judgement:
    """Join a claim with the cells of its experiment at one scale, of which `n_failed` more ended in an error."""
    if scale not in claim.cells:
        return Judgement(verdict=NOT_APPLICABLE)
    check = paper.check(claim) if scale == "paper" else paper.check(claim).at_demo()
    if check is None:
        return Judgement(verdict=NOT_APPLICABLE)
    chosen = [cell for cell in cells if _passes(cell, claim.cells[scale])]
    try:
        comparisons = compare(check, chosen)
    except AmbiguousCellsError as error:
        return Judgement(verdict=AMBIGUOUS, ours=str(error))
    holds = [check.holds(comparison) if comparison.pairs else None for comparison in comparisons]
    effects = [check.effects(comparison) if comparison.pairs else {} for comparison in comparisons]
    found = [comparison for comparison in comparisons if comparison.pairs]
    return Judgement(
        verdict=verdict(holds, scale, n_failed, check.directed),
        ours=_ours(check, found, holds) if found else "",
        n_seeds=_n_seeds(check, found) if found else 0,
        comparisons=comparisons,
        effects=[check.say(effect_over_seeds([by_seed])) if by_seed else "" for by_seed in effects],
        holds=holds,
    )


def verdict(holds: Sequence[bool | None], scale: Scale, n_failed: int, directed: bool) -> str:
    """One word for all comparisons; None stands for one that could not be judged.

    `agrees` only if every comparison was judged and goes as claimed. At demo scale a direction that shows is called
    just that. Failed cells are named beside the verdict, or are all there is to say.
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


def _ours(check: Check, found: Sequence[Comparison], holds: Sequence[bool | None]) -> str:
    """What the comparisons that have pairs come to."""
    judged = [held for held in holds if held is not None]
    n_shared, n_seeds = _n_seeds(check, found), len({seed for comparison in found for seed in comparison.pairs})
    everywhere = f" at every setting (of {n_seeds})" if n_seeds > n_shared else ""
    parts = [f"{check.summary(found)}, {n_shared} seed{'s' if n_shared > 1 else ''}{everywhere}"]
    parts.append(f"{sum(judged)} of {len(judged)} settings")
    if len(judged) < len(holds):
        parts.append(f"{len(holds) - len(judged)} more not judged")
    if check.directed:
        differences = [a - b for comparison in found for a, b in comparison.pairs.values()]
        parts.append(f"sign test p = {sign_test(differences):.2g} ({len(differences)} pairs)")
    return "; ".join(parts)


def _n_seeds(check: Check, found: Sequence[Comparison]) -> int:
    """Over how many seeds the effect's interval goes: those that every comparison has."""
    return effect_over_seeds([check.effects(comparison) for comparison in found]).n


def _passes(cell: Cell, conditions: Conditions) -> bool:
    if isinstance(conditions, Mapping):
        return all(
            not cell.has(key) or cell.get(key) in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in conditions.items()
        )
    return any(_passes(cell, one) for one in conditions)


def _range(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)
