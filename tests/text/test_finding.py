"""The files that data.path names, and what is said of those that it passes over."""

import os
from pathlib import Path
from typing import Any

import pytest

from core import inputs
from core.errors import UserError
from core.text.finding import find_files, format_of
from core.text.local import LocalText


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")


def found(path: Any, folder: Path) -> list[str]:
    """The names found, relative to a folder."""
    return [str(file.relative_to(folder)) for file in find_files(path).files]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"), ("a.TXT", ".txt"), ("a.Jsonl", ".jsonl"), ("a.ndjson", ".ndjson"), ("a.JSON", ".json"),
        ("a.parquet", ".parquet"), ("a.PARQUET", ".parquet"), ("a.b.jsonl", ".jsonl"), ("a.jsonl.gz", ".jsonl"),
        ("a.JSONL.GZ", ".jsonl"), ("a.x.txt.zst", ".txt"), ("a.ndjson.xz", ".ndjson"), ("a.json.bz2", ".json"),
        ("a.txt.lzma", ".txt"), ("a.txt.lz4", ".txt"), ("a.parquet.gz", None), ("a.gz", None), ("a.csv", None),
        ("a.csv.gz", None), ("a.tar.gz", None), ("a.txt.zip", None), ("a", None), ("txt", None), ("a.txt.", None),
        ("a.jsonl.gz.gz", None), (".txt", None),
    ],
)  # fmt: skip
def test_the_ending_decides_the_format_in_any_case_and_before_a_compression(name: str, kind: str | None):
    assert format_of(Path(name)) == kind


def test_a_folder_gives_all_texts_below_it_and_says_what_it_passes_over(tmp_path: Path, capsys):
    read = ["C.JSONL", "a.jsonl", "b.jsonl.gz", "x/d.ndjson", "x/y/e.txt"]
    put(tmp_path, *read, "m.md", "x/n.md", "t.csv.gz", "LICENSE", ".hidden.txt", ".git/f.txt", "x/.DS_Store")
    assert found(str(tmp_path), tmp_path) == sorted(read)
    line = find_files(str(tmp_path)).line()
    assert line == (
        "data.path: 5 files are read, and passed over are: 1 .csv.gz, 2 .md, 1 hidden files, 1 hidden folders, "
        "1 without an ending."
    )
    LocalText(tmp_path / "x")
    LocalText(tmp_path / "x")
    assert capsys.readouterr().err == "data.path: 2 files are read, and passed over are: 1 .md.\n"
    put(tmp_path / "clean", "a.txt")
    assert find_files(tmp_path / "clean").line() == ""


def test_linked_folders_are_searched_once_and_circles_end(tmp_path: Path):
    put(tmp_path, "real/a.txt", "real/deep/b.txt", "elsewhere/c.txt", "elsewhere/d.txt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one").symlink_to(tmp_path / "real")
    (tmp_path / "data/two").symlink_to(tmp_path / "real")  # the same again
    (tmp_path / "data/up").symlink_to(tmp_path / "data")  # a circle
    (tmp_path / "real/deep/back").symlink_to(tmp_path / "data")  # a circle through another folder
    (tmp_path / "data/c.txt").symlink_to(tmp_path / "elsewhere/c.txt")
    (tmp_path / "data/c2.txt").symlink_to(tmp_path / "elsewhere/c.txt")
    (tmp_path / "data/nowhere.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data/self.txt").symlink_to(tmp_path / "data/self.txt")
    every = find_files(tmp_path / "data")
    assert [str(file.relative_to(tmp_path / "data")) for file in every.files] == [
        "c.txt", "one/a.txt", "one/deep/b.txt",
    ]  # fmt: skip
    assert every.listed() == "1 further names of files that are read, 2 links that lead nowhere, or no files"
    assert found(f"{tmp_path}/data/**/*.txt", tmp_path / "data") == ["c.txt", "one/a.txt", "one/deep/b.txt"]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "x/b.txt", "x/y/c.txt"]),
        ("x/**/*.txt", ["x/b.txt", "x/y/c.txt"]),
        ("x/**", ["x/b.txt", "x/d.jsonl", "x/y/c.txt"]),
        ("*/*.jsonl", ["x/d.jsonl"]),
        ("x*", ["x/b.txt", "x/d.jsonl", "x/y/c.txt"]),  # the folder that it matches
        ("**/y/*", ["x/y/c.txt"]),
        ("[ab].txt", ["a.txt"]),
        ("?/?.txt", ["x/b.txt"]),
        (["a.txt", "x/y"], ["a.txt", "x/y/c.txt"]),
        (["x", "x/b.txt", "*.txt"], ["a.txt", "x/b.txt", "x/d.jsonl", "x/y/c.txt"]),
    ],
)
def test_patterns_and_lists(path: Any, names: list[str], tmp_path: Path, monkeypatch):
    put(tmp_path, "a.txt", "x/b.txt", "x/y/c.txt", "x/d.jsonl", "x/ignored.csv")
    absolute = [f"{tmp_path}/{one}" for one in path] if isinstance(path, list) else f"{tmp_path}/{path}"
    assert found(absolute, tmp_path) == names
    monkeypatch.chdir(tmp_path)
    assert [str(file) for file in find_files(path).files] == names


def test_a_name_with_the_signs_of_a_pattern_is_a_file_if_there_is_one(tmp_path: Path):
    put(tmp_path, "a[1].txt", "a1.txt", "what?.txt")
    assert found(f"{tmp_path}/a[1].txt", tmp_path) == ["a[1].txt"]
    assert found(f"{tmp_path}/what?.txt", tmp_path) == ["what?.txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "data.path: None is no path"),
        (5, "data.path: 5 is no path"),
        (True, "data.path: True is no path"),
        ({"a": 1}, "is no path"),
        ("", "data.path: '' is no path"),
        ("  ", "is no path"),
        ([], "data.path is an empty list"),
        (["a.txt", 3], "data.path: 3 is no path"),
        (["a.txt", "gone.txt"], "there is no file gone.txt"),
        ("a.jsonl,b.jsonl", r"Several are written as a list: data.path=\[a.jsonl,b.jsonl\]"),
        ("a" * 5000, "cannot be looked up"),
        ("a\0b", "data.path"),
        ("~nobody_of_this_name/x.txt", "data.path"),
        ("x/**y/*.txt", r"\*\* must stand alone"),
        ("**.txt", r"\*\* must stand alone"),
        ("only", r"the folder only has no file that ends in .*There are: 2 .csv"),
        ("only/*", r"only/\* has no file that ends in .*There are: 2 .csv"),
        ("only/x.csv", r"x.csv ends in .csv, not in .txt"),
        ("none/*", r"there is no file none/\*"),
        ("a.parquet.gz", "ends in .parquet.gz, not in"),
    ],
)
def test_a_path_that_names_nothing_to_read_is_refused(path: Any, message: str, tmp_path: Path, monkeypatch):
    put(tmp_path, "a.txt", "only/x.csv", "only/y.csv", "a.parquet.gz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        find_files(path)
    assert len(str(error.value)) < 700


def test_a_folder_that_cannot_be_opened_is_said(tmp_path: Path, monkeypatch):
    put(tmp_path, "a.txt", "closed/b.txt")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert find_files(tmp_path).line().endswith("1 folders that cannot be opened.")


def test_results_depend_on_every_file_and_on_which_files_there_are(tmp_path: Path):
    put(tmp_path, "t/a.txt", "t/b.txt", "t/c.md")
    with inputs.noting() as noted:
        assert LocalText(tmp_path / "t").spec
    assert {Path(name).name for name in noted if not name.startswith("files:")} == {"a.txt", "b.txt"}
    assert inputs.changed(noted) == ([], [])
    put(tmp_path, "t/d.md")  # not read
    assert inputs.changed(noted) == ([], [])
    put(tmp_path, "t/e.txt")
    assert [name.partition(":")[0] for name in inputs.changed(noted)[0]] == ["files"]
    (tmp_path / "t/e.txt").unlink()
    (tmp_path / "t/a.txt").write_text("other text")
    assert inputs.changed(noted) == ([str(tmp_path / "t/a.txt")], [])
