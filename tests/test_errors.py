"""Errors and what caused them."""

from core.errors import UserError, chain_of, lack_of_memory


def test_a_chain_of_errors_that_is_a_circle_has_an_end():
    first, second = ValueError("a"), KeyError("b")
    first.__cause__, second.__context__ = second, first
    assert chain_of(first) == [first, second] and chain_of(None) == []
    assert lack_of_memory(first) is None
    second.__context__ = MemoryError()
    second.__context__.__context__ = first
    assert isinstance(lack_of_memory(first), UserError)


def test_equal_errors_are_links_of_their_own():
    first, second = ValueError("a"), ValueError("a")
    first.__cause__ = second
    assert len(chain_of(first)) == 2
