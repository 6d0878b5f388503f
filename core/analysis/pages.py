"""Pages to browse results: one HTML file each, which needs nothing else and runs in any browser.

A template has the places `$title`, `$note`, `$style` (shared by all pages) and `$data`, a JSON value that the page's
script reads. Whatever models and texts wrote is shown as text.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from string import Template
from typing import Any

from core.atomic import write_atomically

STYLE = Path(__file__).with_name("pages.css")


def write_page(path: Path, template: Path, title: str, note: str, data: Any) -> None:
    """Write the page. Raises ValueError for numbers that JSON does not know (NaN, infinity)."""
    page = Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), note=html.escape(note), style=STYLE.read_text(encoding="utf-8"), data=_json(data)
    )
    write_atomically(path, page.encode("utf-8", errors="replace"))


def _json(data: Any) -> str:
    """JSON that cannot close the HTML element around it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
