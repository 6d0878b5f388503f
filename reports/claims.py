"""Claims of the papers (reports/papers/<paper>/claims/<experiment>.yaml).

A file says on which settings the experiment's cells are matched (`match`), which metrics its cells emit (`metrics`),
which metrics its table shows (`columns`), and lists the claims. Columns and checks may name the metrics that are
declared in `metrics` or in the paper's module `derived`. The suite's smoke runs prove that `metrics` are emitted.

`draws` says what a seed draws anew (`reports/draws.py`). `clustered` names metrics whose outcomes come in clusters,
with the reason: their runs are shown one by one. The paper's `ranges` are the values that metrics can have.

A claim's `origin` says whose it is: `paper` (what the paper, or its authors' posts, say or show), `authors` (numbers of
their result files), `own` (a check of this reproduction) or `sanity` (what can hardly fail unless something is broken).
`after_results` says why a claim was made or changed after its result had been seen. Such claims are counted by
themselves (`Claim.group`).

A claim's `cells` says at which scales it can be judged and on which cells, for example
`{paper: {model.name: gpt2_small}}`. A cell passes a condition if it does not have the setting, or has one of the
values. Of a list of conditions it must pass one. Without `cells`, all cells of both scales count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from core.errors import UserError
from reports.checks import Check, Within, make_check
from reports.checks.outcomes import Range
from reports.checks.sizes import is_number
from reports.collect import Cell
from reports.culprits import on_the_rest
from reports.draws import Draws

PAPERS = Path(__file__).parent / "papers"
Scale = Literal["paper", "demo"]
Conditions = Mapping[str, Any] | Sequence[Mapping[str, Any]]
T = TypeVar("T")
SCALES: tuple[Scale, ...] = ("paper", "demo")  # smoke results are never reported
Origin = Literal["paper", "authors", "own", "sanity"]
CONFIDENCE = ("high", "medium", "low")
ANCHOR = {"value", "what", "mark"}
# origin -> in words; AFTER is the group of claims with `after_results`, whatever their origin
ORIGINS: Mapping[str, str] = {
    "paper": "the paper's claims",
    "authors": "the authors' numbers",
    "own": "own checks",
    "sanity": "sanity checks",
}
AFTER = "after"
GROUPS: Mapping[str, str] = {**ORIGINS, AFTER: "made or changed after the result"}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper, and the check that it must pass. Claims are read alone.

    `paper` is the paper's value, or None with the reason in `paper_note`. `anchors` are values published elsewhere: in
    the authors' repository, or by others. `tolerance` is what the check accepts beside the paper's value, and why.
    `needs` names what must be built before the claim can be judged.
    """

    id: str
    origin: Origin
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
    after_results: str = ""
    cells: Mapping[Scale, Conditions] = field(default_factory=lambda: {"paper": {}, "demo": {}})

    @property
    def group(self) -> str:
        """The group in which the claim is counted: its origin, or `after`."""
        return AFTER if self.after_results else self.origin

    @property
    def kind(self) -> str:
        """Whose claim it is, in words, and why it was made or changed after the result, if it was."""
        after = f"; made or changed after the result was seen: {self.after_results}" if self.after_results else ""
        return ORIGINS[self.origin].removesuffix("s") + after if self.origin != "paper" else "the paper's claim" + after

    @property
    def paper_says(self) -> str:
        margin = f" (margin: {self.tolerance})" if self.tolerance is not None else ""
        return (str(self.paper) if self.paper is not None else self.paper_note) + margin

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
    draws    what a seed draws anew
    metrics  what they emit, as far as the report may read it
    derived  what the paper's module `derived` adds to them
    columns  the metrics that the experiment's table shows
    clustered  metrics whose runs are shown one by one -> why
    """

    match: Sequence[str]
    draws: Draws
    metrics: Sequence[str] = ()
    derived: Sequence[str] = ()
    columns: Sequence[str] = ()
    clustered: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One folder below reports/papers. A paper without claims is planned, not built.

    ranges  metric, or a pattern of metrics -> the least and the greatest value that it can have
    """

    name: str
    title: str
    short: str
    experiments: Mapping[str, ExperimentRows]
    claims: Sequence[Claim]
    ranges: Mapping[str, Range] = field(default_factory=dict)

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
    about = _read(folder / "paper.yaml")
    try:
        ranges = {name: _range_of(name, ends) for name, ends in (about.pop("ranges", None) or {}).items()}
        paper = Paper(
            name=folder.name,
            experiments={path.stem: rows for path, (rows, _) in zip(paths, files, strict=True)},
            claims=[claim for _, claims in files for claim in claims],
            ranges=ranges,
            **about,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'paper.yaml'}: {error}") from error
    if twice := [name for name, n in Counter(claim.id for claim in paper.claims).items() if n > 1]:
        raise UserError(f"{folder}: two claims have the id {', '.join(twice)}")
    return paper


def _load_claims(path: Path, derived: Sequence[str]) -> tuple[ExperimentRows, list[Claim]]:
    content = _read(path)
    listed = content.pop("claims", None)
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise UserError(f"{path}: claims: is not a list of claims")
    errors: list[str] = []
    claims: list[Claim] = []
    for i, row in enumerate(listed):
        try:
            claims.append(Claim(experiment=path.stem, **row))
        except TypeError as error:
            errors.append(f"{path}: {row.get('id', f'claim {i}')}: {_plain(error)}")
    try:
        content["draws"] = _draws(content.get("draws"))
        rows = ExperimentRows(derived=derived, **content)
        _validate_rows(rows)
    except (TypeError, ValueError) as error:
        raise UserError("\n".join([*errors, f"{path}: {_plain(error)}"])) from error
    valid: list[Claim] = []
    for claim in claims:
        try:
            _validate(claim)
            _validate_check(claim, make_check(rows.match, **claim.check))
            valid.append(claim)
        except (ValueError, KeyError, TypeError) as error:
            errors.append(f"{path}: {claim.id}: {error}")
    for name, readers in _readers(rows, valid).items():
        if name not in (*rows.metrics, *rows.derived):
            errors.append(
                f"{path}: nothing emits the metric {name} (read by {', '.join(readers)}). Correct or declare it."
            )
    if errors:
        raise UserError("\n".join(errors))
    return rows, claims


class _OneOfEach(yaml.SafeLoader):
    """YAML in which a key must not stand twice: the second would silently take the place of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        own = [name for name, n in Counter(names).items() if n > 1]
        if own and not getattr(node, "merged", False):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(own)} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """`<<` puts the keys of another mapping before the own ones, which may repeat them."""
        super().flatten_mapping(node)
        node.merged = True  # type: ignore[attr-defined]


def _read(path: Path) -> dict[str, Any]:
    """A YAML file with a mapping. Raises UserError, which names the file and the line."""
    try:
        content = yaml.load(path.read_text(), Loader=_OneOfEach)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: is not a mapping of names")
    return content


def _plain(error: Exception) -> str:
    """`Claim.__init__() got an unexpected keyword argument 'x'` without the name of the class."""
    return str(error).replace("Claim.__init__()", "claim").replace("ExperimentRows.__init__()", "the file")


def _draws(rules: Any) -> Draws:
    names = ("data", "initialisation")
    if not isinstance(rules, dict) or sorted(rules) != sorted(names):
        raise ValueError(f"draws: {rules!r} does not say what a seed draws: {{data: ..., initialisation: ...}}")
    return Draws(**rules)


def _validate_rows(rows: ExperimentRows) -> None:
    for key in ("match", "metrics", "columns"):
        names = getattr(rows, key)
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key}: is not a list of names")
    if not isinstance(rows.clustered, dict) or not all(isinstance(why, str) for why in rows.clustered.values()):
        raise ValueError("clustered: is not metrics with the reason why their outcomes come in clusters")
    if unknown := set(rows.clustered) - {*rows.metrics, *rows.derived}:
        raise ValueError(f"clustered: {', '.join(sorted(unknown))} is not among the metrics")


def _validate(claim: Claim) -> None:
    """Raises ValueError for a value that is none of those allowed."""
    for key in ("id", "statement", "where", "source", "paper_note", "needs", "after_results"):
        value = getattr(claim, key)
        if not isinstance(value, str):
            raise ValueError(f"{key}: {value!r} is not a text")
    if claim.tolerance is not None and not isinstance(claim.tolerance, str | int | float):
        raise ValueError(f"tolerance: {claim.tolerance!r} is not a text or number")
    if claim.origin not in get_args(Origin):
        raise ValueError(f"origin: {claim.origin!r} is not one of {', '.join(get_args(Origin))}")
    if claim.confidence not in CONFIDENCE:
        raise ValueError(f"confidence: {claim.confidence!r} is not one of {', '.join(CONFIDENCE)}")
    if claim.paper is None and not claim.paper_note:
        raise ValueError("paper: null needs a paper_note that says why")
    if not isinstance(claim.check, dict):
        raise ValueError(f"check: {claim.check!r} is not a mapping")
    if not isinstance(claim.anchors, list | tuple):
        raise ValueError("anchors: is not a list")
    for anchor in claim.anchors:
        _validate_anchor(anchor)
    if not isinstance(claim.cells, dict):
        raise ValueError(f"cells: {claim.cells!r} is not a mapping of scales")
    if unknown := set(map(str, claim.cells)) - set(SCALES):
        raise ValueError(f"cells: {', '.join(sorted(unknown))} is not one of {', '.join(SCALES)}")
    for conditions in claim.cells.values():
        listed = conditions if isinstance(conditions, list) else [conditions]
        if not all(isinstance(one, dict) and all(isinstance(key, str) for key in one) for one in listed):
            raise ValueError(f"cells: {conditions!r} is not settings with their values, or a list of such")


def _validate_anchor(anchor: Any) -> None:
    """A comma in a text without quotes ends the text, and the rest becomes a key of its own."""
    if not isinstance(anchor, dict) or set(anchor) != ANCHOR:
        keys = sorted(map(str, anchor)) if isinstance(anchor, dict) else anchor
        raise ValueError(
            f"anchors: {keys} is not {', '.join(sorted(ANCHOR))}. A text with a comma in it needs quotes around it."
        )
    value, what, mark = anchor["value"], anchor["what"], anchor["mark"]
    if not isinstance(value, str | int | float | list) or (isinstance(value, list) and len(value) != 2):
        raise ValueError(f"anchors: value: {value!r} is not a number, a text, or the two ends of a range")
    if not all(isinstance(text, str) and text for text in (what, mark)):
        raise ValueError(f"anchors: what, mark: {what!r}, {mark!r} are not two texts")


def _validate_check(claim: Claim, check: Check) -> None:
    if isinstance(check, Within) and "demo" in claim.cells and (claim.paper is not None or claim.anchors):
        raise ValueError("a paper's value is never compared with demo results: set cells: {paper: {...}}")


def _range_of(name: str, ends: Any) -> Range:
    """`[0, 1]`, where null stands for no limit."""
    if not isinstance(ends, list) or len(ends) != 2 or not all(end is None or is_number(end) for end in ends):
        raise ValueError(f"ranges: {name}: {ends!r} is not [the least, the greatest]")
    low, high = ends
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


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
