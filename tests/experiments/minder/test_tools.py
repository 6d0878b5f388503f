"""minder_tools: what counts as found, false and overstated, by hand; and tools that do not fit their method."""

import pytest
import torch

from core.analysis.model_changes import BASE, CHAT, UNKNOWN, Changes
from core.errors import UserError
from core.synthetic.planted_pair import PlantedPair
from experiments.minder.tools import check, compared
from tests.composing import composed

TRUTH = PlantedPair(30, {"shared": 1, "weak_base": 1, "chat_only": 1, "base_only": 1}, 0.1, 0.3, 0.5, 0.0, seed=0)
SHARED, WEAK, CHAT_ONLY, BASE_ONLY = range(4)


def reported(concepts: list[int], side: list[int], signs: list[float] | None = None, one_sided: bool = True) -> Changes:
    """Reports along the directions of these concepts, whose strength in each row is what the side's model has."""
    directions = TRUTH.directions[concepts] * torch.tensor(signs or [1.0] * len(concepts))[:, None]
    strength = torch.stack([rows()[:, max(s, 0), c] for c, s in zip(concepts, side, strict=True)], dim=1)
    return Changes(directions, torch.tensor(side), strength, one_sided)


def rows() -> torch.Tensor:
    """`[8, 2, 4]`: each concept in two rows."""
    amplitudes = torch.eye(4).repeat(2, 1)
    return amplitudes[:, None] * TRUTH.strengths


def test_reports_are_found_false_and_overstated_by_hand():
    """Chat-only and base-only right; the weaker concept is called chat-only though the base model has 0.3 of it; the
    shared one is no change."""
    changes = reported([CHAT_ONLY, BASE_ONLY, WEAK, SHARED], [CHAT, BASE, CHAT, CHAT])
    scores, table = compared(changes, TRUTH, rows())
    assert (scores["n_reported"], scores["n_found"], scores["n_false"], scores["n_overstated"]) == (4, 3, 1, 1)
    assert scores["found_share"] == 1.0 and scores["n_found_chat_only"] == 1
    assert table["kind"].tolist() == ["chat_only", "base_only", "weak_base", "shared"]
    milder, _ = compared(reported([WEAK], [CHAT], one_sided=False), TRUTH, rows())
    assert milder["n_overstated"] == 0 and milder["n_found"] == 1


def test_a_change_that_is_reported_twice_is_found_once():
    scores, _ = compared(reported([CHAT_ONLY, CHAT_ONLY], [CHAT, CHAT]), TRUTH, rows())
    assert (scores["n_reported"], scores["n_found"], scores["n_false"]) == (2, 1, 0)


def test_a_report_in_the_wrong_sense_is_false_unless_the_tool_names_no_sense():
    assert compared(reported([CHAT_ONLY], [CHAT], [-1.0]), TRUTH, rows())[0]["n_false"] == 1
    assert compared(reported([CHAT_ONLY], [UNKNOWN], [-1.0]), TRUTH, rows())[0]["n_found"] == 1


def test_a_direction_between_two_concepts_stands_for_neither():
    mixed = Changes(torch.nn.functional.normalize(TRUTH.directions[[2, 3]].sum(0), dim=0)[None], torch.tensor([CHAT]),
                    torch.ones(8, 1), True)  # fmt: skip
    scores, table = compared(mixed, TRUTH, rows())
    assert scores["n_false"] == 1 and table["kind"].tolist() == [""]


def test_rows_with_a_change_are_ranked_by_what_is_reported_in_them():
    scores, _ = compared(reported([WEAK, CHAT_ONLY, BASE_ONLY], [CHAT, CHAT, BASE]), TRUTH, rows())
    assert scores["row_auc"] == 1.0


def test_no_report_is_no_error():
    nothing = Changes(torch.zeros(0, 30), torch.zeros(0, dtype=torch.int64), torch.zeros(8, 0), True)
    scores, table = compared(nothing, TRUTH, rows())
    assert scores["n_found"] == scores["n_false"] == 0 and table.empty


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tool=difference"], "tool=difference needs a method for the rows of one model"),
        (["method=batchtopk", "method.k=1"], "tool=crosscoder needs a crosscoder"),
    ],
)
def test_a_method_that_does_not_fit_the_tool_is_named(overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        check(composed("experiment=minder_tools", "scale=smoke", *overrides))
