"""The planted pair of models has the frequencies, strengths and noise that it states."""

from typing import Any

import pytest
import torch

from core.errors import UserError
from core.seeding import generator
from core.streams.planted_pairs import PlantedPairSource
from core.synthetic.planted_pair import KINDS, PlantedPair

COUNTS = {"shared": 5, "weak_base": 3, "chat_only": 2, "base_only": 2, "sometimes": 4}
N = 40_000


def pair(**changes: Any) -> PlantedPair:
    settings: dict[str, Any] = {"p": 0.1, "weak_strength": 0.3, "p_both": 0.5, "noise": 0.0} | changes
    return PlantedPair(24, COUNTS, seed=1, **settings)


def test_concepts_are_there_as_often_and_as_strongly_as_stated():
    planted = pair()
    concepts = planted.rows(N, generator(0, "rows")).truth["concepts"]  # [N, 2, C]
    present = (concepts > 0).double()
    base, chat = present.mean(0)
    for kind in KINDS:
        own = planted.of_kind(kind)
        expected = {"chat_only": (0.0, 0.1), "base_only": (0.1, 0.0), "sometimes": (0.075, 0.075)}.get(kind, (0.1, 0.1))
        assert base[own].tolist() == pytest.approx([expected[0]] * int(own.sum()), abs=0.006)
        assert chat[own].tolist() == pytest.approx([expected[1]] * int(own.sum()), abs=0.006)
    both = (present[:, 0] * present[:, 1]).mean(0)[planted.of_kind("sometimes")]
    assert both.tolist() == pytest.approx([0.05] * 4, abs=0.006)
    weak = planted.of_kind("weak_base")
    torch.testing.assert_close(concepts[:, 0, weak], 0.3 * concepts[:, 1, weak])
    amplitudes = concepts[:, 1, planted.of_kind("shared")]
    assert amplitudes[amplitudes > 0].min() >= 0.75 and amplitudes.max() <= 1.25


def test_activations_are_sums_of_directions_and_noise_of_the_stated_norm():
    exact = pair().rows(50, generator(0, "rows"))
    torch.testing.assert_close(exact.x, exact.truth["concepts"] @ pair().directions)
    noisy = pair(noise=2.0).rows(N, generator(0, "rows"))
    noise = noisy.x - noisy.truth["concepts"] @ pair().directions
    assert float(noise.norm(dim=2).square().mean()) == pytest.approx(4.0, rel=0.02)
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 0.005  # independent in the two models


def test_directions_have_unit_norm_and_depend_on_the_seed_alone():
    assert torch.equal(pair().directions, pair(noise=1.0).directions)
    torch.testing.assert_close(pair().directions.norm(dim=1), torch.ones(16))


def test_kinds_may_be_of_different_frequency():
    planted = pair(p={kind: 0.005 if kind == "chat_only" else 0.1 for kind in KINDS})
    present = (planted.rows(N, generator(0, "rows")).truth["concepts"] > 0).double().amax(1).mean(0)
    assert present[planted.of_kind("chat_only")].tolist() == pytest.approx([0.005] * 2, abs=0.0015)
    assert present[planted.of_kind("shared")].tolist() == pytest.approx([0.1] * 5, abs=0.006)
    same = pair(p=dict.fromkeys(KINDS, 0.1)).rows(50, generator(0, "rows"))
    assert torch.equal(same.x, pair(p=0.1).rows(50, generator(0, "rows")).x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 1.5}, r"stream\.p: 1\.5 must lie between 0 and 1"),
        ({"p": {"shared": 2.0}}, r"stream\.p: .* must lie between 0 and 1"),
        ({"p": {"shared": 0.1, "other": 0.1}}, r"stream\.p: other is no kind of concept"),
        (
            {"p": {"shared": 0.1}, "counts": {"shared": 1, "chat_only": 1}},
            r"stream\.p: there is no number for chat_only",
        ),
        ({"counts": {"nothing": 1}}, r"stream\.counts: nothing is no kind"),
    ],
)
def test_frequencies_and_counts_that_do_not_fit_are_named(changes: dict[str, Any], message: str):
    settings: dict[str, Any] = {
        "d_model": 8, "n_steps": 2, "batch_size": 4, "batches_per_chunk": 1, "calibration_batches": 0, "p": 0.1,
        "counts": {"shared": 1}, "weak_strength": 0.3, "p_both": 0.5, "noise": 0.0, "seed": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        PlantedPairSource(**(settings | changes))
