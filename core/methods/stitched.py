"""A dictionary made of parts of others, each with its own encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.input_norm import InputNorm
from core.kernels.codes import Codes, DenseCodes, SparseCodes, entries
from core.methods.dictionary import Dictionary
from core.methods.settings import rebuilt


class Stitched(Dictionary):
    """x_hat = b_dec + sum over parts p of f^p_S(x) W_dec^p[S] (Leask et al. 2025): of each part the latents S are kept.

    Every part encodes with all its latents under its own rule of inference; then those that are not kept are dropped.
    Latents are numbered part by part. It is made by `Stitched.of`, scored and stored as any dictionary is, and cannot
    be trained.

    parts   dictionaries, or their descriptions
    n_kept  latents kept of each
    """

    def __init__(self, parts: Sequence[Dictionary | Mapping[str, Any]], n_kept: Sequence[int]) -> None:
        built = [part if isinstance(part, Dictionary) else rebuilt(part) for part in parts]
        first = built[0]
        super().__init__()
        self.parts = nn.ModuleList(built)
        self.W_dec = nn.Parameter(torch.zeros(sum(n_kept), *first.input_shape))
        self.b_dec = nn.Parameter(torch.zeros(first.input_shape))
        self.norm = InputNorm(first.norm.kind, first.input_shape[:-1])
        self.norm.load_state_dict(first.norm.state_dict())
        for number, n in enumerate(n_kept):
            self.register_buffer(f"kept_{number}", torch.zeros(n, dtype=torch.int64))

    @classmethod
    def of(cls, parts: Sequence[tuple[Dictionary, Tensor]], b_dec: Tensor) -> Stitched:
        """Of each dictionary the latents that are True in its mask `[dict_size]`; b_dec `[d]`.

        Raises UserError if nothing is kept. That the parts fit together is for `core.analysis.stitching` to check."""
        kept = [mask.to(method.W_dec.device).nonzero().flatten() for method, mask in parts]
        if not sum(map(len, kept)):
            raise UserError("A stitched dictionary without latents: keep one at least.")
        stitched = cls([method for method, _ in parts], [len(index) for index in kept]).to(b_dec.device)
        chosen = list(zip((method for method, _ in parts), kept, strict=True))
        with torch.no_grad():
            for number, index in enumerate(kept):
                stitched.kept(number).copy_(index)
            stitched.W_dec.copy_(torch.cat([method.W_dec[index] for method, index in chosen]))
            stitched.b_dec.copy_(b_dec)
        return stitched.eval()

    def kept(self, number: int) -> Tensor:
        """int64 `[n_kept]`: which latents are kept of a part."""
        return self.get_buffer(f"kept_{number}")

    def require_sound(self) -> None:
        for number, part in enumerate(self._parts()):
            kept = self.kept(number)
            if not torch.equal(kept, kept.unique()) or (len(kept) and not 0 <= kept[0] <= kept[-1] < part.dict_size):
                raise UserError(f"kept_{number} is no rising list of latents of its part, which has {part.dict_size}.")
            part.require_sound()

    def encode(self, x: Tensor) -> Codes:
        found: list[Codes] = [part.encode(x) for part in self._parts()]
        if all(isinstance(codes, DenseCodes) for codes in found):
            return DenseCodes(torch.cat([codes.dense()[:, self.kept(i)] for i, codes in enumerate(found)], 1))
        places, values, first = [], [], 0
        for number, codes in enumerate(found):
            kept = self.kept(number)
            column = torch.full((codes.shape[1],), -1, device=x.device)
            column[kept] = torch.arange(first, first + len(kept), device=x.device)
            rows, cols, value = entries(codes)
            here = column[cols] >= 0
            places.append(rows[here] * self.dict_size + column[cols][here])
            values.append(value[here])
            first += len(kept)
        place, order = torch.cat(places).sort()
        rows = place.div(self.dict_size, rounding_mode="floor")
        return SparseCodes(rows, place - rows * self.dict_size, torch.cat(values)[order], (x.shape[0], self.dict_size))

    def hyperparameters(self) -> dict[str, Any]:
        parts = self._parts()
        return {"parts": [p.description() for p in parts], "n_kept": [len(self.kept(i)) for i in range(len(parts))]}

    def _parts(self) -> list[Dictionary]:
        return [part for part in self.parts if isinstance(part, Dictionary)]
