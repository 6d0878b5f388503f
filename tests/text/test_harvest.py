from pathlib import Path

import pytest

from core.text.bundled import BundledText
from core.text.harvest import TAGS, _near_duplicate, harvest, locked_names, split_python

MODULE = '''"""About this module."""

import os


class Pair:
    """Two things."""

    def swap(self, times):
        """Swap them."""
        return os.cpu_count()


def lonely():
    """Only a docstring."""
'''


def test_a_modules_docstrings_and_code_become_two_documents_that_share_no_text():
    (tag, docs), (other, code) = split_python(MODULE, "pairs")
    assert (tag, other) == ("docstring", "code")
    assert docs.split("\n\n") == [
        "module pairs\nAbout this module.",
        "class pairs.Pair\nTwo things.",
        "def pairs.Pair.swap(self, times)\nSwap them.",
        "def pairs.lonely()\nOnly a docstring.",
    ]
    assert "Two things" not in code and "Swap them" not in code and "return os.cpu_count()" in code
    compile(code, "pairs", "exec")  # a docstring stays if it is the whole body


def test_a_file_that_is_not_python_gives_no_document():
    assert split_python("def broken(:", "x") == []


def test_a_text_is_a_near_duplicate_if_most_of_its_long_lines_were_seen():
    seen: set[int] = set()
    licence = "\n".join(f"Permission number {i} is hereby granted to any person." for i in range(10))
    assert not _near_duplicate("Copyright (c) 2020 the first author of them all\n" + licence, seen)
    assert _near_duplicate("Copyright (c) 2021 somebody else whose name is long\n" + licence, seen)
    assert not _near_duplicate("\n".join(f"A wholly different line with the number {i}" for i in range(9)), seen)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> BundledText:
    return BundledText(0.02, artifacts_dir=tmp_path_factory.mktemp("artifacts"))


def test_the_corpus_has_all_four_kinds_and_no_document_twice(corpus):
    documents = [*corpus.documents("train", 0), *corpus.documents("heldout", 0)]
    assert {document.tag for document in documents} == set(TAGS)
    assert len({document.text for document in documents}) == len(documents)


def test_train_and_heldout_share_no_document_and_no_file(corpus):
    import pyarrow.parquet as pq

    table = pq.read_table(corpus.folder() / "documents.parquet").to_pandas()
    sides = table.groupby("source")["split"].nunique()
    assert (sides == 1).all()
    assert set(table["split"]) == {"train", "heldout"}


def test_the_order_of_documents_depends_only_on_the_seed(corpus):
    texts = [[d.text for d in corpus.documents("train", seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert sorted(texts[0]) == sorted(texts[2])


def test_a_second_harvest_is_read_from_the_cache(corpus, monkeypatch):
    folder = corpus.folder()
    monkeypatch.setattr("core.text.bundled.harvest", lambda mb: pytest.fail("harvested again"))
    assert BundledText(0.02, artifacts_dir=corpus.store.root).folder() == folder


def test_harvesting_twice_gives_the_same_documents():
    assert harvest(0.002) == harvest(0.002)


def test_a_budget_that_is_not_positive_is_an_error_that_names_the_setting(tmp_path):
    with pytest.raises(ValueError, match=r"data\.mb_per_package"):
        BundledText(0, artifacts_dir=tmp_path)


def test_a_missing_lock_file_is_named_in_the_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"requirements\.lock.*data=local"):
        locked_names(tmp_path / "requirements.lock")
