"""Dialogues as token ids, with what every token is: the template, or a role's own words.

A tokenizer's chat template puts a dialogue into one text. The places of the messages in it are known, so a token is a
part of a message where it overlaps its characters, and a part of the template elsewhere. Every sequence has exactly one
beginning-of-sequence token (BOS), whether or not the template writes it; it belongs to neither.

Source: Minder et al. 2025, authors' code, for what counts as template. Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from core.errors import UserError
from core.text.tokenizing import bos_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["bos", "template", "system", "user", "assistant", "text"]  # text: of no dialogue
ROLES: tuple[Role, ...] = ("bos", "template", "system", "user", "assistant", "text")  # an id is a place in this list
Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class ChatTokens:
    """One dialogue.

    ids    `[T]` int64, with one BOS in front
    roles  `[T]` int64, places in `ROLES`
    """

    ids: Tensor
    roles: Tensor

    def is_role(self, *roles: Role) -> Tensor:
        """bool `[T]`."""
        return is_role(self.roles, *roles)

    @property
    def answer_positions(self) -> Tensor:
        """bool `[T]`, see `answer_positions`."""
        return answer_positions(self.roles)


def is_role(roles: Tensor, *wanted: Role) -> Tensor:
    """bool, of the shape of `roles`, which are places in `ROLES`."""
    return torch.isin(roles, torch.tensor([ROLES.index(role) for role in wanted], device=roles.device))


def answer_positions(roles: Tensor) -> Tensor:
    """bool `[..., T]`: positions whose next token is a part of an answer, or the token that ends it.

    The last template token before an answer, which predicts its first token, is one of them. Padding has the role -1.
    """
    answer, template = is_role(roles, "assistant"), is_role(roles, "template")
    wanted = answer.clone()
    wanted[..., 1:] |= answer[..., :-1] & template[..., 1:]  # the end of the turn
    return torch.cat([wanted[..., 1:], wanted.new_zeros(*wanted.shape[:-1], 1)], dim=-1)


def first_of_answers(roles: Tensor, n: int) -> Tensor:
    """bool `[..., T]`: of each run of adjacent answer positions the first n, without those at a template token. So the
    one that predicts an answer's first token drops out (authors' code of Minder et al. 2025, `mask_k_first`)."""
    answers = answer_positions(roles)
    place = torch.arange(1, roles.shape[-1] + 1, device=roles.device).expand(roles.shape)
    before = place.where(~answers, 0).cummax(-1).values  # the place of the last position that is in no run
    return answers & (place - before <= n) & ~is_role(roles, "template")


@dataclass(frozen=True)
class Prompt:
    """A dialogue up to where an answer begins, and the id of the token that will end it."""

    chat: ChatTokens
    end: int


def prompt_of(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str = "a dialogue") -> Prompt:
    """The tokens after which the model answers. Raises UserError as `chat_tokens` does, and for a template that puts no
    token after an answer."""
    chat = chat_tokens(tokenizer, [*messages, {"role": "assistant", "content": "x"}], where)
    last = int(chat.is_role("assistant").nonzero().max())
    others = (~chat.is_role("assistant")[:last]).nonzero()
    start = int(others.max()) + 1
    if last + 1 == len(chat.ids):
        raise UserError(f"pair.chat: the chat template of {tokenizer.name_or_path!r} puts no token after an answer.")
    return Prompt(ChatTokens(chat.ids[:start], chat.roles[:start]), int(chat.ids[last + 1]))


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str = "a dialogue"
) -> ChatTokens:
    """The tokens of a dialogue under the tokenizer's chat template.

    Raises UserError for a tokenizer without a template, for messages that the template refuses (roles that do not
    alternate, for instance), and for a template that changes a message's text.
    """
    check_template(tokenizer)
    try:
        text = str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
    except Exception as error:  # what a template raises has no common base class
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{where}: the chat template refuses these roles ({roles}): {error}") from error
    spans = _spans(text, messages, where)
    bos = tokenizer.bos_token
    if bos and text.startswith(bos):
        text, spans = text[len(bos) :], [(start - len(bos), end - len(bos), role) for start, end, role in spans]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    own = [_role(begin, end, spans) for begin, end in encoded["offset_mapping"]]
    return ChatTokens(
        torch.tensor([bos_token_id(tokenizer), *encoded["input_ids"]]),
        torch.tensor([ROLES.index("bos"), *map(ROLES.index, own)]),
    )


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"pair.chat: the tokenizer {tokenizer.name_or_path!r} has no chat template, so dialogues cannot be "
            "written. Set chat_template in its tokenizer_config.json, or choose a chat model."
        )


Span = tuple[int, int, Role]  # first character, the one after the last, and whose words they are


def _spans(text: str, messages: Sequence[Message], where: str) -> list[Span]:
    spans: list[Span] = []
    position = 0
    for message in messages:
        content = message["content"].strip()  # templates strip, too
        role: Any = "assistant" if message["role"] in ("assistant", "model") else message["role"]
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}: the role {message['role']!r} is not one of system, user, assistant.")
        start = text.find(content, position)
        if start < 0:
            raise UserError(f"{where}: the chat template changes the text of a message: {content[:60]!r}")
        spans.append((start, start + len(content), role))
        position = start + len(content)
    return spans


def _role(begin: int, end: int, spans: Sequence[Span]) -> Role:
    for start, stop, role in spans:
        if begin < stop and end > start:
            return role
    return "template"
