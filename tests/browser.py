"""A page of the project in a real browser: headless Chromium."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")


def in_browser(page: Path, steps: str, folder: Path, size: str = "1300,900") -> dict[str, Any]:
    """What `steps` (JavaScript, which fills `seen`) found on the page."""
    probe = folder / "probe.html"
    script = (
        "<script>addEventListener('load', async () => { const seen = {};"
        "const $ = s => document.querySelector(s), nodes = s => [...document.querySelectorAll(s)];"
        "const all = s => nodes(s).map(n => n.textContent);"
        "const type = t => { $('#search').value = t; $('#search').dispatchEvent(new Event('input')); };"
        "const wait = () => new Promise(r => setTimeout(r, 50));"
        f"{steps}; const out = document.createElement('pre'); out.id = 'seen'; out.textContent = JSON.stringify(seen);"
        "document.body.append(out); });</script></body>"
    )
    probe.write_text(page.read_text().replace("</body>", script))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command = [
        str(CHROMIUM),
        *flags,
        "--virtual-time-budget=4000",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={size}",
        "--dump-dom",
    ]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=90)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))
