"""How a dictionary was trained elsewhere, where its files say so: facts that change what figures about it mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import shown
from core.reading import field, optional_field

TrainingFacts = dict[str, Any]  # fit for JSON; only what the files state
"""
dataset         name of the text
context_size    tokens in a context
prepend_bos     whether contexts began with the beginning-of-sequence token
left_out        what the dictionary never saw: `special tokens`, or the ids of tokens
positions       [first, last + 1, step] of the positions in a context that it saw, as in a slice; null: no bound
"""


def told(facts: Mapping[str, Any], where: str) -> str | None:
    """One sentence on what the dictionary never saw; None if the files say nothing of it. Raises UserError for
    facts of wrong types, as a damaged manifest may hold."""
    parts = []
    if isinstance(left_out := facts.get("left_out"), list):
        ids = [str(field({"left_out": token}, "left_out", int, where)) for token in left_out]
        parts.append(f"without the tokens {', '.join(ids[:8])}{' and more' if len(ids) > 8 else ''}")
    elif words := optional_field(facts, "left_out", str, where):
        parts.append(f"without {shown(words)}")
    if optional_field(facts, "prepend_bos", bool, where) is False:
        parts.append("on contexts that did not begin with a BOS token")
    bounds: list[Any] = optional_field(facts, "positions", list, where) or []
    if bounds:
        numbers = [optional_field({"positions": bound}, "positions", int, where) for bound in bounds]
        parts.append(f"at the positions {':'.join('' if n is None else str(n) for n in numbers)} of a context only")
    if not parts:
        return None
    return (
        f"{where}: by its files the dictionary was trained {' and '.join(parts)}. Figures here are over all tokens; "
        "those with `without_bos` in their names leave out the first token of each text."
    )
