"""What cells read: each held-out token is counted once, passes over the training text are told, and changed files are
read again."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import run as runner
from core.notices import say_once
from core.text.documents import split_of


def documents(n: int, seed: int = 0, n_words: int = 60, n_held_out: int | None = None) -> list[str]:
    """n documents of random words, of which exactly `n_held_out` are held out."""
    rng = random.Random(seed)
    every = (" ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(n_words)) for _ in range(10**6))
    if n_held_out is None:
        return [next(every) for _ in range(n)]
    sides: dict[str, list[str]] = {"heldout": [], "train": []}
    wanted = {"heldout": n_held_out, "train": n - n_held_out}
    while any(len(sides[side]) < wanted[side] for side in sides):
        text = next(every)
        if len(sides[split_of(text)]) < wanted[split_of(text)]:
            sides[split_of(text)].append(text)
    return [*sides["heldout"], *sides["train"]]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


Cells = list[dict[str, Any]]


@pytest.fixture
def cells(tmp_path: Path, on_tiny_model: list[str], monkeypatch, capsys) -> Callable[..., tuple[int, Cells, str]]:
    """Runs one cell of oneill_llm, or another experiment; gives the exit code, the records, and standard error."""

    def run(path: Any, *overrides: str, experiment: str = "oneill_llm") -> tuple[int, Cells, str]:
        say_once.cache_clear()
        places = [f"output_dir={tmp_path}/out", f"artifacts_dir={tmp_path}/artifacts", "logging=none"]
        settings = [*on_tiny_model, "stream.n_ctx=32", f"data.path={path}", *places, *overrides]
        monkeypatch.setattr(sys, "argv", ["run.py", f"experiment={experiment}", "scale=smoke", *settings])
        code = runner.main()
        files = sorted((tmp_path / "out").rglob("results.json"))
        return code, [json.loads(file.read_text()) for file in files], capsys.readouterr().err

    return run


ONE = ("hydra.mode=RUN", "stream.n_tokens=4096")


def test_sixty_documents_give_no_more_held_out_rows_than_they_have(cells, tmp_path: Path):
    texts = documents(60, n_held_out=3)
    code, [record], said = cells(write(tmp_path / "t.jsonl", texts), *ONE, "evaluation.n_rows=64")
    assert code == 0
    metrics = record["metrics"]
    n_rows = metrics["heldout_rows"]
    assert 0 < n_rows < 64 and metrics["heldout_tokens"] == metrics["n_tokens"] == 32 * n_rows
    assert f"evaluation.n_rows=64: local holds out 3 different documents, which have {n_rows:.0f} rows" in said
    twice = write(tmp_path / "twice.jsonl", texts * 3)  # copies add no held-out tokens
    code, records, said = cells(twice, *ONE, "evaluation.n_rows=64")
    assert code == 0 and {r["metrics"]["heldout_rows"] for r in records} == {n_rows}
    assert "6 copies of documents held out of local are left out" in said


def test_one_short_document_is_not_8192_tokens(cells, tmp_path: Path):
    """107 tokens were counted as 8,192."""
    texts = documents(40, n_words=14, n_held_out=1)
    path = write(tmp_path / "t.jsonl", texts)
    code, [record], _ = cells(path, *ONE, "evaluation.n_rows=256")
    assert code == 0 and record["metrics"]["n_tokens"] in (32, 64)
    code, _, said = cells(path, *ONE, "evaluation.n_rows=256", "stream.n_ctx=64", "evaluation.seed=1")
    assert code in (0, 1)
    if code:
        assert "the 1 different documents that local holds out have no whole row of 64 tokens" in said


def test_passes_over_the_training_text_are_in_the_manifest_the_results_and_a_line(cells, tmp_path: Path):
    path = write(tmp_path / "t.jsonl", documents(60, n_held_out=3))
    code, [record], said = cells(path, *ONE, "stream.n_tokens=32768")
    passes = record["metrics"]["text_passes"]
    assert code == 0 and passes > 2 and f"was read {passes:,.2f} times" in said
    [manifest] = (tmp_path / "artifacts/dictionary").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["training"]["read"] == {"text_passes": passes}
    shutil.rmtree(tmp_path / "out")  # the dictionary comes from the store, and still tells
    code, [record], said = cells(path, *ONE, "stream.n_tokens=32768")
    assert record["metrics"]["text_passes"] == passes
    _, records, said = cells(path, *ONE, "stream.n_tokens=512", "stream.buffer_tokens=512")
    assert sorted(r["metrics"]["text_passes"] for r in records)[0] == 1.0 and "was read" not in said


def test_the_cache_of_activations_tells_the_same_passes(cells, tmp_path: Path):
    path = write(tmp_path / "t.jsonl", documents(60, n_held_out=3))
    found = []
    for _ in range(2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "artifacts", ignore_errors=True)
        cache = ("cache=disk", f"cache.dir={tmp_path}/cache")
        _, [record], _ = cells(path, *ONE, "stream.n_tokens=32768", *cache)
        found.append(record["metrics"]["text_passes"])
    _, records, _ = cells(path, *ONE, "stream.n_tokens=32768", "force=true", "cache=none")
    assert len({*found, *(r["metrics"]["text_passes"] for r in records)}) == 1


def test_a_cell_is_run_again_when_its_text_has_changed_also_from_the_store(cells, tmp_path: Path):
    texts = documents(200)
    path = write(tmp_path / "t.jsonl", texts)
    _, [first], _ = cells(path, *ONE)
    assert first["inputs"][str(path)]
    _, [same], said = cells(path, *ONE)
    assert same == first and "already finished" in said
    write(path, documents(200, seed=1))
    _, [second], said = cells(path, *ONE)
    assert str(path) in said and "has changed" in said
    assert second["inputs"][str(path)] != first["inputs"][str(path)]
    assert second["metrics"]["fvu"] != first["metrics"]["fvu"]
    write(path, texts)
    _, [third], said = cells(path, *ONE)  # the dictionary of the first text is still in the store
    assert "already finished" not in said and third["metrics"]["fvu"] == first["metrics"]["fvu"]
    assert third["inputs"] == first["inputs"]


def test_a_file_that_is_added_to_a_folder_makes_its_cells_run_again(cells, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts/a.jsonl", documents(200))
    cells(tmp_path / "texts", *ONE)
    write(tmp_path / "texts/b.jsonl", documents(50, seed=1))
    _, [record], said = cells(tmp_path / "texts", *ONE)
    assert "already finished" not in said
    assert {Path(name).name for name in record["inputs"] if "jsonl" in name and name[0] == "/"} == {
        "a.jsonl", "b.jsonl",
    }  # fmt: skip


def test_every_cell_of_a_sweep_notes_and_counts_what_they_share(cells, tmp_path: Path):
    path = write(tmp_path / "t.jsonl", documents(200))
    code, records, _ = cells(path, *ONE[1:], "seed=0,1", "hydra.mode=MULTIRUN", "hydra.sweeper.blocks=null")
    assert code == 0 and len(records) > 1
    assert all(str(path) in record["inputs"] for record in records)
    assert len({record["metrics"]["heldout_tokens"] for record in records}) == 1


BROKEN = {
    "one .txt is one document": (
        "a.txt", "some words\n\nother words\n\nand more", [],
        "one document .*a.txt.*data.document_separator='\\\\n\\\\n'",
    ),
    "a separator that never occurs": (
        "a.txt", "some words\n\nother words\n\nand more", ["data.document_separator='###'"],
        "data.document_separator='###' does not occur",
    ),
    "blank documents only": ("a.jsonl", '{"text": " "}\n{"text": null}\n', [], "All 2 documents are blank"),
    "no documents": ("a.json", "[]", [], "The files have no documents"),
    "few documents": ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', [], "There are 2 documents in all"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "settings", "message"), BROKEN.values(), ids=BROKEN)
def test_too_little_text_says_why(cells, tmp_path: Path, name, content, settings, message):
    (tmp_path / name).write_text(content)
    code, records, said = cells(tmp_path / name, *ONE, *settings)
    assert code == 1 and not records and "shuffle buffer" not in said  # known before the training

    assert re.search(message, said), said


def test_lone_surrogates_are_counted_in_a_line_and_in_the_results(cells, tmp_path: Path):
    texts = documents(200)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "half \\ud83d {text}"}}\n' for text in texts))
    code, [record], said = cells(path, *ONE)
    assert code == 0 and record["metrics"]["text_replaced_characters"] > 50
    assert "lone surrogates, which are no characters, were replaced by U+FFFD for training" in said


def test_a_list_of_files_and_escapes_in_a_separator_come_from_the_command_line(cells, tmp_path: Path):
    texts = documents(300)
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:150]))
    (tmp_path / "b.txt").write_text("\n\n".join(texts[150:]))
    both = f"[{tmp_path}/a.txt,{tmp_path}/b.txt]"
    code, [record], _ = cells(both, *ONE, r'data.document_separator="\n\n"')
    assert code == 0 and record["metrics"]["text_passes"] == 1.0
    assert {f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"} <= set(record["inputs"])
