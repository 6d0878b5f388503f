"""Strongest activations against a sort of everything; tokens and overlaps by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from core.analysis import top_activations as top
from core.analysis.held_out import HeldOut
from core.kernels.codes import DenseCodes, SparseCodes
from core.methods.topk import TopK
from core.models.language_model import LanguageModel, load_language_model
from core.text.tokenizing import bos_token_id


@pytest.fixture(scope="module")
def lm(tiny_model: dict[str, Any]) -> LanguageModel:
    return load_language_model(DictConfig(tiny_model))


@pytest.fixture(scope="module")
def rows(lm: LanguageModel) -> torch.Tensor:
    tokens = torch.randint(1, 250, (12, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = bos_token_id(lm.tokenizer)
    return tokens


def dictionary() -> TopK:
    return TopK(
        d_model=32, dict_size=20, k=5, use_enc_bias=False,
        enc_init_norm=None, aux="none", aux_coefficient=0.0, k_aux=1, lr=1e-3,
        betas=[0.9, 0.99], input_norm="token_std", seed=0, decoder_norm="none", dead_after_tokens=1, grad_clip=1.0,
        b_dec_init="zeros", warmup_steps=0, decay_fraction=0.0, path="sparse",
    ).eval()  # fmt: skip


@pytest.mark.parametrize("rows_per_batch", [5, 12])
def test_the_strongest_activations_are_those_of_a_sort_of_all(
    lm: LanguageModel, rows: torch.Tensor, rows_per_batch: int
):
    method = dictionary()
    starts = rows == bos_token_id(lm.tokenizer)
    places = {"site": "resid_pre.1", "rows": rows, "starts": starts}
    text = HeldOut(lm=lm, **places, n_downstream_rows=0, rows_per_batch=rows_per_batch)
    found = top.strongest_activations(method, text, n=6)
    x = lm.capture(rows, "resid_pre.1").flatten(0, 1)
    codes = method.encode(method.norm(x)[0]).dense().detach()
    codes[starts.flatten()] = 0
    assert found.n_tokens == 12 * 15 and found.counts.tolist() == (codes > 0).sum(0).tolist()
    for latent in range(20):
        values, places = codes[:, latent].sort(descending=True, stable=True)
        n = min(6, int((values > 0).sum()))
        np.testing.assert_allclose(found.values[latent, :n], values[:n].numpy(), rtol=1e-6)
        assert found.places[latent].tolist() == [*places[:n].tolist(), *[-1] * (6 - n)]
    again = top.strongest_activations(method, replace(text, captured=lm.capture(rows, "resid_pre.1")), 6)
    assert (again.places == found.places).all()
    torch.testing.assert_close(found.frequency.sum(), (codes > 0).sum().double() / 180)


def test_tokens_that_differ_in_case_or_space_are_one(lm: LanguageModel):
    assert top.normal(" The") == top.normal("the") == "the"
    assert top.normal("\n") == "\\n" and top.normal("\n        ") == "\\n␣×8" and top.normal(" ") == " "


def test_top_tokens_are_the_first_different_ones(lm: LanguageModel):
    class Words:
        def decode(self, ids: list[int]) -> str:
            return "".join([" The", "the", "cat", "dog"][i] for i in ids)

    found = top.Strongest(np.ones(2), 4, np.zeros((2, 4)), np.array([[0, 1, 2, 3], [3, -1, -1, -1]]))
    rows = torch.tensor([[0, 1], [2, 3]])
    assert top.top_tokens(found, rows, Words(), 2) == [["the", "cat"], ["dog"]]
    assert top.contexts([1, 2, -1], rows, Words(), before=3, after=3) == [(" The", "the", ""), ("", "cat", "dog")]


def test_overlap_by_hand():
    tokens = [["a", "b"], ["a", "c"], ["d"], []]
    # {0, 1}: 1/3; {0, 2}: 0; {1, 2}: 0; {2, 3}: 0
    assert top.token_overlap([[0, 1], [0, 1, 2], [2, 3], [0, 0]], tokens).tolist() == pytest.approx(
        [1 / 3, 1 / 9, 0, 1]
    )


def test_random_sets_have_different_members_and_follow_the_seed():
    sets = top.random_sets([3, 5, 7, 9], 3, 50, seed=0)
    assert all(len(set(s)) == 3 and set(s) <= {3, 5, 7, 9} for s in sets) and sets == top.random_sets(
        [3, 5, 7, 9], 3, 50, 0
    )


def test_the_rows_of_a_column_come_largest_first_and_only_those_let_through():
    dense = torch.tensor([[0.0, 1.0], [2.0, 3.0], [5.0, 2.0]])
    r, c = dense.nonzero().T
    codes = SparseCodes(r, c, dense[r, c], (3, 2))
    assert top.top_rows(codes, 2) == [[2, 1], [1, 2]]
    assert top.top_rows(codes, 2, np.array([True, True, False])) == [[1], [1, 0]]
    assert [a.tolist() for a in top._positive_entries(DenseCodes(dense))] == [
        a.tolist() for a in top._positive_entries(codes)
    ]


def test_nothing_is_left_of_an_empty_column(tmp_path: Path):
    codes = SparseCodes(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]), (2, 3))
    assert top.top_rows(codes, 5) == [[], [0], []]
