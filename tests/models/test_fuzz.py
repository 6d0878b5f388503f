"""Whatever stands in the files of a model, it is refused in one message or read whole: never another error."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from core.errors import UserError
from core.models.identity import model_identity
from core.models.language_model import load_language_model
from tests.models.test_loading import settings, shards

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]
SHARD = "model-00001-of-00002.safetensors"
VALUES = [None, True, -1, 0, 1.5, 10**30, "", "abc", [], [1], {}, {"a": 1}, "\ud800", 1e400]
# Without deadline and example database: the machine may be busy, and the inputs are the same each time.
FUZZ = bounded(
    max_examples=320,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def whole(tiny_lm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in two shards with an index."""
    folder = Path(shutil.copytree(tiny_lm_folder, tmp_path_factory.mktemp("fuzz") / "whole"))
    shards(folder, leave_out=False)
    return folder


def paths_in(content: Any, depth: int = 3) -> list[tuple[Any, ...]]:
    """The places of all values in a JSON value, some levels deep."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found: list[tuple[Any, ...]] = []
    for key, value in list(items)[:40]:
        found.append((key,))
        if depth > 1:
            found += [(key, *rest) for rest in paths_in(value, depth - 1)[:20]]
    return found


def with_value(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(content))
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def check(whole: Path, name: str, content: bytes) -> None:
    folder = Path(shutil.copytree(whole, whole.with_name("mutated"), dirs_exist_ok=True))
    (folder / name).write_bytes(content)
    cfg = settings(folder, d_model=None, n_layers=None)
    try:
        lm = load_language_model(cfg)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return
    assert model_identity(cfg) and lm.logits(torch.zeros(1, 2, dtype=torch.long)).shape[:2] == (1, 2)
    assert lm.tokenizer.decode(lm.tokenizer("the lazy dog", add_special_tokens=False)["input_ids"]).strip()


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_changed_values_in_a_models_json_are_read_or_refused(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    content = json.loads((whole / name).read_text())
    path = data.draw(st.sampled_from(paths_in(content)))
    value = data.draw(st.sampled_from([..., *VALUES]))
    check(whole, name, json.dumps(with_value(content, path, value)).encode())


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_damaged_bytes_in_a_models_files_are_read_or_refused(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*FILES, SHARD]))
    content = bytearray((whole / name).read_bytes())
    how = data.draw(st.sampled_from(["cut", "flip", "insert", "replace", "swap"]))
    at = data.draw(st.integers(0, min(len(content) - 1, 4000)))
    if how == "cut":
        content = content[:at]
    elif how == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif how == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    elif how == "replace":
        content = bytearray(data.draw(st.sampled_from([b"", b"null", b"[" * 50_000, b"9" * 5000, b"\xff\xfe", b"{}"])))
    else:
        content = bytearray((whole / data.draw(st.sampled_from([*FILES, SHARD]))).read_bytes())
    check(whole, name, bytes(content))
