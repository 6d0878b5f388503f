"""Cached activations equal the stream's, bit for bit, whatever happens to the run, its folder and the disk."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from core.artifacts import Store
from core.batch import Batch
from core.cells import cell_name
from core.errors import UserError
from core.fleet import KIND, train_together
from core.methods.saved import load_dictionary
from core.models.language_model import LanguageModel, load_language_model
from core.results import comparable
from core.runtime import Cache
from core.streams.activation_source import ActivationSource
from core.streams.activations import ActivationStream
from core.streams.cache import MANIFEST, CachedStream, Shards, fill_spec
from core.text.rows import RowStream

N_CTX, BATCH, BUFFER, PER_FILL = 16, 32, 128, 4
SPEC = {"stream": {"site": "resid_pre.1"}, "seed": 0}


class LmUsedError(AssertionError):
    pass


@pytest.fixture(scope="module")
def lm(tiny_model: dict[str, Any]) -> LanguageModel:
    return load_language_model(tiny_model)


@pytest.fixture(scope="module")
def live(lm: LanguageModel, words: Any) -> Callable[..., ActivationStream]:
    def make(dtype: str = "float32", batch_size: int = BATCH) -> ActivationStream:
        rows = RowStream(words, lm.tokenizer, "train", 0, N_CTX, "concat", 64)
        return ActivationStream(lm, "resid_pre.1", rows, batch_size, BUFFER, 3, 0, getattr(torch, dtype))

    return make


@pytest.fixture
def cached(live: Callable[..., ActivationStream], tmp_path: Path) -> Callable[..., CachedStream]:
    return opener(live, tmp_path)


def opener(live: Callable[..., ActivationStream], root: Path) -> Callable[..., CachedStream]:
    def make(
        n_batches: int = 12,
        dtype: str = "float32",
        batch_size: int = BATCH,
        lm_allowed: bool = True,
        max_gb: float = 1.0,
        keep_free_gb: float = 0.0,
    ) -> CachedStream:
        def open_live() -> ActivationStream:
            if not lm_allowed:
                raise LmUsedError
            return live(dtype, batch_size)

        stream = {"batch_size": batch_size, "buffer_tokens": BUFFER, "n_ctx": N_CTX, "buffer_dtype": dtype}
        shards = Shards(root / dtype, SPEC, max_gb, keep_free_gb)
        return CachedStream(shards, open_live, stream, n_batches, torch.device("cpu"))

    return make


def take(stream: Any, n: int) -> list[Batch]:
    return [next(stream) for _ in range(n)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    fields = ("x", "tokens", "positions")
    return len(a) == len(b) and all(
        torch.equal(getattr(p, f), getattr(q, f)) and getattr(p, f).dtype == getattr(q, f).dtype
        for p, q in zip(a, b, strict=True)
        for f in fields
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writing_and_reading_give_the_batches_of_the_stream_and_reading_needs_no_language_model(cached, live, dtype):
    whole = take(live(dtype), 12)
    assert same(take(cached(dtype=dtype), 12), whole)
    assert same(take(cached(dtype=dtype, lm_allowed=False), 12), whole)


def test_fewer_tokens_read_a_part_of_the_cache_and_more_tokens_extend_it(cached, live):
    whole = take(live(), 20)
    take(cached(n_batches=8), 8)
    assert same(take(cached(n_batches=3, lm_allowed=False), 3), whole[:3])
    extended = cached(n_batches=18)
    assert same(take(extended, 20), whole)
    assert extended._live.fill == 4 and len(list(extended.shards.folder.glob("*.safetensors"))) == 5
    assert same(take(cached(n_batches=18, lm_allowed=False), 18), whole[:18])


def test_only_the_missing_shards_are_computed(cached, lm, monkeypatch):
    take(cached(n_batches=8), 8)
    rows = []
    capture = lm.capture
    monkeypatch.setattr(lm, "capture", lambda tokens, site: rows.append(len(tokens)) or capture(tokens, site))
    take(cached(n_batches=12), 12)
    assert sum(rows) == BUFFER // N_CTX


def test_another_batch_size_reads_the_same_shards(cached, live):
    take(cached(), 12)
    assert same(take(cached(n_batches=6, batch_size=64, lm_allowed=False), 6), take(live(batch_size=64), 6))


def test_batches_beyond_the_requested_ones_are_not_written(cached, live):
    stream = cached(n_batches=4)
    assert same(take(stream, 9), take(live(), 9))
    assert [path.name for path in stream.shards.folder.glob("*.safetensors")] == ["000000.safetensors"]


def equal_states(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def full(live: Callable[..., ActivationStream], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A complete cache of 12 batches in both dtypes."""
    make = opener(live, tmp_path_factory.mktemp("full"))
    for dtype in ("float32", "bfloat16"):
        take(make(dtype=dtype), 12)
    return make


@pytest.fixture(scope="module")
def streamed(live: Callable[..., ActivationStream]) -> dict[str, tuple[list[Batch], list[Any]]]:
    """By dtype: 18 batches without a cache, and the state of the stream before each."""
    batches: dict[str, tuple[list[Batch], list[Any]]] = {}
    for dtype in ("float32", "bfloat16"):
        stream = live(dtype)
        pairs = [(stream.state_dict(), next(stream)) for _ in range(18)]
        batches[dtype] = [batch for _, batch in pairs], [state for state, _ in pairs]
    return batches


@settings(max_examples=12, deadline=None)
@example(before=4, more=1, dtype="float32")
@given(before=st.integers(0, 11), more=st.integers(1, 6), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_a_state_continues_with_the_same_batches_with_and_without_the_cache(full, live, streamed, before, more, dtype):
    whole, states = streamed[dtype]
    cached = full(dtype=dtype)
    assert same(take(cached, before), whole[:before])
    assert equal_states(cached.state_dict(), states[before])
    for state, resumed in ((states[before], full(dtype=dtype)), (cached.state_dict(), live(dtype))):
        resumed.load_state_dict(state)
        assert same(take(resumed, more), whole[before : before + more])


@settings(max_examples=8, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6)), min_size=1, max_size=4),
    holes=st.sets(st.integers(0, 3)),
)
def test_jumping_about_in_a_cache_with_holes_gives_the_batches_of_the_stream(
    full, live, streamed, tmp_path_factory, steps, holes
):
    whole, states = streamed["float32"]
    root = tmp_path_factory.mktemp("holes")
    shutil.copytree(full().shards.root, root / "float32")
    stream = opener(live, root)(n_batches=16)
    for hole in holes:
        stream.shards.path(hole).unlink(missing_ok=True)
    for start, n in steps:
        stream.load_state_dict(states[start])
        assert same(take(stream, n), whole[start : start + n])


def test_a_state_of_other_text_is_refused(full, lm, words):
    rows = RowStream(words, lm.tokenizer, "train", 1, N_CTX, "concat", 64)
    with pytest.raises(ValueError, match="other text"):
        full().load_state_dict({"fill": 0, "served": 0, "rows": rows.state_dict()})


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        flip_a_byte,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.with_name("000002.safetensors").read_bytes()),
        lambda path: path.write_bytes(path.read_bytes().replace(b'\\"epochs\\": 0', b'\\"epochs\\": 1')),
    ],
    ids=["altered", "truncated", "empty", "exchanged", "altered header"],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_shard_is_named_and_computed_again_from_its_place_in_the_text(cached, live, capsys, spoil, number):
    stream, whole = cached(), take(live(), 12)
    take(stream, 12)
    path = stream.shards.path(number)
    sound = path.read_bytes()
    spoil(path)
    assert path.read_bytes() != sound
    capsys.readouterr()
    assert same(take(cached(), 12), whole)
    assert capsys.readouterr().err.count(f"{path.name} is damaged") == 1
    assert same(take(cached(lm_allowed=False), 12), whole)


def test_a_folder_of_another_configuration_is_refused_and_the_difference_is_named(cached, tmp_path):
    stream = cached()
    take(stream, 1)
    other = Shards(tmp_path / "other", {**SPEC, "seed": 1}, 1.0, 0.0)
    other.root.mkdir()
    stream._writing.result()
    stream.shards.folder.rename(other.folder)
    with pytest.raises(UserError, match=r"another configuration \(it differs in seed\)"):
        Shards(other.root, other.spec, 1.0, 0.0)
    with pytest.raises(UserError, match=r"itself the cache of one stream"):
        Shards(other.folder, SPEC, 1.0, 0.0)
    (other.folder / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"no readable cache\.json"):
        Shards(other.root, other.spec, 1.0, 0.0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        Shards(tmp_path / "file", SPEC, 1.0, 0.0)


def test_the_size_is_printed_and_too_large_a_cache_is_refused_before_anything_is_computed(
    cached, lm, monkeypatch, capsys
):
    monkeypatch.setattr(lm, "capture", None)
    cached(n_batches=12)
    assert f"3 shards of {128 * (32 * 4 + 8) / 1e6:,.1f} MB" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cache\.max_gb=5e-05: 0\.000 GB .*cache=none"):
        cached(n_batches=12, max_gb=5e-5)
    with pytest.raises(UserError, match=r"cache\.keep_free_gb=1e\+09 .*cache=none"):
        cached(n_batches=12, keep_free_gb=1e9)


def test_the_limit_counts_what_other_streams_have_written(cached, tmp_path):
    needed = 3 * 128 * (32 * 4 + 8)
    cached(max_gb=(needed + 1) / 1e9)
    other = tmp_path / "float32" / "other" / "000000.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"cache\.max_gb"):
        cached(max_gb=(needed + 1) / 1e9)


def test_a_complete_cache_is_read_whatever_the_limits(cached):
    take(cached(), 12)
    take(cached(max_gb=0, keep_free_gb=1e9, lm_allowed=False), 12)


@contextmanager
def small_files() -> Iterator[None]:
    """Every write beyond 8 kB of a file fails, as on a disk that is full. Not a fixture: pytest reports before a
    fixture ends, and its report may be a file longer than that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_on_a_full_disk_the_run_continues_from_the_stream_and_nothing_half_written_remains(cached, live, capsys):
    stream = cached()
    with small_files():
        batches = take(stream, 12)
    assert same(batches, take(live(), 12))
    assert capsys.readouterr().err.count("could not be written") == 1
    assert {path.name for path in stream.shards.folder.iterdir()} <= {MANIFEST, "write.lock"}


def test_of_two_runs_side_by_side_each_shard_is_written_by_one_and_both_get_the_batches(cached, live, monkeypatch):
    saved = []
    save = Shards._save
    monkeypatch.setattr(Shards, "_save", lambda self, fill, *rest: saved.append(fill) or save(self, fill, *rest))
    whole = take(live(), 12)
    first, second = cached(), cached()
    pairs = [(next(first), next(second)) for _ in range(12)]
    assert same([a for a, _ in pairs], whole) and same([b for _, b in pairs], whole)
    assert len(saved) == len(set(saved))
    assert same(take(cached(), 12), whole)


def test_a_folder_that_cannot_be_made_does_not_stop_the_run(cached, live, tmp_path, capsys):
    stream = cached()
    stream.shards.root.write_text("in the way")
    assert same(take(stream, 12), take(live(), 12))
    assert capsys.readouterr().err.count("could not be written") == 1


HOLD = "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]): print(flush=True); time.sleep(600)"


def test_a_run_writes_nothing_while_another_is_writing_and_writes_once_that_one_has_died(cached, live, capsys):
    stream, whole = cached(), take(live(), 12)
    stream.shards.folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, stream.shards.folder / "write.lock"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"\n"
        assert same(take(stream, 12), whole)
        assert capsys.readouterr().err.count("another run is writing") == 1
        assert not list(stream.shards.folder.glob("*.safetensors"))
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    (stream.shards.folder / ".tmpAbCdEf").write_text("left by the killed process")
    assert same(take(cached(), 12), whole)
    assert same(take(cached(lm_allowed=False), 12), whole)
    assert not list(stream.shards.folder.glob(".*"))


def test_sizes_that_do_not_fit_are_refused_though_the_cache_is_complete(cached):
    take(cached(), 12)
    with pytest.raises(UserError, match=r"stream\.batch_size \(48\)"):
        cached(batch_size=48, lm_allowed=False)


def test_a_batch_is_a_copy_of_its_own_rows_only(cached):
    take(cached(), 12)
    x = next(cached(lm_allowed=False)).x
    assert x.untyped_storage().nbytes() == BATCH * 32 * 4


def test_the_key_of_a_cache_leaves_out_what_does_not_decide_a_fill():
    stream = {"site": "resid_pre.1", "n_ctx": 16, "buffer_tokens": 128, "rows_per_forward": 3}
    rest = {"n_tokens": 9, "batch_size": 32, "batches_per_chunk": 2, "calibration_batches": 1}
    spec = {"stream": {**stream, **rest}, "model": {}, "data": {}, "seed": 0}
    assert fill_spec(spec) == {"stream": stream, "model": {}, "data": {}, "seed": 0}


def test_the_cache_changes_neither_the_name_nor_the_identity_of_a_cell():
    assert cell_name(["cache=disk", "cache.max_gb=3", "seed=1"]) == "seed=1"
    with_cache, without = ({"seed": 1, "cache": {"dir": name}} for name in ("x", None))
    assert comparable(OmegaConf.create(with_cache)) == comparable(OmegaConf.create(without))


METHOD = {
    "_target_": "core.methods.batchtopk.BatchTopK", "k": 4, "threshold_rule": "posthoc_mean",
    "threshold_ema_rate": 0.01, "use_enc_bias": False,
    "enc_init_norm": None, "aux": "r1", "aux_coefficient": 1 / 32, "k_aux": 16,
    "path": "auto", "d_model": 32, "dict_size": 64, "lr": 1e-3, "betas": [0.9, 0.99], "input_norm": "token_std",
    "seed": 0, "decoder_norm": "before_step", "dead_after_tokens": 256, "grad_clip": 1e5,
    "b_dec_init": "zeros", "warmup_steps": 0,
    "decay_fraction": 0.5,
}  # fmt: skip


def test_a_dictionary_trained_from_the_cache_equals_the_one_trained_from_the_stream(
    tmp_path, small_request, runtime, monkeypatch
):
    request = small_request(METHOD, n_tokens=1024, buffer_tokens=256)

    def trained(store: str, cache: str | None) -> dict[str, torch.Tensor]:
        kept = None if cache is None else Cache(dir=cache, max_gb=1, keep_free_gb=0)
        run = runtime(tmp_path, store, cache=kept)
        assert train_together([request], run) == {}
        return load_dictionary(Store(run.artifacts_dir).path(KIND, request.spec)).state_dict()

    streamed = trained("streamed", None)
    written = trained("written", str(tmp_path / "cache"))

    def no_lm(source: ActivationSource) -> ActivationStream:
        raise LmUsedError

    monkeypatch.setattr(ActivationSource, "live", no_lm)
    read = trained("read", str(tmp_path / "cache"))
    for name, value in streamed.items():
        assert torch.equal(value, written[name]) and torch.equal(value, read[name])
