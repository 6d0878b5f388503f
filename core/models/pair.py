"""Two language models that read the same tokens: a base model and the one that was tuned from it.

The tuned model's tokenizer writes the tokens; it has the chat template. Ids that the base model does not know, or
handles badly, are replaced before its pass.

Shapes: R rows of T tokens, d = width of the site. Models are always in the order base, chat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from core.checked import Checked, at_least, not_empty, positive
from core.errors import UserError
from core.models.identity import commits_of, model_identity, note_model, pinned_model
from core.models.language_model import LanguageModel, load_language_model
from core.models.loading import Attention, chosen_device, site_width, tokenizer_of
from core.models.sites import parse_site
from core.models.tokenizer import PROBE
from core.notices import say_once

Member = Literal["base", "chat"]
MEMBERS: tuple[Member, Member] = ("base", "chat")


@dataclass(frozen=True, kw_only=True)
class PairSettings(Checked):
    """The group `pair` (conf/pair).

    base, chat       as `model.source`: names on the hub, folders, or shipped models; with a revision for each
    site             where the activations are taken in both
    base_token_map   ids that the base model sees as other ids
    drop_first       positions at the start of every row that are in no batch, the opening token included
    drop_bos         whether the opening token is in no batch
    """

    node: ClassVar[str] = "pair"
    name: str = not_empty()
    base: str = not_empty()
    chat: str = not_empty()
    revision_base: str | None = not_empty()
    revision_chat: str | None = not_empty()
    dtype: Literal["float32", "bfloat16", "float16"]
    device: str
    attn_implementation: Attention
    site: str = not_empty()
    base_token_map: dict[Any, int]
    drop_first: int = at_least(0)
    drop_bos: bool
    d_model: int | None = positive()

    def check(self) -> None:
        try:
            parse_site(self.site)
        except UserError as error:
            raise UserError(f"{self.named('')}{error}") from error
        for token_id, seen in self.base_token_map.items():
            if not str(token_id).isdecimal() or seen < 0:
                raise UserError(
                    f"{self.named('base_token_map')}: {{{token_id}: {seen}}} must lead from a token id to a token id."
                )

    @property
    def substitutes(self) -> dict[int, int]:
        return {int(token_id): seen for token_id, seen in self.base_token_map.items()}

    @property
    def skipped(self) -> int:
        """How many positions at the start of every row are in no batch."""
        return max(self.drop_first, int(self.drop_bos))

    def model(self, member: Member) -> dict[str, Any]:
        """One of the two as a group `model`."""
        return {
            "name": f"{self.name} {member}",
            "source": getattr(self, member),
            "revision": getattr(self, f"revision_{member}"),
            "dtype": self.dtype,
            "d_model": self.d_model,
            "n_layers": None,
            "attn_implementation": self.attn_implementation,
            "device": self.device,
        }

    def tokenizers(self) -> tuple[Any, Any]:
        """Those of both, without the models. Raises UserError if they differ."""
        base, chat = (tokenizer_of(self.model(member)) for member in MEMBERS)
        check_tokenizers(base, chat)
        return base, chat

    @cached_property
    def torch_device(self) -> torch.device:
        return chosen_device(self.device)

    def width(self) -> int:
        """The size of an activation at the site. Reads configurations only. Raises UserError if the two differ."""
        widths = [site_width(self.model(member), self.site) for member in MEMBERS]
        _check_widths(self.base, self.chat, self.site, *widths)
        return widths[0]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the activations of both, for content keys."""
        models: dict[str, Any] = {member: model_identity(self.model(member)) for member in MEMBERS}
        substitutes = {str(token_id): seen for token_id, seen in self.substitutes.items()}
        return {**models, "site": self.site, "base_token_map": substitutes, "skipped": self.skipped}

    @property
    def commits(self) -> dict[str, str]:
        return {name: commit for member in MEMBERS for name, commit in commits_of(self.model(member)).items()}

    def note(self) -> None:
        for member in MEMBERS:
            note_model(self.model(member))

    def pinned(self) -> dict[str, Any]:
        """As a plain node, with commits in the place of branches."""
        revisions = {f"revision_{member}": pinned_model(self.model(member))["revision"] for member in MEMBERS}
        return {**self.plain(), **revisions}


class ModelPair:
    """Both models on one device, frozen.

    Raises UserError, naming the two, where their widths, their tokenizers or their ids for ordinary text differ.
    """

    def __init__(
        self, base: LanguageModel, chat: LanguageModel, site: str, base_token_map: Mapping[int, int] | None = None
    ) -> None:
        self.base, self.chat, self.site = base, chat, site
        self.tokenizer = chat.tokenizer
        _check_widths(base.name, chat.name, site, base.width(site), chat.width(site))
        check_tokenizers(base.tokenizer, chat.tokenizer)
        self._seen_by_base = torch.arange(chat.vocab_size, device=base.device)
        for token_id, seen in (base_token_map or {}).items():
            if token_id >= chat.vocab_size or seen >= base.vocab_size:
                raise UserError(
                    f"pair.base_token_map: {{{token_id}: {seen}}} must lead from one of the {chat.vocab_size:,} tokens "
                    f"of the chat model to one of the {base.vocab_size:,} tokens of the base model."
                )
            self._seen_by_base[token_id] = seen

    @property
    def device(self) -> torch.device:
        return self.chat.device

    @property
    def d_model(self) -> int:
        return self.chat.width(self.site)

    @property
    def n_ctx(self) -> int:
        """The longest row that both read."""
        return min(self.base.n_ctx, self.chat.n_ctx)

    def base_ids(self, ids: Tensor) -> Tensor:
        """The ids that the base model sees. Raises UserError for one that it does not have."""
        seen = self._seen_by_base[ids.to(self._seen_by_base.device)]
        if self.chat.vocab_size > self.base.vocab_size and bool((wrong := seen >= self.base.vocab_size).any()):
            token_id = int(ids[wrong.to(ids.device)][0])
            raise UserError(
                f"pair.base: {self.base.name} has {self.base.vocab_size:,} tokens, and not the chat model's token "
                f"{self.tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id}). Say what it sees in its place: "
                f"pair.base_token_map={{{token_id}: <id>}}."
            )
        return seen

    @torch.no_grad()
    def capture(self, ids: Tensor, site: str | None = None) -> Tensor:
        """Activations of both at a site (None: the pair's), `[R, T]` -> `[R, T, 2, d]` in the models' dtype."""
        site = site or self.site
        return torch.stack([self.base.capture(self.base_ids(ids), site), self.chat.capture(ids, site)], dim=2)


def load_pair(node: Any) -> ModelPair:
    """The pair that the configuration group `pair` describes."""
    settings = pair_settings(node)
    base, chat = (load_language_model(settings.model(member)) for member in MEMBERS)
    return ModelPair(base, chat, settings.site, settings.substitutes)


def pair_settings(node: Any) -> PairSettings:
    """The checked settings of a group `pair`."""
    return PairSettings.of({str(name): node[name] for name in node})


def check_tokenizers(base: Any, chat: Any) -> None:
    """Raises UserError if the two give an id to different words, or different ids to the same text.

    A token that the tuned model renamed or added (for its template) is allowed, and said."""
    of_base = {number: token for token, number in base.get_vocab().items()}
    of_chat = {number: token for token, number in chat.get_vocab().items()}
    differing = sorted(number for number in of_base.keys() & of_chat.keys() if of_base[number] != of_chat[number])
    added = {*base.added_tokens_decoder, *chat.added_tokens_decoder}
    if words := [number for number in differing if number not in added]:
        number = words[0]
        raise UserError(
            f"pair: the tokenizers of {base.name_or_path!r} and {chat.name_or_path!r} are not the same: {len(words):,} "
            f"ids stand for different tokens, the first is {number}: {of_base[number]!r} and {of_chat[number]!r}. "
            "A crosscoder needs two models with one tokenizer."
        )
    if differing:
        names = ", ".join(f"{number}: {of_base[number]!r}, {of_chat[number]!r}" for number in differing[:5])
        say_once(f"pair: the chat model has other names for {len(differing):,} special tokens ({names}).")
    check_same_ids(base, chat, PROBE, "ordinary words")


def check_same_ids(base: Any, chat: Any, text: str, where: str) -> None:
    """Raises UserError that names the position and both tokens, if the tokenizers make different ids of a text."""
    ids = [list(t(text, add_special_tokens=False, verbose=False)["input_ids"]) for t in (base, chat)]
    if ids[0] == ids[1]:
        return
    n = min(map(len, ids))
    position = next((i for i in range(n) if ids[0][i] != ids[1][i]), n)
    tokens = [t.convert_ids_to_tokens(i[position]) if position < len(i) else None for t, i in zip((base, chat), ids)]  # noqa: B905
    numbers = [i[position] if position < len(i) else None for i in ids]
    raise UserError(
        f"pair: the tokenizers of {base.name_or_path!r} and {chat.name_or_path!r} make different ids of {where}: at "
        f"position {position} there is {tokens[0]!r} ({numbers[0]}) and {tokens[1]!r} ({numbers[1]}). "
        "A crosscoder needs two models with one tokenizer."
    )


def _check_widths(base: str, chat: str, site: str, width_base: int, width_chat: int) -> None:
    if width_base != width_chat:
        raise UserError(
            f"pair: {base} has {width_base} numbers at {site}, and {chat} has {width_chat}. A crosscoder needs two "
            "models of the same width."
        )
