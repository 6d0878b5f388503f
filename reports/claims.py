"""Claims of the papers (reports/papers/<paper>/claims/<experiment>.yaml).

A file says on which settings the experiment's cells are matched (`match`), which metrics its table shows (`columns`),
and lists the claims. A claim's `cells` says at which scales it can be judged and on which cells, for example
`{paper: {model.name: gpt2_small}}`. A cell passes a condition if it does not have the setting, or has one of the
values. Of a list of conditions it must pass one. Without `cells`, all cells of both scales count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from core.errors import UserError
from reports.checks import Check, Within, make_check
from reports.collect import Cell, grid_size, one_per_folder

PAPERS = Path(__file__).parent / "papers"
Scale = Literal["paper", "demo"]
Conditions = Mapping[str, Any] | Sequence[Mapping[str, Any]]
SCALES: tuple[Scale, ...] = ("paper", "demo")  # smoke results are never reported


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper, and the check that it must pass. Claims are read alone.

    `paper` is the paper's value, or None with the reason in `paper_note`. `anchors` are values published elsewhere: in
    the authors' repository, or by others. `needs` names what must be built before the claim can be judged.
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
    needs: str = ""
    cells: Mapping[Scale, Conditions] = field(default_factory=lambda: {"paper": {}, "demo": {}})

    @property
    def paper_says(self) -> str:
        return str(self.paper) if self.paper is not None else self.paper_note

    @property
    def others_say(self) -> str:
        return "; ".join(f"{_range(anchor['value'])} ({anchor['mark']}: {anchor['what']})" for anchor in self.anchors)

    def includes(self, cell: Cell, scale: Scale) -> bool:
        """Whether the claim is judged on this cell."""
        return _passes(cell, self.cells[scale])


@dataclass(frozen=True, kw_only=True)
class ExperimentRows:
    """The settings on which an experiment's cells are matched, and the metrics that its table shows."""

    match: Sequence[str]
    columns: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One folder below reports/papers. A paper without claims is planned, not built."""

    name: str
    title: str
    short: str
    experiments: Mapping[str, ExperimentRows]
    claims: Sequence[Claim]

    def claim(self, claim_id: str) -> Claim:
        return next(claim for claim in self.claims if claim.id == claim_id)

    def check(self, claim: Claim) -> Check:
        return make_check(self.experiments[claim.experiment].match, **claim.check)

    def metrics(self, experiment: str) -> dict[str, list[str]]:
        """Every metric that the report reads of an experiment -> what reads it: `columns`, or the ids of claims."""
        readers: dict[str, list[str]] = {name: ["columns"] for name in self.experiments[experiment].columns}
        for claim in self.claims:
            if claim.experiment == experiment and not claim.needs:
                for name in self.check(claim).metrics:
                    readers.setdefault(name, []).append(claim.id)
        return readers


def load_papers(folder: Path = PAPERS) -> list[Paper]:
    """Every paper. An unknown key, or a check that cannot be made, raises ValueError with the name of the file."""
    return [load_paper(path.parent) for path in sorted(folder.glob("*/paper.yaml"))]


def load_paper(folder: Path) -> Paper:
    rows: dict[str, ExperimentRows] = {}
    claims: list[Claim] = []
    for path in sorted((folder / "claims").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        try:
            own = [Claim(experiment=path.stem, **row) for row in content.pop("claims")]
            rows[path.stem] = ExperimentRows(**content)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from error
        for claim in own:
            try:
                _validate(claim, make_check(rows[path.stem].match, **claim.check))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}: {claim.id}: {error}") from error
        claims += own
    try:
        return Paper(
            name=folder.name, experiments=rows, claims=claims, **yaml.safe_load((folder / "paper.yaml").read_text())
        )
    except TypeError as error:
        raise ValueError(f"{folder / 'paper.yaml'}: {error}") from error


def _validate(claim: Claim, check: Check) -> None:
    if claim.paper is None and not claim.paper_note:
        raise ValueError("paper: null needs a paper_note that says why")
    if unknown := set(claim.cells) - set(SCALES):
        raise ValueError(f"cells: {', '.join(sorted(unknown))} is not one of {', '.join(SCALES)}")
    if isinstance(check, Within) and "demo" in claim.cells and (claim.paper is not None or claim.anchors):
        raise ValueError("a paper's value is never compared with demo results: set cells: {paper: {...}}")


def with_derived(papers: Iterable[Paper], cells: Iterable[Cell]) -> list[Cell]:
    """The cells in their order, with the further metrics that their papers compute from several of them.

    A paper may have a module `derived` with `derive(cells)`. It is given the cells of the paper's experiments, and
    returns as many in the same order.
    """
    cells = list(cells)
    for paper in papers:
        name = f"reports.papers.{paper.name}.derived"
        own = [i for i, cell in enumerate(cells) if cell.experiment in paper.experiments]
        if own and find_spec(name) is not None:
            for i, cell in zip(own, import_module(name).derive([cells[i] for i in own]), strict=True):
                cells[i] = cell
    return cells


def unknown_metrics(paper: Paper, experiment: str, cells: Iterable[Cell]) -> dict[str, list[str]]:
    """The metrics that the report reads of an experiment, but that none of its cells has -> what reads them."""
    emitted = {name for cell in cells if cell.experiment == experiment for name in cell.metrics}
    return {name: readers for name, readers in paper.metrics(experiment).items() if name not in emitted}


def validate_metrics(papers: Iterable[Paper], cells: Iterable[Cell]) -> None:
    """Raise UserError if a claims file names a metric that nothing emits.

    That is known where all cells of the paper's grid have finished. A part of a grid may lack some metrics.
    """
    of_experiment: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.scale == "paper":
            of_experiment[cell.experiment].append(cell)
    for paper in papers:
        for experiment in paper.experiments:
            own = of_experiment[experiment]
            if len(one_per_folder(own)) >= (grid_size(experiment, "paper") or 1):
                unknown = unknown_metrics(paper, experiment, own)
                if unknown:
                    names = "; ".join(f"{name} (read by {', '.join(readers)})" for name, readers in unknown.items())
                    raise UserError(
                        f"{PAPERS / paper.name / 'claims' / experiment}.yaml: no finished cell of the paper's grid has "
                        f"the metric {names}. Correct its name."
                    )


def _passes(cell: Cell, conditions: Conditions) -> bool:
    if isinstance(conditions, Mapping):
        return all(
            not cell.has(key) or cell.get(key) in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in conditions.items()
        )
    return any(_passes(cell, one) for one in conditions)


def _range(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)
