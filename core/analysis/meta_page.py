"""A page to browse latents and their meta-latents: one HTML file that needs nothing else.

It replaces the dashboard of Leask et al. 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.analysis import pages

TEMPLATE = Path(__file__).with_name("meta_page.html")


class Latent(NamedTuple):
    """A latent as the page shows it."""

    id: int
    tokens: Sequence[str]  # that it fires on most strongly
    rate: float  # share of the tokens on which it fires
    contexts: Sequence[tuple[str, str, str]]  # text before, token, text after
    metas: Sequence[tuple[int, float]]  # its meta-latents and their weights, largest first


class MetaLatent(NamedTuple):
    """A meta-latent as the page shows it."""

    id: int
    tokens: Sequence[str]  # that its strongest latents have in common
    n_latents: int  # that it is part of
    latents: Sequence[int]  # the strongest of them, strongest first; some may not be on the page


def write_page(
    path: Path, title: str, note: str, latents: Sequence[Latent], metas: Sequence[MetaLatent], n_latents: int
) -> None:
    """Write the page. `n_latents` is the number of all latents; the page may show fewer. Any text is escaped."""
    if len(latents) < n_latents:
        note += f" The page shows the {len(latents):,} most active of {n_latents:,} latents."
    data = {"latents": [_rounded(latent) for latent in latents], "metas": [list(meta) for meta in metas]}
    pages.write_page(path, TEMPLATE, title, note, data)


def _rounded(latent: Latent) -> list[Any]:
    metas = [[id_, round(weight, 4)] for id_, weight in latent.metas]
    return [latent.id, list(latent.tokens), round(latent.rate, 7), [list(c) for c in latent.contexts], metas]
