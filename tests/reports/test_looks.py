"""Colours and markers of methods: distinct where methods meet, also for the colour-blind, and stable for new ones."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from reports.looks import LOOKS, RESERVE, Look, in_order, look

MEETING = {
    "leask_batchtopk": ["TopK", "BatchTopK", "JumpReLU", "ReluL1"],
    "oneill_known_codes": ["SAE", "MLP32", "MLP256", "MLP1024"],
    "oneill_known_dictionary": ["SAE", "MLP32", "MLP256", "ITO"],
    "oneill_known_dictionary, runs": ["SAE", "MLP32", "MLP256", "ITO", "ITO from -2", "ITO warm", "ITO warm floor"],
    "oneill_unknown": ["SAE", "SAE+ITO", "MLP32", "MLP256", "SC"],
    "oneill_unknown, runs": ["SAE", "SAE+ITO", "MLP32", "MLP256", "SC", "SC from -2", "SC truncated"],
    "oneill_sparsity": ["SAE", "MLP32", "SC", "TopK SAE", "TopK MLP", "TopK SC", "TopK SC ReLU"],
    "oneill_ablations, bias": ["SAE", "SC", "MLP64"],
    "oneill_ablations, Zipf codes": ["SAE", "SAE+ITO", "SC", "ITO", "MLP32", "MLP256", "MLP1024"],
    "oneill_large_scale": ["SAE", "MLP32", "MLP256", "FISTA"],
    "oneill_theorem": ["L-NL", "NNLS"],
    "oneill_llm": ["ReluL1", "MLPEncoder", "LCA"],
    "minder_planted": ["L1Crosscoder", "BatchTopKCrosscoder"],
    "bench_train_step": ["TopK", "BatchTopK"],
    "MLPs": [f"MLP{2**octave}" for octave in range(4, 11)],
    "solvers": ["FISTA", "NNLS", "L0 oracle", "basis pursuit", "sklearn"],
}
# How the three kinds of colour-blind eyes see linear RGB (Machado et al. 2009, severity 1).
EYES = {
    "usual": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, eyes: str) -> np.ndarray:
    """CIELAB (D65) of a colour as these eyes see it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.array(to_xyz) @ np.clip(EYES[eyes] @ linear, 0, 1) / [0.9505, 1.0, 1.089]
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("figure", MEETING)
def test_no_two_methods_that_meet_in_a_figure_share_colour_and_marker(figure: str):
    seen = {name: (look(name).colour, look(name).marker) for name in MEETING[figure]}
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("eyes", EYES)
def test_colours_that_meet_can_be_told_apart_by_every_kind_of_eyes(eyes: str):
    """A distance of 2.3 in CIELAB is just noticeable. The eight shades of the MLPs alone are closer than 15."""
    for figure, names in MEETING.items():
        for a, b in combinations({look(name).colour for name in names if figure != "MLPs"}, 2):
            assert np.linalg.norm(lab(a, eyes) - lab(b, eyes)) > 15, (figure, a, b)


def test_lab_by_hand():
    assert lab("#ffffff", "usual") == pytest.approx([100, 0, 0], abs=0.1)
    assert lab("#ff0000", "usual") == pytest.approx([53.2, 80.1, 67.2], abs=0.1)


def test_the_k_sparse_methods_and_the_encoders_no_longer_share_a_colour():
    assert len({look(name).colour for name in ("TopK", "BatchTopK", "JumpReLU", "SAE", "MLP32", "MLP256", "SC")}) == 7


def test_one_method_has_one_look_under_all_its_names():
    assert look("SAE") == look("ReluL1") and look("TopK") == look("TopK SAE")


def test_a_new_method_has_a_look_that_depends_on_its_name_alone():
    assert look("NoSuchMethod") == Look("#CC79A7", "d") and look("NoSuchMethod").colour in RESERVE
    assert look("MLP2048").colour == look("MLP1024").colour and look("MLP48") != look("MLP32")
    variant = look("SC read slowly")
    assert variant.colour == look("SC").colour and variant.hollow and variant not in LOOKS.values()


def test_methods_are_in_the_order_of_the_table_and_new_ones_follow_by_name():
    assert in_order(["Zoo", "SC", None, "SAE", "Ant", "SC"]) == ["SAE", "SC", "Ant", "Zoo"]
