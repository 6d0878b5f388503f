"""Windows of text by how a latent fires in them."""

import json
from typing import Any

import torch

from core.analysis.latent_contexts import Windows, write_for_judge
from core.text.chat import ROLES


class Letters:
    """A tokenizer: id 0 is `a`."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def windows(seed: int = 0, n_rows: int = 40) -> Windows:
    """Rows of 10 tokens in windows of 4. Latent 7 is off in about half of the windows, latent 9 in all."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(26, (n_rows, 10), generator=g)
    v = torch.rand(n_rows, 10, 2, generator=g) * (torch.rand(n_rows, 10, 2, generator=g) < 0.15)
    v[..., 1] = 0
    real = torch.ones(n_rows, 10, dtype=torch.bool)
    real[0, 3:] = False  # row 0 has three tokens: its second window is padding
    roles = torch.full((n_rows, 10), ROLES.index("user"))
    roles[:, 1] = ROLES.index("template")
    return Windows.of([7, 9], ids, roles, real, torch.arange(n_rows) % 2 == 0, v, length=4)


def test_windows_of_padding_and_ends_of_rows_are_dropped():
    w = windows()
    assert w.ids.shape == (2 * 40 - 1, 4) and w.v.shape == (79, 4, 2)
    assert w.real[0].tolist() == [True, True, True, False]
    assert w.template[0].tolist() == [False, True, False, False]
    assert not w.template[~w.is_chat].any()  # ordinary text has no template


def test_negatives_are_off_at_every_token_and_positives_are_not():
    w = windows()
    off = w.non_activating(0, 1000, seed=0)
    on = [i for part in w.by_quantile(0, 4, 1000, seed=0) for i in part]
    assert off and on and sorted(off + on) == list(range(79))
    assert not w.v[off, :, 0].any() and (w.v[on, :, 0] > 0).any(1).all()


def test_quantiles_go_from_weak_to_strong():
    w = windows()
    parts = [w.largest[part, 0] for part in w.by_quantile(0, 3, 5, seed=0)]
    assert [len(part) for part in parts] == [5, 5, 5]
    assert parts[0].max() < parts[1].min() and parts[1].max() < parts[2].min()
    assert w.largest[w.strongest(0, 1)[0], 0] == w.largest[:, 0].max()


def test_a_latent_that_never_fires_has_negatives_only():
    w = windows()
    assert w.strongest(1, 5) == [] and not any(w.by_quantile(1, 4, 5, seed=0))
    assert len(w.non_activating(1, 5, seed=0)) == 5


def test_a_context_has_the_words_and_the_strengths_without_padding():
    w = windows()
    context = w.context(0, 0, Letters())
    assert context.where == "chat" and len(context.tokens) == 3 == len(context.strengths) == len(context.is_template)
    assert list(context.tokens) == [chr(97 + i) for i in w.ids[0, :3].tolist()]
    strongest = w.context(w.strongest(0, 1)[0], 0, Letters())
    assert max(strongest.strengths) == 1


def test_the_file_for_a_judge_has_labels_and_no_text_twice(tmp_path: Any):
    write_for_judge(tmp_path / "contexts.jsonl", windows(), Letters(), 3, 4, 6, seed=0)
    lines = [json.loads(line) for line in (tmp_path / "contexts.jsonl").read_text().splitlines()]
    assert [line["latent"] for line in lines] == [7, 9]
    labels = [(context["label"], context["quantile"]) for context in lines[0]["contexts"]]
    assert labels == [("activating", q) for q in (0, 1, 2) for _ in range(4)] + [("non_activating", None)] * 6
    for context in lines[0]["contexts"]:
        assert (max(context["strengths"]) > 0) == (context["label"] == "activating")
