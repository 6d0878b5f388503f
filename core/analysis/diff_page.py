"""A page to browse what a crosscoder says differs between two models: one HTML file that needs nothing else.

It shows how the latents divide over Delta_norm and over Latent Scaling's two ratios, what putting latents into the base
model recovers of the chat model, and each latent with the texts on which it fires most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from core.analysis import pages

TEMPLATE = Path(__file__).with_name("diff_page.html")
Kind = Literal["chat_only", "base_only", "shared", "other"]
MAX_POINTS = 20_000  # of the scatter


class Context(NamedTuple):
    """A piece of text on which a latent fires."""

    where: str  # the text's kind, such as `web` or `chat`
    tokens: Sequence[str]
    strengths: Sequence[float]  # of the latent at each token, as a share of its maximum
    is_template: Sequence[bool]  # tokens that the chat template put there


class Point(NamedTuple):
    """A latent in the pictures; a ratio that is not known is NaN."""

    id: int
    kind: Kind
    delta_norm: float
    nu_error: float
    nu_reconstruction: float
    specific: bool  # whether Latent Scaling agrees that it is the chat model's own


class Latent(NamedTuple):
    """A latent with a page of its own."""

    id: int
    rate_web: float  # share of web tokens on which it fires
    rate_chat: float  # share of tokens of dialogues
    template_share: float  # of its activations on dialogues, those on the template's tokens
    contexts: Sequence[Context]


class Bar(NamedTuple):
    """KL(chat || patched) in nats per token, after an intervention."""

    name: str
    positions: str  # which tokens are counted
    value: float
    low: float
    high: float
    pool: str  # the latents among which the intervention chose


class Fact(NamedTuple):
    name: str
    value: str


def write_page(
    path: Path,
    title: str,
    note: str,
    facts: Sequence[Fact],
    points: Sequence[Point],
    latents: Sequence[Latent],
    bars: Sequence[Bar],
) -> None:
    """Write the page. `points` are all latents that fire; `latents`, in the order of the list, may be some of them.

    Raises ValueError for a latent that is no point, and for contexts whose parts differ in length."""
    known = {point.id for point in points}
    if strange := [latent.id for latent in latents if latent.id not in known]:
        raise ValueError(f"Latents without a point: {strange[:5]}.")
    if len(points) > MAX_POINTS:
        listed, step = {latent.id for latent in latents}, math.ceil(len(points) / MAX_POINTS)
        shown = [point for n, point in enumerate(points) if n % step == 0 or point.id in listed]
        note += f" The scatter shows {len(shown):,} of {len(points):,} latents."
    else:
        shown = list(points)
    counts = [sum(point.kind == kind for point in points) for kind in get_args(Kind)]
    data = {
        "facts": [list(fact) for fact in facts],
        "counts": dict(zip(get_args(Kind), counts, strict=True)),
        "histogram": _histogram([point.delta_norm for point in points]),
        "points": [[p.id, p.kind, *(_number(v) for v in p[2:5]), p.specific] for p in shown],
        "latents": [_latent(latent) for latent in latents],
        "bars": [[b.name, b.positions, *(_number(v) for v in b[2:5]), b.pool] for b in bars],
    }
    pages.write_page(path, TEMPLATE, title, note, data)


def _histogram(values: Sequence[float], n_bins: int = 50) -> list[int]:
    """Counts over [0, 1] in bins of equal width."""
    counts = [0] * n_bins
    for value in values:
        counts[min(n_bins - 1, max(0, int(value * n_bins)))] += 1
    return counts


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def _latent(latent: Latent) -> list[Any]:
    contexts = [
        [c.where, [[t, round(s, 3), int(is_template)] for t, s, is_template in zip(*c[1:], strict=True)]]
        for c in latent.contexts
    ]
    return [latent.id, *(_number(v) for v in latent[1:4]), contexts]
