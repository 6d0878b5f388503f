"""Whatever bytes a file holds: it is read, or one message names it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.reading import field, optional_field, parse_json, read_json, read_object, read_rows, read_table

FUZZ = settings(
    max_examples=320, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = '{"a": ' + "9" * 5000 + "}"


def mutations(whole: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with a cut, a flip, or an insertion somewhere."""
    place = st.integers(0, len(whole))
    cut = place.map(lambda at: whole[:at])
    flip = st.tuples(place, st.integers(1, 255)).map(
        lambda pair: b"".join(
            [whole[: pair[0]], bytes(b ^ pair[1] for b in whole[pair[0] : pair[0] + 1]), whole[pair[0] + 1 :]]
        )
    )
    insertion = st.tuples(place, st.binary(min_size=1, max_size=8)).map(
        lambda pair: whole[: pair[0]] + pair[1] + whole[pair[0] :]
    )
    return st.one_of(cut, flip, insertion)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"l0": [1.0, 2.0], "name": ["a", "b"]}), path)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1, column 1: not JSON"),
        ('{"a": 1,\n "b": }', "line 2, column 7: not JSON"),
        (DEEP, "not JSON that can be read"),
        (HUGE, "not JSON that can be read"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    ],
)
def test_json_that_cannot_be_read_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cfg.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_a_line_of_a_longer_file_is_named_by_its_number() -> None:
    with pytest.raises(UserError, match=r"texts\.jsonl, line 12, column 2: not JSON"):
        parse_json("{x", "texts.jsonl", first_line=12)
    with pytest.raises(UserError, match=r"texts\.jsonl, line 12: not JSON that can be read"):
        parse_json(HUGE, "texts.jsonl", first_line=12)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"k": 3}')
    assert read_object(tmp_path / "a.json") == {"k": 3}


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"text"', "true"])
def test_an_object_is_asked_for_and_something_else_found(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="not an object with keys"):
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["missing.json", "folder"])
def test_what_is_no_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=name):
        read_json(tmp_path / name)


@FUZZ
@given(data=mutations(json.dumps({"a": [1, 2.5, None, True], "b": {"c": "\u00e9\U0001f600"}}).encode()))
def test_mutated_json_is_read_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mutated.json"
    path.write_bytes(data)
    try:
        read_object(path)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("value", "kind", "read"),
    [(3, int, 3), (4.0, int, 4), (3, float, 3.0), ("x", str, "x"), (False, bool, False), ([1], list, [1])],
)
def test_a_field_has_its_kind(value: object, kind: type, read: object) -> None:
    assert field({"k": value}, "k", kind, "cfg.json") == read


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ([1], str, "cfg.json: k is a list, not a text"),
        ("x", int, "cfg.json: k is 'x', not a whole number"),
        (4.5, int, "cfg.json: k is 4.5, not a whole number"),
        (True, int, "cfg.json: k is true, not a whole number"),
        (1, bool, "cfg.json: k is 1, not true or false"),
        (float("inf"), float, "cfg.json: k is inf, not a finite number"),
        (float("nan"), int, "cfg.json: k is nan, not a whole number"),
        (10**400, float, "cfg.json: k is a whole number, not a finite number"),
        (None, dict, "cfg.json: k is null, not an object with keys"),
    ],
)
def test_a_field_of_another_kind_is_named(value: object, kind: type, message: str) -> None:
    with pytest.raises(UserError, match=message):
        field({"k": value}, "k", kind, "cfg.json")


def test_an_optional_field_may_be_missing_or_null_but_not_of_another_kind() -> None:
    assert optional_field({}, "k", int, "cfg.json") is optional_field({"k": None}, "k", int, "cfg.json") is None
    with pytest.raises(UserError, match=r"cfg\.json: k is 'x'"):
        optional_field({"k": "x"}, "k", int, "cfg.json")
    with pytest.raises(UserError, match=r"cfg\.json has no k"):
        field({}, "k", int, "cfg.json")


def test_a_table_gives_its_rows_and_names_a_column_that_it_lacks(table: Path) -> None:
    assert read_rows(table) == [{"l0": 1.0, "name": "a"}, {"l0": 2.0, "name": "b"}]
    assert read_table(table, ["name"]).column_names == ["name"]
    with pytest.raises(UserError, match=r"t\.parquet has no column count"):
        read_table(table, ["count"])


@FUZZ
@given(data=st.data())
def test_a_mutated_table_is_read_or_refused(data: st.DataObject, table: Path, tmp_path: Path) -> None:
    mutated = tmp_path / "mutated.parquet"
    mutated.write_bytes(data.draw(mutations(table.read_bytes())))
    try:
        read_rows(mutated)
    except UserError as error:
        assert str(mutated) in str(error)


def test_a_table_that_declares_more_than_fits_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"x": pa.array([0] * 100_000)}), path)  # 100,000 equal rows take a few bytes in the file
    monkeypatch.setattr("core.reading.MAX_TABLE_BYTES", 500_000)
    with pytest.raises(UserError, match="declares 100,000 rows"):
        read_table(path)
