"""Text files of every kind, whole and damaged: they are read, or one message names the file and the place."""

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.reading import POINTER, parse_items
from core.text.local import LocalText, unescaped
from core.text.records import read_txt

TEXTS = ["plain words", "two\nlines", "é, emoji \U0001f600 and \u2028", "  spaces ", "x" * 3000]
FUZZ = settings(
    max_examples=330, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def packed_by_arrow(name: str) -> Callable[[bytes], bytes]:
    def pack(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, name) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return pack


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    ".zst": packed_by_arrow("zstd"),
    ".lz4": packed_by_arrow("lz4"),
}


def table_of(texts: list[str], **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), sink, **options)
    return sink.getvalue()


WHOLE: dict[str, bytes] = {
    ".jsonl": "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode(),
    ".json": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=1).encode(),
    ".txt": "\n---\n".join(TEXTS).encode(),
}
PARQUET = {
    "a.parquet": table_of(TEXTS, row_group_size=2),
    "b.parquet": table_of(TEXTS, compression="zstd", use_dictionary=False, write_page_checksum=True),
}
FILES = {f"a{ending}{packing}": pack(content) for ending, content in WHOLE.items() for packing, pack in PACKERS.items()}
FILES |= {"a.ndjson": WHOLE[".jsonl"], **PARQUET}


def put(folder: Path, name: str, content: bytes | str) -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def texts_of(path: Path) -> list[str]:
    """All documents of a file, in its order."""
    return [document.text for document in LocalText(path, document_separator="\n---\n")._documents(path)]


@pytest.mark.parametrize("name", FILES)
def test_every_format_in_every_packing_gives_the_same_documents(name: str, tmp_path: Path):
    assert texts_of(put(tmp_path, name.upper(), FILES[name])) == TEXTS


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst", ".lz4"])
def test_a_file_packed_in_several_parts_is_read_to_its_end(packing: str, tmp_path: Path):
    parts = [PACKERS[packing](f'{{"text": "part {i}"}}\n'.encode()) for i in range(3)]
    assert texts_of(put(tmp_path, f"a.jsonl{packing}", b"".join(parts))) == ["part 0", "part 1", "part 2"]


# ---- damage


@st.composite
def mutated(draw: st.DrawFn, whole: dict[str, bytes]) -> tuple[str, bytes]:
    """A file with a cut, a flip, an insertion, a repetition, or a mutation inside its packing."""
    name = draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[name])
    packing = next((p for p in PACKERS if p and name.endswith(p)), "")
    inside = bool(packing) and draw(st.booleans())
    if inside:
        content = bytearray(WHOLE[f".{name.split('.')[1]}"])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "repeat", "number", "deep"]))
        if kind == "cut":
            del content[at : at + draw(st.integers(1, 40))]
        elif kind == "flip" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=6) | st.sampled_from([b'"\\ud800"', b"\xff\xfe"]))
        elif kind == "repeat":
            content[at:at] = content[at : at + 30]
        elif kind == "number":
            content[at:at] = b"9" * draw(st.sampled_from([20, 400, 5000]))
        elif kind == "deep":
            content[at:at] = draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([3, 2000, 60_000]))
    return name, PACKERS[packing](bytes(content)) if inside else bytes(content)


@pytest.mark.parametrize("files", [FILES, PARQUET], ids=["all", "parquet"])
@FUZZ
@given(data=st.data())
def test_a_mutated_text_file_is_read_or_refused_by_name(files: dict[str, bytes], data: st.DataObject, tmp_path: Path):
    name, content = data.draw(mutated(files))
    path = put(tmp_path, name, content)
    started = time.monotonic()
    try:
        source = LocalText(path, document_separator="\n---\n")
        for split in ("train", "heldout"):
            for document in source.documents(split, 0):
                document.text.encode()  # whole characters only
    except UserError as error:
        assert name in str(error) and len(str(error)) < 2500
    assert time.monotonic() - started < 5


RECORDS = {
    "deep": '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"text": ' + '{"text": ' * 50_000 + "}" * 50_001,
    "a number of 5,000 digits": '{"text": "a", "n": ' + "9" * 5000 + "}",
    "a negative one": '{"text": "a", "n": -' + "9" * 5000 + "}",
    "a text that is a number": '{"text": 5}',
    "a list": '{"text": ["a"]}',
    "an object": '{"text": {"a": "b"}}',
    "true": '{"text": true}',
    "no object": '"text"',
    "null": "null",
    "no text": '{"body": "a"}',
    "many keys": json.dumps({f"key {i}": i for i in range(5000)}),
    "odd keys": json.dumps({"\x1b[2J\n": 1, "\ud800": 2, "k" * 500: 3}),
    "half an object": '{"text": "a"',
    "single quotes": "{'text': 'a'}",
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_that_is_none_is_named_by_its_file_and_line(record: str, tmp_path: Path):
    lines = put(tmp_path, "a.jsonl", f'{{"text": "fine"}}\n\n{record}\n')
    listed = put(tmp_path, "a.json", f'[{{"text": "fine"}},\n{record}]')
    for path, place in ((lines, "a.jsonl, line 3"), (listed, "a.json, (line 2|item 1)")):
        with pytest.raises(UserError, match=place) as error:
            texts_of(path)
        assert len(str(error.value)) < 2500 and all(c.isprintable() for c in str(error.value))


@pytest.mark.parametrize(
    ("text", "values"),
    [("[]", []), (" [ 1 , [2], {} ]\n", [1, [2], {}]), ("[null]", [None]), ('{"a": 1}', [{"a": 1}]), (" 5 ", [5])],
)
def test_the_items_of_a_list_come_one_by_one(text: str, values: list):
    assert list(parse_items(text, "x")) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1,\n2,]", "x, line 2, column 3: not JSON"),
        ("[1\n2]", "x, line 2, column 1: not JSON"),
        ("[1", "x, line 1, column 3: not JSON"),
        ("[", "x, line 1"),
        ("[1]\n2", r"x, line 2, column 1: not JSON \(Extra data\)"),
        ("", "x, line 1, column 1"),
        ("[1,\n" + "9" * 5000 + "]", "x, line 2: not JSON that can be read"),
        ("[1,\n" + "[" * 100_000, "x, line 2: not JSON that can be read"),
    ],
)
def test_a_list_that_is_none_is_named_by_its_line(text: str, message: str):
    with pytest.raises(UserError, match=message):
        list(parse_items(text, "x"))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text('[]{}1,:" a\n\\'))
def test_items_are_those_of_the_whole_list(text: str):
    try:
        whole = json.loads(text)
    except ValueError:
        with pytest.raises(UserError):
            list(parse_items(text, "x"))
    else:
        assert list(parse_items(text, "x")) == (whole if isinstance(whole, list) else [whole])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", POINTER + b"/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        ("a.txt", POINTER + b"/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        ("a.parquet", POINTER + b"/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        ("a.jsonl.gz", POINTER + b"/v1\n", "git lfs pull"),
        ("a.txt", gzip.compress(b"text"), "packed as .gz, .*Name it a.txt.gz"),
        ("a.jsonl", bz2.compress(b"text"), "packed as .bz2, .*Name it a.jsonl.bz2"),
        ("a.json", lzma.compress(b"text"), "packed as .xz"),
        ("a.txt", PACKERS[".zst"](b"text"), "packed as .zst"),
        ("a.txt.gz", PACKERS[".zst"](b"text"), "packed as .zst, .*Name it a.txt.zst"),
        ("a.txt", b"PK\x03\x04....", "packed as .zip, .*Unpack it"),
        ("a.parquet", gzip.compress(PARQUET["a.parquet"]), "packed as .gz, .*Unpack it"),
        ("a.txt", PARQUET["a.parquet"], "is Parquet, .*Name it a.parquet"),
        ("a.txt.gz", b"text that is not packed", "a.txt.gz cannot be read: Not a gzipped file"),
        ("a.txt.zst", b"text that is not packed", "a.txt.zst cannot be read"),
        ("a.txt.bz2", b"text that is not packed", "a.txt.bz2 cannot be read"),
        ("a.txt.xz", b"text that is not packed", "a.txt.xz cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 99)[:-12], "a.txt.gz cannot be read"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-12], "a.txt.xz cannot be read"),
        ("a.txt.bz2", bz2.compress(b"text" * 99)[:-5], "a.txt.bz2 cannot be read"),
        ("a.parquet", b"not parquet at all", "a.parquet cannot be read as Parquet"),
        ("a.parquet", PARQUET["a.parquet"][:-20], "a.parquet cannot be read as Parquet"),
        ("a.parquet", b"<html>Not found</html>", "a.parquet cannot be read as Parquet"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,  # gzip writes the time
)
def test_a_file_of_another_kind_than_its_name_says_or_cut_short_is_named(name, content, message, tmp_path: Path):
    with pytest.raises(UserError, match=message) as error:
        texts_of(put(tmp_path, name, content))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "is UTF-16, not UTF-8.*iconv -f utf-16 -t utf-8"),
        ("utf-16-le", "looks like UTF-16"),
        ("utf-16-be", "looks like UTF-16"),
        ("utf-32", "is UTF-32, not UTF-8.*iconv -f utf-32 -t utf-8"),
        ("utf-32-le", "looks like UTF-16"),
        ("latin-1", r"is not UTF-8: byte 1\d \(0xe9\).*iconv -f <its encoding>"),
        ("cp1252", "is not UTF-8"),
        ("mac_roman", "is not UTF-8"),
        ("cp437", "is not UTF-8"),
        ("shift_jis", "is not UTF-8"),
        ("euc_jp", "is not UTF-8"),
        ("gb18030", "is not UTF-8"),
        ("koi8_r", "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.xz"])
def test_text_in_another_encoding_is_refused_with_a_remedy(encoding, message, ending, tmp_path: Path):
    word = {"shift_jis": "日本語", "euc_jp": "日本語", "gb18030": "中文", "koi8_r": "слово"}.get(encoding, "café")
    content = f'{{"text": "{word} au lait"}}\n'
    packing = next((p for p in PACKERS if p and ending.endswith(p)), "")
    path = put(tmp_path, f"a{ending}", PACKERS[packing](content.encode(encoding)))
    with pytest.raises(UserError, match=message) as error:
        texts_of(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json"])
def test_utf8_with_a_mark_and_zeros_within_a_text_are_fine(ending: str, tmp_path: Path):
    text = "a zero \x00 within, é" if ending == ".txt" else '{"text": "a zero \\u0000 within, é"}'
    path = put(tmp_path, f"a{ending}", codecs.BOM_UTF8 + text.encode())
    assert texts_of(path) == ["a zero \x00 within, é"]


# ---- plain text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text("ab-\r\n\u00e9\U0001f600", max_size=60),
    separator=st.none() | st.text("ab-\n", min_size=1, max_size=4),
    chunk=st.integers(1, 9),
)
def test_a_text_read_in_pieces_is_split_as_a_whole_one(text, separator, chunk, tmp_path_factory):
    path = put(tmp_path_factory.getbasetemp(), "pieces.txt", text)
    whole = text.replace("\r\n", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.text.unpacking.CHUNK_BYTES", chunk)
        found = [document for _, document in read_txt(path, separator)]
    assert found == (whole.split(separator) if separator else [whole])


def test_a_byte_that_is_not_utf8_is_located_across_pieces(tmp_path: Path, monkeypatch):
    for chunk in (1, 2, 3, 5, 100):
        monkeypatch.setattr("core.text.unpacking.CHUNK_BYTES", chunk)
        with pytest.raises(UserError, match=r"byte 7 \(0xff\)"):
            texts_of(put(tmp_path, "a.txt", "éé\n\n.".encode() + b"\xff rest"))
        with pytest.raises(UserError, match=r"byte 2 \(0xf0\)"):
            texts_of(put(tmp_path, "b.txt", b"ab\xf0\x9f"))  # half a character at the end


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("\\n\\n", "\n\n"), ("\\n---\\n", "\n---\n"), ("\n\n", "\n\n"), ("\\t", "\t"), ("\\r\\n", "\n"),
        ("a\\\\nb", "a\\nb"), ("###", "###"), ("\\x", "\\x"), ("\\\\", "\\"), ("<|endoftext|>", "<|endoftext|>"),
    ],
)  # fmt: skip
def test_escapes_in_a_separator_are_read(written: str, meant: str, tmp_path: Path):
    assert unescaped(written) == meant
    path = put(tmp_path, "a.txt", meant.join(["one", "two", "three"]))
    source = LocalText(path, document_separator=written)
    assert [document.text for document in source._documents(path)] == ["one", "two", "three"]
    assert source.spec == LocalText(path, document_separator=meant.replace("\\", "\\\\")).spec


# ---- memory and time


def read_all(path: Path) -> None:
    """Read a file, or refuse it by name."""
    try:
        for _ in LocalText(path, document_separator="\n---\n")._documents(path):
            pass
    except UserError as error:
        assert path.name in str(error)


def peak_of(path: Path) -> int:
    """Bytes of memory at most to read a file, or to refuse it."""
    tracemalloc.start()
    try:
        read_all(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


MB = 2**20
LARGE: dict[str, bytes] = {
    "one_line.jsonl": b'{"text": "' + b"word " * (MB // 2) + "\U0001f600".encode() + b'"}',
    "many_lines.jsonl": b'{"text": "a few words in a line"}\n' * 20_000,
    "small_items.json": b"[" + b'{"text":""},' * 60_000 + b'{"text":"a"}]',
    "one_item.json": b'[{"text": "' + b"word " * (MB // 2) + "\U0001f600".encode() + b'"}]',
    "one_document.txt": b"word " * (MB // 2) + "\U0001f600".encode(),
    "many_documents.txt": b"some words\n---\n" * 60_000,
    "windows.txt": b"some words\r\n" * 60_000,
    "broken.json": b"[" + b'{"text":""},' * 60_000,
    "no_json.jsonl": b"x" * (3 * MB),
    "table.parquet": table_of([f"text {i} " + "abcdefgh"[i % 8 :] * 40 for i in range(5_000)], compression="none"),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_reader_needs_less_than_ten_times_the_size_of_the_file_and_five_seconds(name: str, tmp_path: Path):
    path = put(tmp_path, name, LARGE[name])
    started = time.monotonic()
    read_all(path)
    assert time.monotonic() - started < 5
    assert peak_of(path) < 10 * len(LARGE[name])


@pytest.mark.parametrize("packing", [packing for packing in PACKERS if packing])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json"])
def test_a_small_file_that_unpacks_to_a_huge_document_is_refused(packing, ending, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("core.text.unpacking.LEAST_LIMIT", MB)
    before, after = {".txt": (b"", b""), ".jsonl": (b'{"text": "', b'"}'), ".json": (b'[{"text": "', b'"}]')}[ending]
    path = put(tmp_path, f"a{ending}{packing}", PACKERS[packing](before + b"a" * (24 * MB) + after))
    assert path.stat().st_size < MB
    with pytest.raises(UserError, match="Unpack the file if that is right"):
        texts_of(path)
    assert peak_of(path) < 16 * MB  # the library for .xz takes 8


def test_a_table_that_repeats_a_long_text_is_read_row_by_row(tmp_path: Path):
    path = put(tmp_path, "a.parquet", table_of(["long " * 40_000] * 500))
    assert path.stat().st_size < MB  # the text stands there once
    assert peak_of(path) < 10 * MB
    documents = LocalText(path)._documents(path)
    assert [len(document.text) for document in itertools.islice(documents, 3)] == [200_000] * 3


def test_a_block_of_long_documents_ends_before_the_memory_does(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("core.text.documents.MAX_BLOCK_CHARS", 2000)
    path = put(tmp_path, "a.jsonl", "".join(f'{{"text": "{i} {"x" * 500}"}}\n' for i in range(100)))
    source = LocalText(path, shuffle_buffer=50)
    documents = [d.text for split in ("train", "heldout") for d in source.documents(split, 0)]
    assert len(documents) == len(set(documents)) == 100
    state = (stream := source.documents("train", 0)) and [next(stream) for _ in range(30)] and stream.state_dict()
    rest = [d.text for d in source.documents("train", 0, state)]
    assert documents[30 : 30 + len(rest)] == rest


def test_a_file_that_declares_more_than_it_can_hold_is_refused_unread(tmp_path: Path, monkeypatch):
    path = put(tmp_path, "a.parquet", table_of(["a"] * 50_000))
    monkeypatch.setattr("core.text.records.ROWS_PER_BYTE", 0.01)
    with pytest.raises(UserError, match=r"a\.parquet declares 50,000 rows"):
        texts_of(path)
    monkeypatch.undo()
    for name in ("LEAST_UNPACKED", "UNPACKED_PER_BYTE"):
        monkeypatch.setattr(f"core.text.records.{name}", 0.1)
    with pytest.raises(UserError, match=r"a\.parquet, row group 0 declares [\d,]+ bytes"):
        texts_of(path)


def test_a_damaged_page_of_a_table_names_the_file_and_the_row_group(tmp_path: Path):
    content = bytearray(table_of([f"text number {i} {'abc' * 50}" for i in range(4000)], row_group_size=1000))
    place = len(content) * 5 // 8  # in the third of four row groups
    content[place : place + 400] = b"\xff" * 400
    path = put(tmp_path, "a.parquet", bytes(content))
    with pytest.raises(UserError, match=r"a\.parquet, row group 2 cannot be read as Parquet: .*Is the file damaged"):
        texts_of(path)
