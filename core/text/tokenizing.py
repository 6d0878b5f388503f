"""From text to token ids: the token that opens a document, and what special tokens written in a text become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.errors import UserError
from core.text.documents import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def bos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that opens every document: `bos_token_id`, or `eos_token_id` if there is none (Qwen). The only rule."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        f"model: the tokenizer {tokenizer.name_or_path!r} has neither a bos_token nor an eos_token to open documents "
        "with. Set one of them in its tokenizer_config.json, or choose another model."
    )


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: SpecialTokens
) -> list[list[int]]:
    """The ids of every text, without a token to open it.

    parse  a special token that is written in a text (`<|endoftext|>`) becomes that token
    plain  it is text like any other
    """
    # verbose=False: no warning for documents longer than the model's context
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
        split_special_tokens=special_tokens == "plain",
    )
    return [list(ids) for ids in encoded["input_ids"]]


def unwritten_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special ids that plain text never becomes, if the tokenizer keeps to it. A token for the unknown is none."""
    return frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
