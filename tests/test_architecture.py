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
FLOORS = (  # of core: a folder or module imports its own floor and those above it in this list
    "archives artifacts atomic batch bench building cells checked counts digest distributed errors hub input_norm "
    "inputs interrupts notices optimizer reading remarks results runtime seeding settings shares tensor_files "
    "torch_files workers",
    "kernels metrics synthetic text",
    "methods",
    "training",
    "models stacked streams",
    "fleet interop together",
    "analysis overrides preflight",
)
FLOOR_OF = {f"core.{name}": floor for floor, names in enumerate(FLOORS) for name in names.split()}
PAPERS = ["leask", "minder", "oneill", "paulo", "song"]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*_*.yaml"))
NAMES = re.compile(rf"(?<![a-z])({'|'.join(PAPERS)}|({'|'.join(EXPERIMENTS)})(?![a-z]))")

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
    """Imports of a wing from elsewhere in experiments. What wings share, `experiments.common`, imports none of them."""

    def wing(module: str) -> str | None:
        parts = module.split(".")
        return parts[1] if parts[0] == "experiments" and len(parts) > 1 and parts[1] != "common" else None

    pairs = [(a, b) for a, b in imports(tree) if part(a, 1) == "experiments" and wing(b)]
    return [f"{a} -> {b}" for a, b in pairs if wing(a) != wing(b)]


def up_the_stairs(tree: Tree) -> list[str]:
    """Imports in core from a higher floor, and what has no floor."""
    without = {part(name, 2) for name in tree if name.startswith("core.")} - set(FLOOR_OF)
    pairs = [(a, b) for a, b in imports(tree) if part(a, 2) in FLOOR_OF and part(b, 2) in FLOOR_OF]
    wrong = [f"{a} -> {b}" for a, b in pairs if FLOOR_OF[part(a, 2)] < FLOOR_OF[part(b, 2)]]
    return wrong + [f"{name}: write it into FLOORS" for name in sorted(without)]


def cycles(tree: Tree) -> list[str]:
    """The imports that keep folders of a room in a cycle, a line for each cycle. A module outside folders is a node."""
    edges: dict[tuple[str, str], list[str]] = {}
    for a, b in imports(tree):
        nodes = part(a, 2), part(b, 2)
        if nodes[0] != nodes[1] and all("." in node for node in nodes) and part(a, 1) == part(b, 1):
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
            named = [word for word in words if isinstance(word, str) and NAMES.search(apart(word))]
            lines += [f"{module}, line {getattr(node, 'lineno', '?')}: {word}" for word in named]
        if NAMES.search(module):
            lines.append(module)
    return lines


def apart(word: str) -> str:
    """In lower case, the words of a CamelCase name put apart: LoadMinder -> load_minder."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", word).lower()


def test_imports_go_from_run_and_reports_to_experiments_to_core():
    assert not (wrong := upward(the_project())), "\n".join(wrong)


def test_no_wing_of_experiments_imports_another():
    assert not (wrong := between_wings(the_project())), "\n".join(wrong)


def test_core_imports_no_higher_floor_of_itself():
    assert not (wrong := up_the_stairs(the_project())), "\n".join(wrong)


def test_the_folders_of_a_room_have_no_cycle():
    assert not (wrong := cycles(the_project())), "\n".join(wrong)


def test_core_names_no_paper_and_no_experiment():
    assert not (wrong := names_of_papers(the_project())), "\n".join(wrong)


@pytest.mark.parametrize(
    ("check", "sources"),
    [
        (upward, {"core.a": "def f():\n    from experiments.x import y", "experiments.x": ""}),
        (between_wings, {"experiments.one.a": "import experiments.two.b", "experiments.two.b": ""}),
        (between_wings, {"experiments.one.a": "from experiments import two", "experiments.two": ""}),
        (between_wings, {"experiments.one": "from experiments.two.b import f", "experiments.two.b": ""}),
        (between_wings, {"experiments.common": "from experiments.two.b import f", "experiments.two.b": ""}),
        (up_the_stairs, {"core.kernels.a": "from core.methods import base", "core.methods.base": ""}),
        (up_the_stairs, {"core.methods.a": "from core import interop", "core.interop": ""}),
        (up_the_stairs, {"core.kernels.a": "def f():\n    import core.stacked.runs", "core.stacked.runs": ""}),
        (up_the_stairs, {"core.streams.a": "from core.fleet import Request", "core.fleet": ""}),
        (up_the_stairs, {"core.errors": "import core.training", "core.training": ""}),
        (up_the_stairs, {"core.unheard_of": ""}),
        (cycles, {"core.a": "from core.b import c", "core.b.c": "import core.d", "core.d": "import core.a"}),
        (cycles, {"reports.a": "from reports import b", "reports.b": "", "reports.b.c": "import reports.a"}),
        (cycles, {"experiments.one.a": "import experiments.common", "experiments.common": "import experiments.one.a"}),
        (names_of_papers, {"core.a": '"""Leask et al."""\ndef f(name):\n    return name == "leask_editing"'}),
        (names_of_papers, {"core.a": "def read_minder(x): ..."}),
        (names_of_papers, {"core.a": "class OneillSAE: ..."}),
        (names_of_papers, {"core.a": "class SAEOfLeask: ...  # Leask et al."}),
        (names_of_papers, {"core.song": ""}),
    ],
)
def test_a_breach_of_each_rule_would_be_noticed(check, sources):
    assert len(check(parsed(sources))) == 1
