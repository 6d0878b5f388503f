"""How the figures of the benchmarks look, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

BENCH_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "bench",  # the same file from the same numbers
}


def save(figure: Figure, path: Path) -> list[Path]:
    """PNG and SVG beside each other, without a date inside."""
    written = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    for file in written:
        figure.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)
    return written
