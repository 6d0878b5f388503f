"""Which positions predict answers, on a template written by hand."""

import torch
from torch import Tensor

from core.text.chat import ROLES, ChatTokens, answer_positions, first_of_answers

LETTERS = {role[0]: place for place, role in enumerate(ROLES) if role != "text"}


def roles(text: str) -> Tensor:
    """One letter for each token; a dot is padding."""
    return torch.tensor([LETTERS.get(letter, -1) for letter in text])


def marked(mask: Tensor) -> str:
    return "".join("x" if is_marked else "-" for is_marked in mask.tolist())


def test_the_last_template_token_predicts_an_answer_and_the_last_answer_token_its_end():
    """<bos> <user> hi <end> newline <assistant> three words <end> newline."""
    assert marked(answer_positions(roles("btuttaaatt"))) == "----xxxx--"
    assert marked(ChatTokens(torch.zeros(10), roles("btuttaaatt")).answer_positions) == "----xxxx--"


def test_an_answer_cut_off_has_no_end():
    assert marked(answer_positions(roles("btuttaaa"))) == "----xxx-"


def test_the_first_tokens_are_counted_in_every_answer_and_leave_out_the_template():
    """With n = 3 of each run: the template token drops out, so two remain; an answer of one token has one."""
    text = "btutaaaaatutatt"
    assert marked(answer_positions(roles(text))) == "---xxxxxx--xx--"
    assert marked(first_of_answers(roles(text), 3)) == "----xx------x--"


def test_padding_ends_nothing_and_is_no_answer():
    text = "btutaata..."
    assert marked(answer_positions(roles(text))) == "---xxxx----"
    assert marked(answer_positions(roles("btutaa..."))) == "---xx----"
    assert marked(first_of_answers(roles(text), 10)) == "----xx-----"


def test_rows_are_handled_like_single_dialogues():
    rows = torch.stack([roles("btutaat"), roles("butaaat")])
    assert [marked(row) for row in answer_positions(rows)] == ["---xxx-", "--xxxx-"]
    assert [marked(row) for row in first_of_answers(rows, 2)] == ["----x--", "---x---"]


def test_nine_of_a_long_answer_remain():
    text = "btut" + 20 * "a" + "t"
    assert int(first_of_answers(roles(text), 10).sum()) == 9
    assert marked(first_of_answers(roles(text), 10)).index("x") == 4  # predicts the second token of the answer
