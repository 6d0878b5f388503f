"""Pursuit, nearest latents, shared neighbours and split latents: by hand, and against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from torch.nn.functional import normalize

from core.analysis.directions import (
    graph_overlap,
    inheritance,
    matching_pursuit,
    max_cosines,
    p_larger,
    split_pairs,
)
from core.errors import UserError
from core.kernels.codes import SparseCodes
from core.streams.decoder_rows import random_directions


def sparse(dense: torch.Tensor) -> SparseCodes:
    rows, cols = dense.nonzero().T
    return SparseCodes(rows, cols, dense[rows, cols], tuple(dense.shape))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 5), n_atoms=st.integers(6, 40))
def test_a_pursuit_rebuilds_what_scikit_learns_does(seed: int, k: int, n_atoms: int):
    rows, atoms = random_directions(9, 12, seed).double(), random_directions(n_atoms, 12, seed + 1).double()
    expected = orthogonal_mp(atoms.T.numpy(), rows.T.numpy(), n_nonzero_coefs=k).T @ atoms.numpy()
    np.testing.assert_allclose(matching_pursuit(rows, atoms, k, rows_at_once=4).numpy(), expected, atol=1e-8)


def test_a_pursuit_among_orthogonal_atoms_keeps_the_largest_coordinates():
    rows = torch.tensor([[3.0, -5.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    found = matching_pursuit(rows, torch.eye(4), 2)
    torch.testing.assert_close(found, torch.tensor([[3.0, -5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]))


@pytest.mark.parametrize("k", [0, 5])
def test_a_pursuit_of_no_atom_or_more_than_there_are_is_refused(k: int):
    with pytest.raises(UserError, match=f"meta.method.k={k}"):
        matching_pursuit(torch.eye(4), torch.eye(4), k)


def test_the_nearest_latent_is_that_of_the_largest_cosine_and_within_a_set_another_one():
    a = normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]), dim=1)
    value, index = max_cosines(a, torch.eye(2), rows_at_once=2)
    assert index[:2].tolist()[0] == 0 and index[2] == 1
    torch.testing.assert_close(value, torch.tensor([1.0, 0.5**0.5, 0.0]))
    value, index = max_cosines(a, a, within=True, rows_at_once=2)
    assert index.tolist() == [1, 0, 1]
    torch.testing.assert_close(value, torch.tensor([0.5**0.5, 0.5**0.5, -(0.5**0.5)]))


def test_a_shifted_sample_is_larger_and_an_equal_one_is_not():
    values = torch.arange(50.0)
    assert p_larger(values + 20, values) < 0.001 and p_larger(values, values) == pytest.approx(0.5, abs=0.01)


def test_two_graphs_over_four_latents_by_hand():
    # meta-latent 0 joins {0, 1, 2}, meta-latent 1 joins {2, 3}: edges 01 02 12 23
    codes = sparse(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 2.0], [0.0, 1.0]]))
    small = torch.eye(3)
    # cosines with small latent 0: .9 .8 .7; with 1: latents 2 and 3. Above .6 there are edges 01 02 12 and 23
    rows = torch.tensor([[0.9, 0.0, 0.0], [0.8, 0.0, 0.0], [0.7, 0.65, 0.0], [0.0, 0.66, 0.0]])
    found = graph_overlap(codes, rows, small)
    assert (found.n_edges, found.n_edges_neighbours, found.shared) == (4, 4, 1.0)
    assert found.chance == pytest.approx(4 / 6) and 0.64 < found.cosine < 0.6501
    other = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.8, 0.0], [0.7, 0.65, 0.0], [0.66, 0.66, 0.0]])
    found = graph_overlap(codes, other, small)  # edges above .65: 02 03 23 and 13; then 12
    assert found.n_edges_neighbours >= 4 and found.shared < 1.0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_graphs_have_the_edges_that_a_dense_count_gives_and_as_many_as_wanted_or_just_more(seed: int):
    g = torch.Generator().manual_seed(seed)
    dense = torch.rand(30, 12, generator=g) * (torch.rand(30, 12, generator=g) < 0.1)
    rows, small = random_directions(30, 8, seed), random_directions(10, 8, seed + 1)
    found = graph_overlap(sparse(dense), rows, small)

    def edges(incidence: torch.Tensor) -> torch.Tensor:
        return ((incidence.float() @ incidence.float().T) > 0).triu(1)

    by_meta, by_neighbour = edges(dense > 0), edges(rows @ small.T > found.cosine)
    assert found.n_edges == by_meta.sum() and found.n_edges_neighbours == by_neighbour.sum()
    assert found.shared == pytest.approx(float((by_meta & by_neighbour).sum() / by_meta.sum().clamp(min=1)))
    closer = edges(rows @ small.T > found.cosine + 1e-5).sum()
    assert found.n_edges_neighbours >= found.n_edges or found.cosine <= 1e-6
    assert closer <= found.n_edges or found.n_edges == 0


def test_latents_split_where_two_of_the_larger_dictionary_are_near():
    small, large = torch.eye(3), normalize(torch.tensor([[1, 0, 0.1], [1, 0.2, 0], [0, 1, 0.1]]), dim=1)
    assert split_pairs(small, large).tolist() == [[0, 0], [0, 1]]
    assert split_pairs(small, -large).shape == (0, 2)


def test_what_children_inherit_by_hand():
    # rows 0, 1: parents; 2, 3: children of 0; 4: another latent of the larger dictionary
    codes = sparse(torch.tensor([
        [1.0, 1.0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 0],
    ]))  # fmt: skip
    found = inheritance(codes, torch.tensor([[0, 2], [0, 3], [1, 4]]), others=(4, 5))
    assert found.n_pairs == 2 and found.parent == 2 and found.child == 2.5
    assert found.kept == pytest.approx((1 + 0.5) / 2) and found.kept_by_others == 0.5
    assert inheritance(codes, torch.tensor([[0, 2]]), others=(2, 5)).kept_by_others == pytest.approx(
        (1 + 0.5 + 0.5) / 3
    )
    nobody = inheritance(codes, torch.tensor([[1, 4]]), others=(2, 5))
    assert nobody.n_pairs == 0 and nobody.metrics()["split_kept"] == 0
