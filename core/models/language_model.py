"""A causal language model as the experiments use it: read a site, edit a site, logits and losses.

Activations are those of Hugging Face, unchanged. TransformerLens centres GPT-2's over d, by changing every weight that
writes to the residual stream; here `InputNorm("token_center")` can do that afterwards.
Shapes: R rows of T tokens, V = vocabulary, width = the size of the site (d_model, or the MLP's hidden size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError
from core.models.loading import Settings, load_pretrained
from core.models.sites import FAMILIES, Tap, attach, blocks_skipped, locate, parse_site

HEAD_BYTES = 2**28  # token_losses computes at most this many bytes of fp32 logits at a time


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """Replace the activations at a site; the rest of the model uses the new ones.

    positions  None: all positions; `fn` maps `[R, T, width]` to the same shape. Or a bool mask `[R, T]`, or a
               LongTensor `[n]` of positions in every row (negative ones count from the end): `fn` then gets only the
               chosen activations, `[n_chosen, width]` in row-major order, and is not called if there are none.
    """

    site: str
    fn: Callable[[Tensor], Tensor]
    positions: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """`[R, T, width]` -> the same, edited."""
        if self.positions is None:
            return self._replacement(x)
        mask = self._mask(self.positions.to(x.device), *x.shape[:2])  # [R, T]
        if not mask.any():
            return x
        edited = x.clone()
        edited[mask] = self._replacement(x[mask])
        return edited

    def _replacement(self, x: Tensor) -> Tensor:
        new = self.fn(x)
        if new.shape != x.shape:
            raise ValueError(f"Edit of {self.site}: fn turned {tuple(x.shape)} into {tuple(new.shape)}.")
        return new.to(x.dtype)

    @staticmethod
    def _mask(positions: Tensor, n_rows: int, n_tokens: int) -> Tensor:
        if positions.dtype == torch.bool:
            if positions.shape != (n_rows, n_tokens):
                raise ValueError(f"Edit.positions: a mask {tuple(positions.shape)} for rows {(n_rows, n_tokens)}.")
            return positions
        if positions.dtype != torch.long or positions.dim() != 1:
            raise ValueError("Edit.positions must be a bool mask [R, T] or a LongTensor [n] of positions.")
        if positions.numel() and not (-n_tokens <= int(positions.min()) and int(positions.max()) < n_tokens):
            raise ValueError(f"Edit.positions: {positions.tolist()} are outside rows of {n_tokens} tokens.")
        mask = torch.zeros(n_rows, n_tokens, dtype=torch.bool, device=positions.device)
        mask[:, positions] = True
        return mask


class _Reached(BaseException):
    """Raised at a site to stop the forward pass. Not an Exception, so that the model's own code does not catch it."""


class LanguageModel:
    """A Hugging Face causal LM of one of the `FAMILIES`, frozen and in evaluation mode, with its tokenizer.

    Not an nn.Module, so that no method or trainer registers its weights.
    revision  the commit of a model from the hub, None for a local one
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, revision: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name, self.revision = tokenizer, name, revision
        self.family: str = model.config.model_type
        if self.family not in FAMILIES:
            raise UserError(f"model: {name} is a {self.family}; supported: {', '.join(FAMILIES)}.")
        self.d_model: int = model.config.hidden_size
        self.n_layers: int = model.config.num_hidden_layers
        self.n_ctx: int = model.config.max_position_embeddings
        self.vocab_size: int = model.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def width(self, site: str) -> int:
        """The size of an activation at a site."""
        parsed = parse_site(site, self.n_layers)
        if parsed.kind != "mlp_hidden":
            return self.d_model
        return self._tap(site).module.get_parameter("weight").numel() // self.d_model

    @torch.no_grad()
    def capture(self, tokens: Tensor, site: str) -> Tensor:
        """Activations at a site, `[R, T]` -> `[R, T, width]` in the model's dtype. Nothing after the site is computed.

        Inside `edited`, these are the edited activations.
        """
        captured: list[Tensor] = []

        def stop(x: Tensor) -> None:
            captured.append(x)
            raise _Reached

        handle = attach(self._tap(site), stop)
        try:
            self.model.base_model(input_ids=self._checked(tokens), use_cache=False)
        except _Reached:
            return captured.pop()
        finally:
            handle.remove()
        raise RuntimeError(f"The forward pass of {self.name} did not reach {site}.")

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """Apply an edit to every forward pass in the block. Nested edits of one site apply from the outside in."""
        handle = attach(self._tap(edit.site), edit.apply)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def logits(self, tokens: Tensor, edit: Edit | None = None, last: int = 0) -> Tensor:
        """`[R, T]` -> `[R, T, V]`, in the model's dtype. If `last` > 0, only for the last `last` positions."""
        with self.edited(edit) if edit else nullcontext():
            return self.model(input_ids=self._checked(tokens), use_cache=False, logits_to_keep=last).logits

    @torch.no_grad()
    def logits_with(self, x: Tensor, tokens: Tensor, site: str, last: int = 0) -> Tensor:
        """`logits`, with x `[R, T, width]` as the activations at a site. On the residual stream, which is all that the
        rest of the model sees, nothing before the site is computed."""
        parsed, edit = parse_site(site, self.n_layers), Edit(site, lambda _: x)
        if not parsed.on_residual_stream:
            return self.logits(tokens, edit, last)
        with blocks_skipped(self.model, self.family, parsed):
            return self.logits(tokens, edit, last)

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, edit: Edit | None = None) -> Tensor:
        """Next-token losses in nats, fp32: `[R, T]` -> `[R, T - 1]`; entry t is the loss of predicting token t + 1.

        The blocks, and so an edit, see all rows at once. The head works on a few positions at a time, since the logits
        of a large vocabulary take much more memory than everything else.
        """
        tokens = self._checked(tokens)
        with self.edited(edit) if edit else nullcontext():
            hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        hidden, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()  # [R (T - 1), d], [R (T - 1)]
        size = max(1, HEAD_BYTES // (4 * self.vocab_size))
        losses = [
            F.cross_entropy(self._head(h).float(), t, reduction="none")
            for h, t in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(losses).view(len(tokens), -1)

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states `[n, d]`. Gemma 2 caps them smoothly at +-c: c tanh(logits / c)."""
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _tap(self, site: str) -> Tap:
        return locate(self.model, self.family, parse_site(site, self.n_layers))

    def _checked(self, tokens: Tensor) -> Tensor:
        """Rows on the model's device. Checked first, since a wrong id on a GPU would make the device unusable."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be rows [R, T], not of shape {tuple(tokens.shape)}.")
        if tokens.shape[1] > self.n_ctx:
            raise UserError(
                f"n_ctx: the rows have {tokens.shape[1]} tokens, but {self.name} reads at most {self.n_ctx}."
            )
        worst = [n for n in (tokens.min(), tokens.max()) if not 0 <= n < self.vocab_size] if tokens.numel() else []
        if worst:
            raise UserError(
                f"tokens: id {int(worst[-1])} is not in the vocabulary of {self.name}, which has {self.vocab_size:,}. "
                "Is the tokenizer that of another model?"
            )
        return tokens.to(self.device)


def load_language_model(cfg: Any) -> LanguageModel:
    """The model that the configuration group `model` describes (see `core.models.loading.Settings`)."""
    settings = Settings.of(cfg)
    return LanguageModel(*load_pretrained(settings))
