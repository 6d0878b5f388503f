"""data=local: what is read, in which order, and the errors for bad input."""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.errors import UserError
from core.text.bundled import BundledText
from core.text.documents import TextSource, split_of
from core.text.local import LocalText


def numbered(n: int) -> list[str]:
    return [f"This is document {i}, about nothing in particular." for i in range(n)]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(source: TextSource, split: str = "train", seed: int = 0) -> list[str]:
    return [document.text for document in source.documents(split, seed)]


def both(source: TextSource) -> Counter:
    return Counter(texts(source) + texts(source, "heldout"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "d.jsonl", [{"text": text, "kind": i % 3} for i, text in enumerate(numbered(300))])


def test_every_format_gives_the_same_documents(tmp_path, jsonl):
    wanted = numbered(300)
    (tmp_path / "d.json").write_text(json.dumps([{"text": text} for text in wanted]))
    pq.write_table(pa.table({"id": range(300), "text": wanted}), tmp_path / "d.parquet", row_group_size=70)
    (tmp_path / "d.txt").write_text("\n---\n".join(wanted))
    for ending in ("jsonl", "json", "parquet", "txt"):
        source = LocalText(tmp_path / f"d.{ending}", document_separator="\n---\n")
        assert both(source) == Counter(wanted), ending


def test_a_text_file_is_one_document_without_a_separator(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9")
    assert both(LocalText(tmp_path / "a.txt")) == Counter(["one\ntwo é"])


def test_a_folder_is_searched_recursively_and_a_glob_takes_what_it_matches(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/ignored.csv", ".hidden/d.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    assert both(LocalText(tmp_path)) == Counter(["text of a.txt", "text of x/b.txt", "text of x/y/c.txt"])
    assert both(LocalText(f"{tmp_path}/x/*.txt")) == Counter(["text of x/b.txt"])
    assert both(LocalText(f"{tmp_path}/x/**/*.txt")) == Counter(["text of x/b.txt", "text of x/y/c.txt"])


def test_the_splits_are_disjoint_by_content_and_follow_split_of(jsonl):
    source = LocalText(jsonl)
    train, heldout = texts(source), texts(source, "heldout")
    assert not set(train) & set(heldout)
    assert heldout and all(split_of(text) == "heldout" for text in heldout)
    assert len(train) + len(heldout) == 300


def test_the_bundled_corpus_has_disjoint_splits_and_continues_from_a_saved_position(tmp_path):
    source = BundledText(mb_per_package=0.02, artifacts_dir=tmp_path)
    train, heldout = texts(source), texts(source, "heldout")
    assert train and heldout and not set(train) & set(heldout)
    stream = source.documents("train", 0)
    head = [next(stream).text for _ in range(7)]
    assert head + [document.text for document in source.documents("train", 0, stream.state_dict())] == train


def test_the_order_depends_only_on_the_seed(jsonl):
    source = LocalText(jsonl, shuffle_buffer=64)
    assert texts(source, seed=1) == texts(LocalText(jsonl, shuffle_buffer=64), seed=1)
    assert texts(source, seed=1) != texts(source, seed=2)
    assert sorted(texts(source, seed=1)) == sorted(texts(source, seed=2))


@pytest.mark.parametrize("n_before", [0, 1, 63, 64, 200, 285])
def test_reading_continues_after_any_document(jsonl, n_before):
    source = LocalText(jsonl, shuffle_buffer=64)
    stream = source.documents("train", 3)
    head = [next(stream).text for _ in range(min(n_before, len(texts(source))))]
    rest = [
        document.text for document in LocalText(jsonl, shuffle_buffer=64).documents("train", 3, stream.state_dict())
    ]
    assert head + rest == texts(source, seed=3)


def test_tags_and_nested_fields_are_read(tmp_path):
    records = [{"meta": {"body": f"text {i}", "set": "Pile-CC"}} for i in range(40)] + [{"meta": None}]
    write_jsonl(tmp_path / "d.jsonl", records)
    source = LocalText(tmp_path / "d.jsonl", text_field="meta.body", tag_field="meta.set")
    assert {document.tag for document in source.documents("train", 0)} == {"Pile-CC"}
    table = pa.table({"meta": pa.array([record["meta"] for record in records]), "other": [0] * 41})
    pq.write_table(table, tmp_path / "d.parquet")
    assert both(LocalText(tmp_path / "d.parquet", "meta.body")) == both(source)


def test_null_and_blank_texts_are_skipped_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in ("a real text", None, "", "  \n", "another text")])
    source = LocalText(path)
    assert both(source) == Counter(["a real text", "another text"])
    assert source.n_skipped == {str(path): 3}


def test_the_spec_is_plain_data_that_changes_with_the_content_and_not_with_the_name(tmp_path, jsonl):
    spec = LocalText(jsonl).spec
    assert json.loads(json.dumps(spec)) == spec
    assert LocalText(jsonl.rename(tmp_path / "renamed.jsonl")).spec == spec
    assert LocalText(write_jsonl(tmp_path / "other.jsonl", [{"text": "x"}])).spec != spec
    assert isinstance(LocalText(tmp_path / "other.jsonl"), TextSource)


def fails(message: str, path: Path | str, **settings: str) -> None:
    with pytest.raises(UserError, match=message):
        both(LocalText(path, **settings))


def test_a_wrong_path_is_reported_at_once(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "page.pdf").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "none.txt": "data.path: there is no file .*none.txt.*data=bundled",
        "empty.txt": "data.path: .*empty.txt is empty",
        "page.pdf": r"data.path: .*page.pdf ends in .pdf, not in .txt, .jsonl, .ndjson, .json, .parquet",
        "folder": "data.path: the folder .* has no file that ends in .txt",
        "*.nothing": "data.path: there is no file",
    }.items():
        with pytest.raises(UserError, match=message):
            LocalText(tmp_path / name)


def test_the_error_for_a_missing_column_names_the_setting_and_lists_the_columns(tmp_path, jsonl):
    fails(r"data.text_field: .*d.jsonl, line 1 has no field 'body'; .*: text, kind\.", jsonl, text_field="body")
    fails(r"data.tag_field: .*line 1 has no field 'lang'; .*: text, kind\.", jsonl, tag_field="lang")
    pq.write_table(pa.table({"id": [1], "content": ["x"], "meta": [{"a": "b"}]}), tmp_path / "d.parquet")
    fails(r"data.text_field: .*d.parquet has no field 'text'; .*: id, content, meta\.", tmp_path / "d.parquet")
    fails(r"has no field 'meta.x'; .*: a\.", tmp_path / "d.parquet", text_field="content", tag_field="meta.x")
    fails("data.text_field: 'id' of .*d.parquet, row 1 is int, not text", tmp_path / "d.parquet", text_field="id")


def test_bytes_that_are_not_utf8_are_located(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    fails(r"a.txt is not UTF-8: byte 3 \(0xe9\)", tmp_path / "a.txt")
    first = b'{"text": "fine"}\n'
    (tmp_path / "b.jsonl").write_bytes(first + b'{"text": "\xff"}\n')
    fails(re.escape(f"b.jsonl is not UTF-8: byte {len(first) + 10} (0xff)"), tmp_path / "b.jsonl")


def test_content_that_is_not_json_or_parquet_is_located(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": nope}\n')
    fails("a.jsonl, line 3, column 10: not JSON", tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text('[{"text": "fine"},\n {"text": }]')
    fails("b.json, line 2, column 11: not JSON", tmp_path / "b.json")
    (tmp_path / "c.jsonl").write_text('["a list"]\n')
    fails("c.jsonl, line 1 is a list, not a JSON object", tmp_path / "c.jsonl")
    (tmp_path / "d.parquet").write_text("not parquet at all")
    fails("data.path: .*d.parquet cannot be read as Parquet", tmp_path / "d.parquet")
