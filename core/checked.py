"""Settings as frozen dataclasses that convert and check their values: name, type and range stand in one place."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from decimal import Decimal
from functools import cache
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from core.errors import UserError

LARGEST = 2**63  # whole numbers are below it in size: files and tensors hold no larger ones
IN_QUOTES = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)  # a number that is written as text
MAX_SHOWN = 80  # characters of a value in a message


def rule(holds: Callable[[Any], bool], words: str, **options: Any) -> Any:
    """A field whose value must satisfy `holds`; `words` say so after "must". `default`: it need not be given.

    None and the words of a choice (`auto`) are not asked for: the field's type says whether they will do.
    """
    return field(metadata={"rule": (holds, words)}, **options)


def positive(**options: Any) -> Any:
    return rule(lambda value: value > 0, "be positive", **options)


def at_least(minimum: float, **options: Any) -> Any:
    return rule(lambda value: value >= minimum, f"be {minimum} or more", **options)


def between(low: float, high: float, **options: Any) -> Any:
    return rule(lambda value: low <= value <= high, f"lie between {low} and {high}", **options)


def each_at_least(minimum: float, **options: Any) -> Any:
    """A list with an item or more, each of at least `minimum`."""
    words = f"be a list with one item or more, each {minimum} or more"
    return rule(lambda items: len(items) > 0 and min(items) >= minimum, words, **options)


def not_empty(**options: Any) -> Any:
    return rule(lambda value: len(value) > 0, "not be empty", **options)


def require(condition: bool, name: str, value: object, words: str) -> None:
    """`UserError` that says the setting's name, its value and what it must do."""
    if not condition:
        raise UserError(f"{name}: {shown(value)} must {words}.")


def shown(value: object) -> str:
    """A value as a YAML file has it, cut if it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Values that are converted to the types of their fields, and checked, when an instance is made.

    int: a whole number below 2^63 in size, also as 1e8 or "1_000". float: a finite number. bool: true or false, no
    number. str: a text. Literal: one of the choices. tuple: from a list of the same length, or of any length for
    `tuple[int, ...]`. dict: from a group of settings with any names. Another `Checked`: from a group of its settings.
    `int | None` takes None as well. Any other type: an instance of it. Then the field's `rule` is applied.
    Raises UserError with a line for each wrong setting: its name, its value and what it must be.
    """

    node: ClassVar[str]  # where the settings stand in the configuration; empty: at its top

    def __post_init__(self) -> None:
        problems: list[str] = []
        for entry in fields(self):
            value = _checked(entry, getattr(self, entry.name), self.named(entry.name), type(self), problems)
            object.__setattr__(self, entry.name, value)
        refuse(problems)
        self.check()

    def check(self) -> None:
        """Raise UserError where settings that are right alone do not fit together."""

    def named(self, name: str) -> str:
        """The full name of a setting."""
        return f"{self.node}.{name}" if self.node else name

    @classmethod
    def of(cls, values: Mapping[str, Any], node: str | None = None) -> Self:
        """From values by name, which stand at `node` of the configuration. Raises UserError for names that are unknown
        or missing, too."""
        node = cls.node if node is None else node
        where = f"{node}." if node else ""
        known = {entry.name: entry for entry in fields(cls)}
        problems = [
            f"{where}{name}: there is no such setting.{nearest(name, known, where)}"
            for name in values
            if name not in known
        ]
        for name, entry in known.items():
            if name in values:
                _checked(entry, values[name], f"{where}{name}", cls, problems)
            elif entry.default is MISSING and entry.default_factory is MISSING:
                problems.append(f"{where}{name}: this setting is missing.")
        refuse(problems)
        made = cls.__new__(cls)
        object.__setattr__(made, "node", node)
        made.__init__(**values)  # type: ignore[misc]  # the constructor of a dataclass, after its node is known
        return made

    def plain(self) -> dict[str, Any]:
        """By name, fit for JSON."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}


def nearest(name: str, names: Iterable[str], where: str = "") -> str:
    """What to say about a name that is not there: the name that is most like it, or all of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {where}{close[0]}?" if close else f" There are: {', '.join(names)}."


def refuse(problems: Sequence[str]) -> None:
    """UserError with a line for each problem, if there is one."""
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def converted(value: Any, kind: Any, name: str, problems: list[str]) -> Any:
    """`value` as the type `kind`. What is wrong with it is added to `problems`; then the result means nothing."""
    kinds = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    if value is None and NoneType in kinds:
        return None
    kinds = tuple(each for each in kinds if each is not NoneType)
    or_null = " or null" if NoneType in (get_args(kind) or ()) else ""
    if len(kinds) == 1:
        return _as(value, kinds[0], name, or_null, problems)
    for each in kinds:
        wrong: list[str] = []
        result = _as(value, each, name, "", wrong)
        if not wrong:
            return result
    words = " or ".join(map(_words, kinds))
    problems.append(f"{name}: {shown(value)} must be {words}{or_null}.")
    return value


def _checked(entry: Field[Any], value: Any, name: str, cls: type, problems: list[str]) -> Any:
    """A field's value, converted and under its rule."""
    wrong: list[str] = []
    result = converted(value, _hints(cls)[entry.name], name, wrong)
    holds, words = entry.metadata.get("rule", (None, ""))
    asked = holds is not None and not wrong and result is not None and not _is_choice(result, _hints(cls)[entry.name])
    if asked and not holds(result):
        wrong.append(f"{name}: {shown(_plain(result))} must {words}.")
    problems += wrong
    return result


def _as(value: Any, kind: Any, name: str, or_null: str, problems: list[str]) -> Any:
    """`value` as one type that is no union."""
    origin, choices = get_origin(kind), get_args(kind)
    wrong = f"{name}: {shown(value)} must be {_words(kind)}{or_null}."
    if kind is Any:
        return value
    if origin is Literal:
        if not _is_choice(value, kind):
            problems.append(wrong)
        return value
    if kind in (int, float):
        return _number(value, kind, wrong, problems)
    if origin in (tuple, list, Sequence):
        return _items(value, choices, name, wrong, problems, fixed=origin is tuple and choices[-1] is not ...)
    if isinstance(value, Mapping) and origin in (dict, Mapping):
        return {key: converted(item, choices[1], f"{name}.{key}", problems) for key, item in value.items()}
    if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Checked):
        try:
            return kind.of({str(key): item for key, item in value.items()}, name)
        except UserError as error:
            problems += str(error).splitlines()
            return value
    wanted: type = origin or kind
    try:
        is_one = isinstance(value, wanted)
    except TypeError:  # a protocol, of which only objects can be
        is_one = False
    if not is_one:
        hint = f" In quotes it is one: {name}=\"'{value}'\"" if kind is str and isinstance(value, int | float) else ""
        problems.append(wrong + hint)
    return value


def _items(value: Any, kinds: tuple[Any, ...], name: str, wrong: str, problems: list[str], fixed: bool) -> Any:
    """A list's items, each converted. `fixed`: it has one item for each kind, and is made a tuple."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or (fixed and len(value) != len(kinds)):
        problems.append(wrong)
        return value
    each = kinds if fixed else (kinds[0],) * len(value)
    places = [f"{name}[{i}]" if isinstance(item, Mapping) else name for i, item in enumerate(value)]
    return tuple(converted(*of_item, problems) for of_item in zip(value, each, places, strict=True))


def _number(value: Any, kind: type, wrong: str, problems: list[str]) -> Any:
    """A whole number or a finite one, also if it is written as text."""
    if isinstance(value, str) and IN_QUOTES.fullmatch(value) and len(value) <= MAX_SHOWN:
        value = _exact(value)
    if not _is_finite(value) or (kind is int and value != int(value)):
        problems.append(wrong)
        return value
    if kind is int and not -LARGEST <= value < LARGEST:
        problems.append(wrong.removesuffix(".") + ", below 2^63 in size.")
        return value
    return kind(value)


def _exact(text: str) -> int | float:
    """The number that a text is, as a whole number if it is one that can be used."""
    number = Decimal(text.replace("_", ""))
    return int(number) if abs(number) < LARGEST and number == number.to_integral_value() else float(number)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def _is_choice(value: Any, kind: Any) -> bool:
    """Whether the value is one of the words of a Literal, alone or in a union."""
    if get_origin(kind) in (UnionType, Union):
        return any(_is_choice(value, each) for each in get_args(kind))
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _words(kind: Any) -> str:
    """What a value of this type is, in words."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    if origin is tuple and choices[-1] is not ...:
        return f"a list of {len(choices)} numbers"
    named = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path"}
    if kind in named:
        return named[kind]
    if origin in (tuple, list, Sequence):
        return "a list"
    if origin in (dict, Mapping) or (isinstance(kind, type) and issubclass(kind, Checked)):
        return "a group of settings"
    return f"a {getattr(origin or kind, '__name__', kind)}"


def _plain(value: Any) -> Any:
    if isinstance(value, Checked):
        return value.plain()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
