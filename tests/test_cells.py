"""Cells whose settings differ have folders of different names, and every name is one that any file system takes."""

import re
import unicodedata
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.cells import MAX_NAME_BYTES, cell_name, results_folder
from core.errors import UserError


def test_a_name_omits_keys_that_are_in_the_path_or_change_no_number():
    overrides = [
        "experiment=leask_batchtopk", "logging.logger=none", "method=topk", "method.k=8", "output_dir=/tmp/x",
        "scale=smoke", "seed=1", "trainer.cell_processes=2", "trainer.devices=2", "trainer.processes=2",
    ]  # fmt: skip
    assert cell_name(overrides) == "method.k=8,method=topk,seed=1,trainer.devices=2"


def test_a_cell_without_named_settings_is_called_base():
    assert cell_name([]) == "base"
    assert cell_name(["experiment=a", "force=true"]) == "base"


def test_a_value_that_is_a_list_stays_with_its_key():
    assert cell_name(["method.betas=[0.9,0.99]", "seed=1"]) == "method.betas=[0.9,0.99],seed=1"


def test_a_space_in_a_coders_name_which_hydra_writes_with_a_backslash_becomes_an_underscore():
    assert cell_name([r"coder.name=TopK\ SAE", "coder=sae"]) == "coder.name=TopK_SAE,coder=sae"
    assert re.fullmatch("coder.name=TopK_SAE_[0-9a-f]{12}", cell_name(["coder.name=TopK_SAE"]))


@pytest.mark.parametrize(
    ("override", "begins_with"),
    [
        ("data.path=/home/me/some texts/my_texts.jsonl", "data.path=my_texts.jsonl_"),
        ("model.source=EleutherAI/pythia-70m", "model.source=pythia-70m_"),
        ("model.source=models/mine/", "model.source=mine_"),
        ("method.repo='a lab/an SAE'", "method.repo=an_SAE_"),
        ("data.path=[a/b.jsonl,c/d.jsonl]", "data.path=d.jsonl_"),
        ('data.document_separator="\n\n"', "data.document_separator=_"),
        ("~data.tag_field", "_data.tag_field_"),
    ],
)
def test_a_value_that_a_folder_cannot_be_called_after_has_a_readable_name_and_a_hash(override: str, begins_with: str):
    name = cell_name([override])
    assert name.startswith(begins_with) and re.fullmatch("[0-9a-f]{12}", name.removeprefix(begins_with))


ALIKE = [
    ["data.path=a/b"], ["data.path=a_b"], ["data.path=b"], ["data.path=c/b"], ["data.path=a//b"], ["data.path=a/b/"],
    ["data.path='a b'"], ["data.path='a_b'"], [r"data.path=a\ b"], ["data.path=a\tb"], ["data.path=a\nb"],
    ["data.path=a\x7fb"], ["data.path=A_b"], ["data.path=.a_b"], ["data.path=-a_b"], ["data.path=..a_b"],
    [f"data.path={unicodedata.normalize('NFC', 'é')}"], [f"data.path={unicodedata.normalize('NFD', 'é')}"],
    ["data.path=Å"], ["data.path=\u212b"], ["data.path=ﬁ"], ["data.path=fi"], ["data.path=\udc80"],
    ["data.path=\udc81"],
    ["data.path="], ["data.path=''"], ["data.path=null"], ["data.path=base"], ["base"], ["~data.path"],
    ["+data.path=b"],
    ["data.path='x,seed=1'"], ["data.path=x", "seed=1"], ["data.path='x", "seed=1'"], ["data.path=[x,seed=1]"],
    ["data.path=[x", "seed=1]"], ["data.path='x,output_dir=y'"], ["data.path='x,output_dir=z'"],
    ["a=1", "a=2"], ["a=2", "a=1"], ["a=2"], ["a={b:1}", "a.b=2"], ["a.b=2", "a={b:1}"], ["a=null", "a.b=2"],
    ["a.b=2", "a=null"], ["a=1,b"], ["a=1", "b"], ["a=1", "~b"], ["a=" + "x" * 400], ["a=" + "x" * 401],
    ["a=" + "x" * 400 + "/"], ["a=" + "x/" * 400], ["a=" + "x" * 170, "b=/"], ["a=" + "x" * 170, "b=//"],
    [r"coder.name=A\ B"], ["coder.name=A_B"], ["coder.name='A B'"], [r"coder.name=A\ \ B"], ["coder.name=A/B"],
]  # fmt: skip


def test_a_name_copied_from_another_cell_is_not_that_cells_name():
    names = [cell_name(overrides) for overrides in ALIKE]
    copied = [cell_name([f"data.path={name.partition('=')[2]}"]) for name in names if name.startswith("data.path=")]
    hashed = {name for name in names if re.search("_[0-9a-f]{12}$", name)}
    assert len(hashed) > 20 and not hashed & set(copied)


def is_safe(name: str) -> bool:
    return len(name.encode()) <= 255 and re.fullmatch(r"[A-Za-z0-9_+=][A-Za-z0-9_.+@=,\[\]-]*", name) is not None


def test_override_sets_that_look_alike_have_different_names_that_any_file_system_takes():
    for one, other in combinations(ALIKE, 2):
        assert cell_name(one) != cell_name(other), (one, other)
    assert all(is_safe(cell_name(overrides)) for overrides in ALIKE)


KEYS = st.sampled_from(["data.path", "model.source", "a", "a.b", "coder.name", "method", "method.k", "+a", "~a"])
TEXTS = st.one_of(
    st.text(max_size=8), st.text("ab_/\\ ,='\"[]{}.-~\n\t\x7f", max_size=6), st.text("xX", min_size=150, max_size=300)
)
LINES = st.one_of(st.tuples(KEYS, TEXTS).map("=".join), TEXTS)
SETS = st.lists(LINES, max_size=4)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(SETS, SETS)
def test_two_different_override_sets_never_share_a_name(one: list[str], other: list[str]):
    def named(overrides: list[str]) -> list[str]:
        return [o for o in overrides if not re.match(r"[+~]*(force|cache|logging|scale|experiment)\b", o)]

    assert is_safe(cell_name(one)) and is_safe(cell_name(other))
    assert (sorted(named(one)) == sorted(named(other))) or cell_name(one) != cell_name(other)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.data(), SETS.filter(bool))
def test_a_set_in_which_one_character_is_another_never_shares_its_name(data: st.DataObject, overrides: list[str]):
    index = data.draw(st.integers(0, len(overrides) - 1))
    text = overrides[index] or "a"
    place = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.sampled_from([text[place].swapcase(), "_", "/", " ", "\n", "é", "e\u0301", ".", ""]))
    changed = [*overrides[:index], text[:place] + new + text[place + 1 :], *overrides[index + 1 :]]
    assert sorted(changed) == sorted(overrides) or cell_name(changed) != cell_name(overrides)


def test_long_names_are_cut_and_stay_distinct():
    a, b = (cell_name([f"a={'x' * 300}{end}"]) for end in "ab")
    assert a != b
    assert len(a.encode()) < MAX_NAME_BYTES + 20


def test_names_of_kept_cells_are_plain():
    """So that results made before names had hashes stay where they are."""
    kept = Path(__file__).parents[1] / "reports/results"
    names = [path.parent.name for path in kept.rglob("results.json")]
    assert len(names) > 200 and not [name for name in names if re.search("_[0-9a-f]{12}", name) or not is_safe(name)]


@pytest.mark.parametrize("key", ["output_dir", "artifacts_dir"])
@pytest.mark.parametrize("value", ["", " ", None, 3, "a\0b", "{file}", "{file}/below"])
def test_a_folder_that_cannot_be_is_refused_with_its_setting(tmp_path: Path, key: str, value: object):
    (tmp_path / "file").touch()
    value = value.format(file=tmp_path / "file") if isinstance(value, str) else value
    places = {"output_dir": str(tmp_path), "artifacts_dir": str(tmp_path), key: value}
    with pytest.raises(UserError, match=f"^{key}="):
        results_folder(**places, name="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "..", "a/b", "../a", "a\nb", "/", "-a", "a b"])
def test_an_experiments_name_that_is_no_folders_name_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"^name="):
        results_folder(str(tmp_path), str(tmp_path / "new"), name)
    assert results_folder(str(tmp_path), str(tmp_path), "leask_batchtopk") == f"{tmp_path}/leask_batchtopk"
