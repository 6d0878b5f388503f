"""Write a report as Markdown and as one HTML file that needs nothing else.

A report is a list of blocks: headings, paragraphs, lists, tables and figures.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.35rem 0.7rem; text-align: left; vertical-align: top; }
th { background: var(--soft); }
td:first-child { white-space: nowrap; }
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
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)
        case Figure(path, caption):
            return f"![{caption}]({path.relative_to(folder).as_posix()})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
            body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows)
            return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Figure(path, caption):
            kind = {"svg": "svg+xml"}.get(path.suffix[1:], path.suffix[1:])
            data = base64.b64encode(path.read_bytes()).decode()
            escaped = html.escape(caption)
            image = f'<img alt="{escaped}" src="data:image/{kind};base64,{data}">'
            return f"<figure>{image}<figcaption>{escaped}</figcaption></figure>"
