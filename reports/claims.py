"""Claims of the papers (reports/papers/<paper>/claims/<experiment>.yaml).

A file says on which settings the experiment's cells are matched (`match`), which metrics its cells emit (`metrics`),
which metrics its table shows (`columns`), and lists the claims. Columns and checks may name the metrics that are
declared in `metrics` or in the paper's module `derived`. The suite's smoke runs prove that `metrics` are emitted.

A claim's `cells` says at which scales it can be judged and on which cells, for example
`{paper: {model.name: gpt2_small}}`. A cell passes a condition if it does not have the setting, or has one of the
values. Of a list of conditions it must pass one. Without `cells`, all cells of both scales count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from core.errors import UserError
from reports.checks import Check, Within, make_check
from reports.collect import Cell
from reports.culprits import on_the_rest

PAPERS = Path(__file__).parent / "papers"
Scale = Literal["paper", "demo"]
Conditions = Mapping[str, Any] | Sequence[Mapping[str, Any]]
T = TypeVar("T")
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
    """What a claims file says of its experiment's cells.

    match    the settings on which they are matched
    metrics  what they emit, as far as the report may read it
    derived  what the paper's module `derived` adds to them
    columns  the metrics that the experiment's table shows
    """

    match: Sequence[str]
    metrics: Sequence[str] = ()
    derived: Sequence[str] = ()
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
        own = [claim for claim in self.claims if claim.experiment == experiment]
        return _readers(self.experiments[experiment], own)


def load_papers(folder: Path = PAPERS) -> list[Paper]:
    """Every paper. Raises one UserError with a line for each error in any of their files."""
    return _all_of(load_paper, [path.parent for path in sorted(folder.glob("*/paper.yaml"))])


def load_paper(folder: Path) -> Paper:
    """One paper. Raises UserError with a line for each error in its files: an unknown key, a check that cannot be made,
    or a metric that neither the claims file nor the module `derived` declares."""
    derived: Mapping[str, Sequence[str]] = {}
    if (folder / "derived.py").is_file():
        derived = import_module(f"reports.papers.{folder.name}.derived").METRICS

    def load(path: Path) -> tuple[ExperimentRows, list[Claim]]:
        return _load_claims(path, derived.get(path.stem, ()))

    paths = sorted((folder / "claims").glob("*.yaml"))
    files = _all_of(load, paths)
    try:
        return Paper(
            name=folder.name,
            experiments={path.stem: rows for path, (rows, _) in zip(paths, files, strict=True)},
            claims=[claim for _, claims in files for claim in claims],
            **yaml.safe_load((folder / "paper.yaml").read_text()),
        )
    except TypeError as error:
        raise UserError(f"{folder / 'paper.yaml'}: {error}") from error


def _load_claims(path: Path, derived: Sequence[str]) -> tuple[ExperimentRows, list[Claim]]:
    content = yaml.safe_load(path.read_text())
    try:
        claims = [Claim(experiment=path.stem, **row) for row in content.pop("claims")]
        rows = ExperimentRows(derived=derived, **content)
    except TypeError as error:
        raise UserError(f"{path}: {error}") from error
    errors: list[str] = []
    valid: list[Claim] = []
    for claim in claims:
        try:
            _validate(claim, make_check(rows.match, **claim.check))
            valid.append(claim)
        except (ValueError, KeyError) as error:
            errors.append(f"{path}: {claim.id}: {error}")
    for name, readers in _readers(rows, valid).items():
        if name not in (*rows.metrics, *rows.derived):
            errors.append(
                f"{path}: nothing emits the metric {name} (read by {', '.join(readers)}). Correct or declare it."
            )
    if errors:
        raise UserError("\n".join(errors))
    return rows, claims


def _validate(claim: Claim, check: Check) -> None:
    if claim.paper is None and not claim.paper_note:
        raise ValueError("paper: null needs a paper_note that says why")
    if unknown := set(claim.cells) - set(SCALES):
        raise ValueError(f"cells: {', '.join(sorted(unknown))} is not one of {', '.join(SCALES)}")
    if isinstance(check, Within) and "demo" in claim.cells and (claim.paper is not None or claim.anchors):
        raise ValueError("a paper's value is never compared with demo results: set cells: {paper: {...}}")


def _readers(rows: ExperimentRows, claims: Iterable[Claim]) -> dict[str, list[str]]:
    """Every metric that is read -> what reads it: `columns`, or the ids of claims. Claims with `needs` read nothing."""
    readers = {name: ["columns"] for name in rows.columns}
    for claim in claims:
        if not claim.needs:
            for name in sorted(make_check(rows.match, **claim.check).metrics):
                readers.setdefault(name, []).append(claim.id)
    return readers


def _all_of(load: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    """What is loaded from each path. If some raise UserError, one UserError has the messages of all of them."""
    loaded: list[T] = []
    errors: list[str] = []
    for path in paths:
        try:
            loaded.append(load(path))
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    return loaded


def with_derived(papers: Iterable[Paper], cells: Iterable[Cell]) -> list[Cell]:
    """The cells in their order, with the further metrics that their papers compute from several of them.

    A paper may have a module `derived` with `METRICS` (experiment -> the names of its derived metrics) and
    `derive(cells)`. It is given the cells of the paper's experiments, and returns as many in the same order.
    """
    cells = list(cells)
    for paper in papers:
        name = f"reports.papers.{paper.name}.derived"
        own = [i for i, cell in enumerate(cells) if cell.experiment in paper.experiments]
        if own and find_spec(name) is not None:
            derive = import_module(name).derive
            derived, left = on_the_rest(derive, [cells[i] for i in own], f"the derived metrics of {paper.name}")
            places = {id(cell): i for i, cell in enumerate(cells)}
            for before, cell in zip(left, derived or [], strict=True):
                cells[places[id(before)]] = cell
    return cells


def unknown_metrics(paper: Paper, experiment: str, cells: Iterable[Cell]) -> dict[str, list[str]]:
    """The metrics that the report reads of an experiment, but that none of its cells has -> what reads them."""
    emitted = {name for cell in cells if cell.experiment == experiment for name in cell.metrics}
    return {name: readers for name, readers in paper.metrics(experiment).items() if name not in emitted}


def _passes(cell: Cell, conditions: Conditions) -> bool:
    if isinstance(conditions, Mapping):
        return all(
            not cell.has(key) or cell.get(key) in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in conditions.items()
        )
    return any(_passes(cell, one) for one in conditions)


def _range(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)
