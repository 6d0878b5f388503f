"""The bundled corpus: real text that every Python installation already has, harvested on the user's machine.

There are four kinds of documents, like the subsets of a corpus:
  prose      help topics of the language (`pydoc_data.topics`), read-me files and other text files of installed packages
  docstring  the docstrings of a module, each after the signature of its object
  code       the same module's source without its docstrings
  legal      licence texts
Only the standard library and the distributions named in `requirements.lock` are read, so the lock file and the version
of Python decide the corpus. Nothing is redistributed.

Text that deflate shrinks to under a fifth is marked as repetitive, such as generated tables and copies of code.
Compressors do well on it, and language models of our size learn little from it.

All documents from one file go to the same side of the split, which depends only on the file's content. A document is
dropped as a near-duplicate if most of its long lines occurred in earlier documents.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from core.text.documents import split_of

TAGS = ("prose", "docstring", "code", "legal")
LOCK_FILE = Path(__file__).parents[2] / "requirements.lock"
SKIPPED_FOLDERS = {"test", "tests", "testing", "_testing", "idle_test", "site-packages", "__pycache__", "_vendor"}
PROSE_ENDINGS = (".md", ".rst", ".txt", "METADATA")
LEGAL_NAME = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|COPYRIGHT)", re.IGNORECASE)
MAX_FILE_BYTES = 200_000  # longer files are tables and generated code
MIN_DOCUMENT_CHARS = 200
MAX_MEAN_LINE_CHARS = 160  # longer lines on average mean data, not text
LONG_LINE_CHARS = 30  # only lines of at least this length are compared for near-duplicates
MAX_SEEN_FRACTION = 0.5
REPETITIVE_BELOW = 0.2  # deflated bytes per byte


@dataclass(frozen=True, slots=True)
class Harvested:
    """A document with its tag, its side of the split, its file, and whether it is repetitive."""

    text: str
    tag: str
    split: str
    source: str
    repetitive: bool


def harvest(mb_per_package: float) -> list[Harvested]:
    """All documents of the standard library and the locked packages, at most `mb_per_package` MB of files from each.

    A hash of the file names decides which files of a large package are read, so the choice is spread over the package
    and is the same on every machine. The order of the result is fixed.
    """
    files = [file for _, group in sorted(_packages().items()) for file in _within_budget(group, mb_per_package * 1e6)]
    seen_lines: set[int] = set()
    seen_texts: set[bytes] = set()
    kept = []
    for document in _documents(files):
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest not in seen_texts and not _near_duplicate(document.text, seen_lines):
            seen_texts.add(digest)
            kept.append(document)
    return kept


def locked_names(lock_file: Path = LOCK_FILE) -> list[str]:
    """The distributions that `requirements.lock` names, in its order."""
    if not lock_file.exists():
        raise FileNotFoundError(
            f"{lock_file} is missing: data=bundled reads the packages named in it. "
            "Run from a complete checkout, or choose data=local with data.path=<your text file>."
        )
    lines = (line.strip() for line in lock_file.read_text().splitlines())
    return [re.split(r"[=<>!~;\[ ]", line, maxsplit=1)[0] for line in lines if line and line[0] not in "#-"]


def _packages() -> dict[str, list[tuple[str, Path]]]:
    """{package: [(name within it, path)]}; the standard library is called `python`."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    packages = {"python": [(str(path.relative_to(stdlib)), path) for path in stdlib.rglob("*.py")]}
    for name in locked_names():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        packages[name.lower()] = [(str(file), Path(str(file.locate()))) for file in distribution.files or ()]
    return {
        package: [(name, path) for name, path in files if _wanted(name)] for package, files in sorted(packages.items())
    }


def _wanted(name: str) -> bool:
    parts = Path(name).parts
    if SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[0] == "..":
        return False
    return name.endswith((".py", *PROSE_ENDINGS)) or LEGAL_NAME.search(parts[-1]) is not None


def _within_budget(files: list[tuple[str, Path]], budget_bytes: float) -> list[tuple[str, Path]]:
    """Files in the order of their names' hashes until the budget is spent; text files first, since they are few."""

    def rank(item: tuple[str, Path]) -> tuple[bool, bytes]:
        return item[0].endswith(".py"), hashlib.blake2b(item[0].encode(), digest_size=8).digest()

    chosen = []
    for name, path in sorted(files, key=rank):
        size = path.stat().st_size if path.is_file() else 0
        if 0 < size <= MAX_FILE_BYTES:
            chosen.append((name, path))
            budget_bytes -= size
        if budget_bytes <= 0:
            break
    return chosen


def _documents(files: Iterable[tuple[str, Path]]) -> Iterator[Harvested]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield from _checked([("prose", text)], text, f"pydoc/{topic}")
    for name, path in files:
        try:
            content = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except (UnicodeDecodeError, OSError):
            continue
        if name.endswith(".py"):
            yield from _checked(split_python(content, Path(name).stem), content, name)
        elif LEGAL_NAME.search(Path(name).name):
            yield from _checked([("legal", content)], content, name)
        else:
            body = content.partition("\n\n")[2] if name.endswith("METADATA") else content
            yield from _checked([("prose", body)], content, name)


def _checked(parts: list[tuple[str, str]], content: str, source: str) -> Iterator[Harvested]:
    for tag, text in parts:
        text = text.strip()
        if len(text) >= MIN_DOCUMENT_CHARS and len(text) <= MAX_MEAN_LINE_CHARS * (text.count("\n") + 1):
            encoded = text.encode()
            repetitive = len(zlib.compress(encoded, 9)) < REPETITIVE_BELOW * len(encoded)
            yield Harvested(text, tag, split_of(content), source, repetitive)


def split_python(source: str, module: str) -> list[tuple[str, str]]:
    """[("docstring", ...), ("code", ...)] of a module's source; empty if it does not parse.

    The docstring document lists every documented object as its signature followed by its docstring.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    entries = []
    lines: list[str | None] = list(source.split("\n"))
    for node, qualified in _documented(tree, module):
        statement = node.body[0]
        entries.append(f"{_signature(node, qualified)}\n{ast.get_docstring(node)}")
        assert statement.end_lineno is not None
        if len(node.body) > 1 and not (lines[statement.end_lineno - 1] or "").rstrip().endswith(";"):
            lines[statement.lineno - 1 : statement.end_lineno] = [None] * (statement.end_lineno - statement.lineno + 1)
    code = "\n".join(line for line in lines if line is not None)
    return [("docstring", "\n\n".join(entries)), ("code", code)]


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: ast.AST, qualified: str) -> Iterator[tuple[_Documented, str]]:
    """Every node from `node` down that has a docstring, with its dotted name, in source order."""
    if isinstance(node, _Documented) and ast.get_docstring(node, clean=False):
        yield node, qualified
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{qualified}.{child.name}")


def _signature(node: _Documented, qualified: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"def {qualified}({', '.join(a.arg for a in node.args.args)})"
    return f"class {qualified}" if isinstance(node, ast.ClassDef) else f"module {qualified}"


def _near_duplicate(text: str, seen_lines: set[int]) -> bool:
    """Whether most long lines of `text` occurred before. Adds them all to `seen_lines`."""
    stripped = (line.strip() for line in text.split("\n"))
    lines = {
        int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "big")
        for line in stripped
        if len(line) >= LONG_LINE_CHARS
    }
    known = len(lines & seen_lines)
    seen_lines |= lines
    return bool(lines) and known > MAX_SEEN_FRACTION * len(lines)
