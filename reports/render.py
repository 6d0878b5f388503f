"""Write a report as Markdown and as one HTML file that needs nothing else.

A report is a list of blocks: headings, paragraphs, lists, tables and figures. Their texts are escaped, since models,
data and results wrote parts of them. Only `Markup`, which is ours, is written into Markdown as it is.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from reports.safe_text import plain, shortened


class Markup(str):
    """Text of our own that is Markdown already, such as a link or a name in backticks."""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    path: Path  # a PNG or SVG file
    caption: str


Block = Heading | Paragraph | Bullets | Table | Figure


def own_words(text: str) -> Paragraph:
    """A paragraph of our own, which is Markdown already."""
    return Paragraph(Markup(text))


LONGEST_WORD = 60  # on the page; the whole word is its tooltip
# Nothing is fetched and no script is run, whatever should ever stand in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.35rem 0.7rem; text-align: left; vertical-align: top; }
th { background: var(--soft); }
td:first-child { white-space: nowrap; }
[title] { border-bottom: 1px dotted; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; background: white; border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: 0.875rem; opacity: 0.8; }
"""


def markdown(blocks: Sequence[Block], folder: Path) -> str:
    """GitHub's Markdown; figures are linked relative to `folder`."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """One HTML page with the figures inside it."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escaped(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {inline(text)}"
        case Paragraph(text):
            return _line(text)
        case Bullets(items):
            return "\n".join(f"- {_line(item)}" for item in items)
        case Table(header, rows):
            lines = [[inline(value) for value in line] for line in (header, *rows)]
            lines.insert(1, ["---"] * len(header))
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Figure(path, caption):
            return f"![{inline(caption)}]({quote(path.relative_to(folder).as_posix())})"


# What Markdown would read as more than text. Signs that are text where they stand, as in `a_b` or `[1, 2]`, stay.
_MARKS = re.compile(
    r"""(?P<sign> [`$|~] | \\(?=[!-/:-@\[-`{-~]|$)  # code, formulas, cells, strikethrough, escapes
        | \*(?!\s) | (?<!\s)\*                # emphasis
        | (?<!\w)_ | _(?!\w)
        | \](?=[(\[:]) | \[(?=[\^!]) | !(?=\[) # links, notes, images
        )
    | (?P<tag> <(?=[a-zA-Z/!?]) )
    | (?P<entity> &(?=\#?\w+;) )""",
    re.VERBOSE,
)
_FIRST = re.compile(r"^(?:[#>+=-]|\d+(?=[.)](?:\s|$)))")  # what would begin a heading, a quote or a list


def inline(text: str) -> str:
    """A text in Markdown: on one line, with its signs escaped; `Markup` as it is, but for the borders of cells."""
    if isinstance(text, Markup):
        return text.replace("|", "\\|").replace("\n", " ")
    return _MARKS.sub(_escape_mark, plain(text))


def _escape_mark(match: re.Match[str]) -> str:
    return {"sign": f"\\{match[0]}", "tag": "&lt;", "entity": "&amp;"}[str(match.lastgroup)]


def _line(text: str) -> str:
    """As `inline`, where a line begins."""
    if isinstance(text, Markup):
        return text
    escaped = inline(text).lstrip()
    first = _FIRST.match(escaped)
    if first is None:
        return escaped
    return f"{first[0]}\\{escaped[first.end() :]}" if first[0].isdigit() else f"\\{escaped}"


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_escaped(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_escaped(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_escaped(item)}</li>' for item in items)}</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{_escaped(text)}</th>" for text in header)
            body = "".join(f"<tr>{''.join(f'<td>{_escaped(text)}</td>' for text in row)}</tr>" for row in rows)
            return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Figure(path, caption):
            kind = {"svg": "svg+xml"}.get(path.suffix[1:], path.suffix[1:])
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{html.escape(plain(caption))}" src="data:image/{kind};base64,{data}">'
            return f"<figure>{image}<figcaption>{_escaped(caption)}</figcaption></figure>"


def _escaped(text: str) -> str:
    """A text in HTML. A word that is too long for a page is shortened, and says all of itself in a tooltip."""
    words = re.split(r"(\s+)", plain(text))
    return "".join(html.escape(word) if len(word) <= LONGEST_WORD else _with_tooltip(word) for word in words)


def _with_tooltip(word: str) -> str:
    return f'<span title="{html.escape(word)}">{html.escape(shortened(word, LONGEST_WORD))}</span>'
