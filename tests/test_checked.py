"""Settings that check themselves: what each annotation takes, what it refuses, and what the message says."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.checked import IN_QUOTES, Checked, at_least, between, each_at_least, not_empty, positive, rule
from core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Oven(Checked):
    node: ClassVar[str] = "oven"
    minutes: int = positive()
    degrees: float = between(20, 250)
    fan: bool
    mode: Literal["bake", "grill"]
    racks: int | None = at_least(1)
    curve: tuple[float, float] = rule(lambda curve: curve[0] <= curve[1], "rise")

    def check(self) -> None:
        if self.mode == "grill" and self.fan:
            raise UserError("oven.fan: the grill has none.")


GOOD: dict[str, Any] = {
    "minutes": 30, "degrees": 180.0, "fan": False, "mode": "bake", "racks": None, "curve": [0.5, 1.0],
}  # fmt: skip
WORDS = st.text().filter(lambda text: not IN_QUOTES.fullmatch(text))
NO_NUMBERS = st.one_of(st.none(), st.booleans(), WORDS, st.lists(st.integers()), st.just(math.nan))
WRONG = {
    "minutes": NO_NUMBERS | st.floats().filter(lambda value: not value.is_integer()) | st.integers(max_value=0),
    "degrees": NO_NUMBERS | st.just(math.inf) | st.just(10**400) | st.floats(max_value=19.9),
    "fan": st.none() | st.text() | st.integers() | st.floats(),
    "mode": (st.none() | st.booleans() | st.integers() | st.text()).filter(
        lambda value: value not in ("bake", "grill")
    ),
    "racks": NO_NUMBERS.filter(lambda value: value is not None) | st.just(1.5) | st.integers(max_value=0),
    "curve": st.none()
    | st.text()
    | st.integers()
    | st.lists(st.floats(0, 1)).filter(lambda items: len(items) != 2)
    | st.tuples(st.floats(0, 1), st.text())
    | st.just([1.0, 0.5]),
}


@given(st.sampled_from(sorted(WRONG)).flatmap(lambda name: st.tuples(st.just(name), WRONG[name])))
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(wrong: tuple[str, Any]):
    name, value = wrong
    with pytest.raises(UserError, match=rf"^oven\.{name}: .* must "):
        Oven.of(GOOD | {name: value})


@given(minutes=st.integers(1, 10**9), degrees=st.floats(20, 250), racks=st.none() | st.integers(1, 9))
def test_right_values_get_the_annotated_types_and_come_back_as_plain_data(minutes: int, degrees: float, racks: Any):
    oven = Oven.of(GOOD | {"minutes": float(minutes), "degrees": degrees, "racks": racks, "curve": [0, 1]})
    assert (oven.minutes, oven.degrees, oven.racks, oven.curve) == (minutes, degrees, racks, (0.0, 1.0))
    assert type(oven.minutes) is int and type(oven.degrees) is float and type(oven.curve[0]) is float
    assert oven.plain()["curve"] == [0.0, 1.0] and Oven.of(oven.plain()) == oven


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"minutes": 64.5}, "oven.minutes: 64.5 must be a whole number."),
     ({"minutes": True}, "oven.minutes: true must be a whole number."),
     ({"minutes": -3}, "oven.minutes: -3 must be positive."),
     ({"degrees": None}, "oven.degrees: null must be a finite number."),
     ({"degrees": 300}, "oven.degrees: 300.0 must lie between 20 and 250."),
     ({"fan": 1}, "oven.fan: 1 must be true or false."),
     ({"mode": "boil"}, "oven.mode: 'boil' must be one of bake, grill."),
     ({"racks": 0}, "oven.racks: 0 must be 1 or more."),
     ({"curve": [0.9]}, "oven.curve: [0.9] must be a list of 2 numbers."),
     ({"curve": [2, 1]}, "oven.curve: [2.0, 1.0] must rise."),
     ({"mode": "grill", "fan": True}, "oven.fan: the grill has none."),
     ({"minuets": 3},
      "oven.minuets: there is no such setting. Did you mean oven.minutes?"),
     ({"wax": 3}, "oven.wax: there is no such setting. There are: minutes, degrees, fan, mode, racks, curve."),
     ({"minutes": 1e30}, "oven.minutes: 1e+30 must be a whole number, below 2^63 in size."),
     ({"minutes": "1e-3"}, "oven.minutes: '1e-3' must be a whole number."),
     ({"minutes": "2,000"}, "oven.minutes: '2,000' must be a whole number."),
     ({"racks": "abc"}, "oven.racks: 'abc' must be a whole number or null.")],
)  # fmt: skip
def test_the_message_names_the_setting_its_value_and_the_rule(changes: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        Oven.of(GOOD | changes)
    assert str(error.value) == message


def test_a_missing_setting_is_named_and_a_large_power_of_ten_is_a_whole_number():
    with pytest.raises(UserError, match=r"^oven\.fan: this setting is missing\.$"):
        Oven.of({name: value for name, value in GOOD.items() if name != "fan"})
    assert Oven.of(GOOD | {"minutes": 1e8}).minutes == 100_000_000


@pytest.mark.parametrize(
    ("text", "number"),
    [("30", 30), ("1e8", 100_000_000), ("1_000_000", 1_000_000), ("2.5e1", 25), ("+7", 7), ("64.0", 64),
     (str(2**63 - 1), 2**63 - 1)],
)  # fmt: skip
def test_a_number_in_quotes_is_a_number(text: str, number: int):
    minutes = Oven.of(GOOD | {"minutes": text}).minutes
    assert minutes == number and type(minutes) is int
    assert Oven.of(GOOD | {"degrees": "2.05e2"}).degrees == 205.0


@pytest.mark.parametrize(
    "text", ["", " 3", "3 ", "nan", "inf", "0x10", "1__", "e5", "1e99999", "٣", "1" * 5000, "1e9999", "-"]
)
def test_what_only_looks_like_a_number_is_none(text: str):
    with pytest.raises(UserError, match=r"^oven\.degrees: "):
        Oven.of(GOOD | {"degrees": text})


def test_every_wrong_setting_has_a_line_of_its_own():
    with pytest.raises(UserError) as error:
        Oven.of({**GOOD, "minutes": 0, "fan": "yes", "wax": 1})
    assert str(error.value).splitlines() == [
        "oven.wax: there is no such setting. There are: minutes, degrees, fan, mode, racks, curve.",
        "oven.minutes: 0 must be positive.",
        "oven.fan: 'yes' must be true or false.",
    ]


@dataclass(frozen=True, kw_only=True)
class Kitchen(Checked):
    node: ClassVar[str] = ""
    oven: Oven
    ovens: tuple[Oven, ...] = not_empty()
    spare: Oven | None
    drawers: dict[str, int]
    cooks: Literal["auto"] | int = at_least(1)
    shifts: tuple[int, ...] = each_at_least(1)


KITCHEN: dict[str, Any] = {
    "oven": GOOD, "ovens": [GOOD, GOOD], "spare": None, "drawers": {"knives": "4"}, "cooks": "auto", "shifts": [1, 2],
}  # fmt: skip


def test_groups_lists_of_groups_and_choices_beside_numbers_are_settings():
    kitchen = Kitchen.of(KITCHEN)
    assert kitchen.ovens[1].minutes == 30 and kitchen.drawers == {"knives": 4} and kitchen.cooks == "auto"
    assert Kitchen.of(KITCHEN | {"cooks": 2.0, "spare": GOOD}).plain()["spare"]["curve"] == [0.5, 1.0]
    assert Kitchen.of(kitchen.plain()) == kitchen


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"oven": GOOD | {"minutes": 0}}, "oven.minutes: 0 must be positive."),
     ({"oven": 3}, "oven: 3 must be a group of settings."),
     ({"ovens": []}, "ovens: [] must not be empty."),
     ({"ovens": [GOOD, GOOD | {"fan": 1}]}, "ovens[1].fan: 1 must be true or false."),
     ({"ovens": [GOOD | {"mode": "grill", "fan": True}]}, "oven.fan: the grill has none."),
     ({"spare": "x"}, "spare: 'x' must be a group of settings or null."),
     ({"drawers": {"forks": 1.5}}, "drawers.forks: 1.5 must be a whole number."),
     ({"cooks": "abc"}, "cooks: 'abc' must be auto or a whole number."),
     ({"cooks": 0}, "cooks: 0 must be 1 or more."),
     ({"shifts": []}, "shifts: [] must be a list with one item or more, each 1 or more."),
     ({"shifts": [0]}, "shifts: [0] must be a list with one item or more, each 1 or more.")],
)  # fmt: skip
def test_what_is_wrong_in_a_group_is_named_by_its_place(changes: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        Kitchen.of(KITCHEN | changes)
    assert str(error.value) == message


@dataclass(frozen=True, kw_only=True)
class Shelf(Checked):
    node: ClassVar[str] = "shelf"
    name: str
    heights: tuple[int, ...]
    wood: Literal["oak", "pine"] | None
    legs: Literal[3, 4]
    labels: dict[str, Any]
    shade: float = 0.5


SHELF: dict[str, Any] = {"name": "a", "heights": [1, 2, 3], "wood": None, "legs": 4, "labels": {"x": 1}}


def test_texts_lists_of_any_length_optional_choices_and_defaults_are_settings():
    shelf = Shelf.of(SHELF)
    assert shelf.heights == (1, 2, 3) and shelf.wood is None and shelf.shade == 0.5 and shelf.labels == {"x": 1}
    assert Shelf.of({**SHELF, "wood": "oak", "heights": []}).heights == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"name": 4}, "shelf.name: 4 must be a text. In quotes it is one: shelf.name=\"'4'\""),
     ({"heights": [1, 1.5]}, "shelf.heights: 1.5 must be a whole number."),
     ({"heights": "12"}, "shelf.heights: '12' must be a list."),
     ({"wood": "ash"}, "shelf.wood: 'ash' must be one of oak, pine or null."),
     ({"legs": True}, "shelf.legs: true must be one of 3, 4."),
     ({"labels": [1]}, "shelf.labels: [1] must be a group of settings.")],
)  # fmt: skip
def test_their_messages_name_the_setting_its_value_and_the_rule_too(changes: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        Shelf.of(SHELF | changes)
    assert str(error.value) == message
