"""Two models on the same tokens: what a batch holds; the same from disk, after a stop, and on two devices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.batch import Batch
from core.errors import UserError
from core.runtime import Runtime
from core.settings import Cache
from core.streams.paired_source import PairedActivationSource
from core.text.chat import ROLES, chat_tokens
from core.text.dialogue_sources import messages_of

STREAM: dict[str, Any] = {
    "n_tokens": 1024, "n_ctx": 24, "max_document_tokens": 64, "batch_size": 64, "buffer_tokens": 512,
    "buffer_dtype": "float32", "rows_per_forward": 5, "batches_per_chunk": 4, "calibration_batches": 2, "seed": 0,
}  # fmt: skip
PER_FILL = 8

Make = Callable[..., PairedActivationSource]


@pytest.fixture
def source(tiny_pair: dict[str, Any], words_data: dict[str, Any], words_dialogues: dict[str, Any]) -> Make:
    def make(devices: int = 1, pair: dict[str, Any] | None = None, **changes: Any) -> PairedActivationSource:
        own = {**STREAM, **changes}
        node = {**tiny_pair, **(pair or {})}
        return PairedActivationSource(**own, pair=node, data=words_data, dialogues=words_dialogues, devices=devices)

    return make


def take(stream: Any, n: int) -> list[Batch]:
    return [next(stream) for _ in range(n)]


def same(a: Batch, b: Batch) -> bool:
    parts = [(a.x, b.x), (a.tokens, b.tokens), (a.positions, b.positions), *((a.truth[k], b.truth[k]) for k in a.truth)]
    return a.truth.keys() == b.truth.keys() and all(torch.equal(x, y) for x, y in parts)


def test_every_other_row_of_a_batch_is_of_a_dialogue(source: Make):
    for batch in take(source().live(), 2 * PER_FILL):
        assert batch.x.shape == (64, 2, 32) and batch.x.dtype == torch.float32
        assert batch.truth["is_chat"].tolist() == [False, True] * 32
        of_text = batch.truth["roles"] == ROLES.index("text")
        assert torch.equal(of_text, ~batch.truth["is_chat"])


@pytest.mark.parametrize("pair", [{}, {"drop_bos": False}, {"drop_first": 5}])
def test_a_fill_holds_what_both_models_compute_for_each_row_alone(source: Make, pair: dict[str, Any]):
    """Against the library's models, row by row, without padding; every wanted position is there once."""
    made = source(pair=pair)
    skipped = {"{}": 1, "{'drop_bos': False}": 0, "{'drop_first': 5}": 5}[str(pair)]
    models = [AutoModelForCausalLM.from_pretrained(made.pair[name]).eval() for name in ("base", "chat")]
    tokenizer = AutoTokenizer.from_pretrained(made.pair["chat"])
    rows = made.rows(tokenizer, "train", 0)
    ids: list[list[int]] = [[], []]
    for document in rows.text.source.documents("train", 0):
        words = tokenizer(document.text)["input_ids"][:63]
        ids[0] += [[0, *words[i : i + 23]] for i in range(0, len(words), 23)]
    for document in rows.chat.source.documents("train", 0):
        text = tokenizer.apply_chat_template(messages_of(document), tokenize=False)
        ids[1].append(tokenizer(text, add_special_tokens=False)["input_ids"][:24])
    expected = []
    for half in ids:
        chosen, missing = [], 256
        for row in half:
            if len(row) <= skipped or not missing:
                continue
            row = row[: missing + skipped]
            missing -= len(row) - skipped
            with torch.no_grad():
                states = [m(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0] for m in models]
            chosen.append((torch.stack(states, 1), torch.tensor(row), torch.arange(len(row))))
        expected.append([torch.cat([part[i][skipped:] for part in chosen]) for i in range(3)])
    batches = take(made.live(), PER_FILL)
    for kind in range(2):
        x, tokens, positions = (
            torch.cat([getattr(batch, name)[kind::2] for batch in batches]) for name in ("x", "tokens", "positions")
        )
        want_x, want_tokens, want_positions = expected[kind]
        assert len(x) == len(want_x) == 256 and int(positions.min()) == skipped
        for found in range(256):
            alike = (want_tokens == tokens[found]) & (want_positions == positions[found])
            assert (want_x[alike] - x[found]).abs().amax((1, 2)).min() < 1e-5
        assert torch.equal(tokens.sort().values, want_tokens.sort().values)
        assert torch.equal(positions.sort().values, want_positions.sort().values)


@pytest.mark.parametrize("n", [0, 3, PER_FILL, PER_FILL + 1, 3 * PER_FILL])
def test_a_stream_goes_on_with_the_next_batch(source: Make, n: int):
    stream = source().live()
    take(stream, n)
    state, rest = stream.state_dict(), take(stream, PER_FILL + 2)
    resumed = source().live()
    resumed.load_state_dict(state)
    assert all(map(same, take(resumed, PER_FILL + 2), rest))


def test_a_state_of_other_rows_is_refused(source: Make):
    state = source().live().state_dict()
    with pytest.raises(ValueError, match="other text"):
        source(n_ctx=20).live().load_state_dict(state)


def cached(made: PairedActivationSource, runtime: Callable[..., Runtime], folder: Path) -> Any:
    return made.open(runtime(folder, "run", cache=Cache(dir=str(folder / "cache"), max_gb=1, keep_free_gb=0)))


def test_cached_batches_equal_the_live_ones_bit_for_bit(
    source: Make, runtime: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stream = source().live()
    live, counts = take(stream, 18), source().report(stream)
    assert all(map(same, take(cached(source(), runtime, tmp_path), 18), live))
    monkeypatch.setattr(PairedActivationSource, "live", None)  # no model is loaded again
    from_disk = cached(source(), runtime, tmp_path)
    first = take(from_disk, 11)
    state = from_disk.state_dict()
    assert all(map(same, first, live))
    resumed = cached(source(), runtime, tmp_path)
    resumed.load_state_dict(state)
    assert all(map(same, take(resumed, 7), live[11:]))
    assert source().report(resumed) == counts


def test_two_ranks_share_each_fill_of_one(source: Make):
    one = take(source().live(), PER_FILL)
    ranks = [source(devices=2).live(rank) for rank in range(2)]
    two = [batch for stream in ranks for batch in take(stream, PER_FILL)]
    assert ranks[0].state_dict()["rows"] == ranks[1].state_dict()["rows"]
    for kind in range(2):
        found, wanted = (
            sorted(zip(*(torch.cat([b.tokens[kind::2] for b in batches]).tolist(),
                         torch.cat([b.positions[kind::2] for b in batches]).tolist()), strict=True))
            for batches in (two, one)
        )  # fmt: skip
        assert found == wanted
        sums = [torch.cat([b.x[kind::2] for b in batches]).double().sum(0) for batches in (two, one)]
        assert torch.allclose(*sums, atol=1e-3)


def test_the_base_model_sees_the_substitutes(source: Make):
    pair = {"base_token_map": {1: 40, 2: 41, 3: 42}}
    plain, mapped = take(source().live(), PER_FILL), take(source(pair=pair).live(), PER_FILL)
    differing = [(a.x != b.x).flatten(2).any(2) for a, b in zip(plain, mapped, strict=True)]
    assert not any(d[:, 1].any() or d[::2, 0].any() for d in differing)  # neither the chat model nor text
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, mapped, strict=True))
    own = torch.cat([b.truth["is_chat"] & torch.isin(b.tokens, torch.tensor([1, 2, 3])) for b in plain])
    assert own.any() and torch.cat(differing)[own, 0].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 63, "buffer_tokens": 630}, "stream.batch_size: 63 must be even"),
        ({"buffer_tokens": 500}, "buffer_tokens .500. must be a multiple of stream.batch_size .64"),
        ({"n_ctx": 2, "pair": {"drop_first": 2}}, "stream.n_ctx: 2 must be more than the 2 positions"),
        ({"pair": {"site": "resid_post.x"}}, "pair.site: 'resid_post.x' is not one of"),
        ({"pair": {"base_token_map": {"a": 2}}}, "pair.base_token_map: {a: 2} must lead from a token id"),
        ({"pair": {"sight": 1}}, "pair.sight: there is no such setting. Did you mean pair.site"),
    ],
)
def test_settings_that_do_not_fit_are_named(source: Make, change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        source(**change)


def test_dialogues_that_are_refused_or_cut_are_counted(source: Make, tmp_path: Path, tiny_chat_folder: Path):
    good = [{"role": "user", "content": "abc de"}, {"role": "assistant", "content": "fgh"}]
    path = tmp_path / "some.jsonl"
    lines = [{"conversation": good}, {"conversation": [good[0], good[0], good[1]]}, {"conversation": []}]
    lines += [{"conversation": [good[0], {"role": "assistant", "content": "abc de " * 40}]}]
    path.write_text("\n".join(json.dumps({**line, "id": str(i)}) for i, line in enumerate(lines * 40)))
    made = source()
    object.__setattr__(made, "dialogues", {"_target_": made.dialogues["_target_"], "path": str(path)})
    stream = made.live()
    take(stream, 1)
    counts, read = made.report(stream), stream.rows_read()["chat"]["counts"]
    assert read["left_out"] + read["cut"] < read["documents"]
    assert counts["dialogues_left_out"] == read["left_out"] > 0 and counts["dialogues_cut"] == read["cut"] > 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    assert len(chat_tokens(tokenizer, good).ids) < 24
