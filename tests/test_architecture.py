"""Imports go one way, wings stay apart, and core names no paper. Imports inside functions count as well."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from tests.composing import CONF, ROOT

ROOMS = ("core", "hydra_plugins", "experiments", "reports", "run")  # each imports itself and those to its left
FLOORS = {"kernels": 0, "metrics": 0, "text": 1, "synthetic": 1, "methods": 2, "models": 2, "streams": 2, "analysis": 3}
PAPERS = ["leask", "minder", "oneill", "paulo", "song"]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*_*.yaml"))
NAMES = re.compile(rf"(?<![a-z])({'|'.join([*EXPERIMENTS, *PAPERS])})(?![a-z])")

Tree = dict[str, ast.Module]  # by dotted module name


@cache
def the_project() -> Tree:
    paths = [ROOT / "run.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
    return parsed({module_name(path.relative_to(ROOT)): path.read_text() for path in paths})


def parsed(sources: dict[str, str]) -> Tree:
    return {name: ast.parse(source) for name, source in sources.items()}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(tree: Tree) -> Iterator[tuple[str, str]]:
    """(importing module, imported module of the tree), wherever in the file the import stands."""
    for name, code in tree.items():
        for node in ast.walk(code):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}, line {node.lineno}: imports are absolute"
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from ((name, full if full in tree else str(node.module)) for full in wanted)
            elif isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)


def part(module: str, n: int) -> str:
    return ".".join(module.split(".")[:n])


def upward(tree: Tree) -> list[str]:
    """Imports from a room further right in `ROOMS`."""
    pairs = [(a, b) for a, b in imports(tree) if part(b, 1) in ROOMS]
    return [f"{a} -> {b}" for a, b in pairs if ROOMS.index(part(a, 1)) < ROOMS.index(part(b, 1))]


def between_wings(tree: Tree) -> list[str]:
    """Imports of an experiment from another wing; `experiments.common` is no wing."""

    def wing(module: str) -> str | None:
        parts = module.split(".")
        return parts[1] if parts[0] == "experiments" and len(parts) > 2 else None

    return [f"{a} -> {b}" for a, b in imports(tree) if wing(a) and wing(b) and wing(a) != wing(b)]


def up_the_stairs(tree: Tree) -> list[str]:
    """Imports in core from a folder on a higher floor."""
    floors = {f"core.{folder}": floor for folder, floor in FLOORS.items()}
    pairs = [(a, b) for a, b in imports(tree) if part(a, 2) in floors and part(b, 2) in floors]
    return [f"{a} -> {b}" for a, b in pairs if floors[part(a, 2)] < floors[part(b, 2)]]


def cycles(tree: Tree) -> list[str]:
    """The imports that keep folders of core in a cycle, a line for each cycle; a module right in core is a node."""
    edges: dict[tuple[str, str], list[str]] = {}
    for a, b in imports(tree):
        nodes = part(a, 2), part(b, 2)
        if nodes[0] != nodes[1] and all(node.startswith("core.") for node in nodes):
            edges.setdefault(nodes, []).append(f"{a} -> {b}")
    components = [c for c in nx.strongly_connected_components(nx.DiGraph(list(edges))) if len(c) > 1]
    inside = [[line for (a, b), lines in edges.items() if {a, b} <= c for line in lines] for c in components]
    return [", ".join(lines) for lines in inside]


def names_of_papers(tree: Tree) -> list[str]:
    """Identifiers and strings in core that hold a paper's or an experiment's name; docstrings may cite papers."""
    lines = []
    for module, code in tree.items():
        if part(module, 1) != "core":
            continue
        docstrings = {id(node.value) for node in ast.walk(code) if isinstance(node, ast.Expr)}
        for node in ast.walk(code):
            words = [v for field, v in ast.iter_fields(node) if field in ("id", "attr", "name", "arg", "asname")]
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                words.append(node.value)
            found = [word for word in words if isinstance(word, str) and NAMES.search(word.lower())]
            lines += [f"{module}, line {getattr(node, 'lineno', '?')}: {word}" for word in found]
        if NAMES.search(module):
            lines.append(module)
    return lines


def test_imports_go_from_run_and_reports_to_experiments_to_core():
    assert not (wrong := upward(the_project())), "\n".join(wrong)


def test_no_wing_of_experiments_imports_another():
    assert not (wrong := between_wings(the_project())), "\n".join(wrong)


def test_folders_of_core_import_only_those_below_them():
    assert not (wrong := up_the_stairs(the_project())), "\n".join(wrong)


def test_the_folders_of_core_have_no_cycle():
    assert not (wrong := cycles(the_project())), "\n".join(wrong)


def test_core_names_no_paper_and_no_experiment():
    assert not (wrong := names_of_papers(the_project())), "\n".join(wrong)


@pytest.mark.parametrize(
    ("check", "sources"),
    [
        (upward, {"core.a": "def f():\n    from experiments.x import y", "experiments.x": ""}),
        (between_wings, {"experiments.one.a": "import experiments.two.b", "experiments.two.b": ""}),
        (up_the_stairs, {"core.kernels.a": "from core.methods import base", "core.methods.base": ""}),
        (cycles, {"core.a": "from core.b import c", "core.b.c": "import core.d", "core.d": "import core.a"}),
        (names_of_papers, {"core.a": '"""Leask et al."""\ndef f(name):\n    return name == "leask_editing"'}),
        (names_of_papers, {"core.a": "def read_minder(x): ..."}),
    ],
)
def test_a_breach_of_each_rule_would_be_noticed(check, sources):
    assert len(check(parsed(sources))) == 1
