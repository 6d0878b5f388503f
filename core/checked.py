"""Settings as frozen dataclasses that convert and check their values: name, type and range stand in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from core.errors import UserError


def rule(holds: Callable[[Any], bool], words: str) -> Any:
    """A field whose value must satisfy `holds`; `words` say so after "must"."""
    return field(metadata={"rule": (holds, words)})


def positive() -> Any:
    return rule(lambda value: value > 0, "be positive")


def at_least(minimum: int) -> Any:
    return rule(lambda value: value >= minimum, f"be {minimum} or more")


def between(low: float, high: float) -> Any:
    return rule(lambda value: low <= value <= high, f"lie between {low} and {high}")


def require(condition: bool, name: str, value: object, words: str) -> None:
    """`UserError` that says the setting's name, its value and what it must do."""
    if not condition:
        raise UserError(f"{name}: {value!r} must {words}.")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Values that are converted to the types of their fields, and checked, when an instance is made.

    int: a whole number, 1e8 as well. float: a finite number. bool: true or false, no number. str: a text. Literal: one
    of the choices. tuple: from a list of the same length, or of any length for `tuple[int, ...]`. `int | None` takes
    None as well. Any other type: an instance of it. Then the field's `rule` is applied.
    Raises UserError that names the setting, its value and what it must be.
    """

    node: ClassVar[str]  # where the settings stand in the configuration

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for entry in fields(self):
            name = f"{self.node}.{entry.name}"
            value = _converted(name, getattr(self, entry.name), types[entry.name])
            object.__setattr__(self, entry.name, value)
            holds, words = entry.metadata.get("rule", (lambda _: True, ""))
            require(value is None or holds(value), name, value, words)
        self.check()

    def check(self) -> None:
        """Raise UserError where settings that are right alone do not fit together."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From values by name. Raises UserError for a name that is unknown or missing, too."""
        names = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in names:
                raise UserError(f"{cls.node}.{name}: there is no such setting here. There are: {', '.join(names)}.")
        for entry in fields(cls):
            if entry.name not in values and entry.default is MISSING:
                raise UserError(f"{cls.node}.{entry.name}: this setting is missing.")
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """By name, fit for JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _converted(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type `kind`; UserError that names the setting if it is none."""
    origin, choices = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        is_choice = any(value == choice and type(value) is type(choice) for choice in choices)
        require(is_choice, name, value, f"be one of {', '.join(map(str, choices))}")
        return value
    if origin in (UnionType, Union):
        return None if value is None else _converted(name, value, choices[0])
    if origin is tuple and choices[-1] is ...:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        require(is_list, name, value, "be a list")
        return tuple(_converted(name, item, choices[0]) for item in value)
    if origin is tuple:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        require(is_list and len(value) == len(choices), name, value, f"be a list of {len(choices)} numbers")
        return tuple(_converted(name, item, each) for item, each in zip(value, choices, strict=True))
    if kind is bool:
        require(isinstance(value, bool), name, value, "be true or false")
        return value
    if kind is int:
        require(_is_finite(value) and value == int(value), name, value, "be a whole number")
        return int(value)
    if kind is float:
        require(_is_finite(value), name, value, "be a finite number")
        return float(value)
    wanted: type = origin or kind
    require(isinstance(value, wanted), name, value, f"be a {wanted.__name__}")
    return value


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
