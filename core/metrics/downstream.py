"""The effect of a reconstruction on the language model that continues from it: cross-entropies and KL, from sums.

Shapes: R rows, T tokens in a row, V = vocabulary. The first T - 1 positions of a row are scored, which have a next
token to predict. All losses are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """(spliced - ablated) / (clean - ablated): 1 where splicing costs nothing, 0 where it costs as much as ablating.

    None if ablating changes nothing, so that there is nothing to recover.
    """
    return None if clean == ablated else (spliced - ablated) / (clean - ablated)


@dataclass(frozen=True)
class SplicedSums:
    """Sums over scored tokens, fp64 scalars on the logits' device; `a + b` is the sums of both sets of rows."""

    n_tokens: int
    clean: Tensor  # sum of the next token's cross-entropies with unchanged activations
    spliced: Tensor  # the same with reconstructions instead
    kl: Tensor  # sum of KL(clean || spliced)

    @classmethod
    def of(cls, clean_logits: Tensor, spliced_logits: Tensor, tokens: Tensor) -> SplicedSums:
        """The sums of one batch: logits `[R, T, V]` twice, tokens `[R, T]`. Row by row, to save memory."""
        zero = torch.zeros((), dtype=torch.float64, device=clean_logits.device)
        clean, spliced, kl = zero.clone(), zero.clone(), zero.clone()
        for row_clean, row_spliced, row in zip(clean_logits, spliced_logits, tokens, strict=True):
            log_p = row_clean[:-1].float().log_softmax(-1)  # [T - 1, V]
            log_q = row_spliced[:-1].float().log_softmax(-1)
            target = row[1:]
            clean += F.nll_loss(log_p, target, reduction="none").double().sum()
            spliced += F.nll_loss(log_q, target, reduction="none").double().sum()
            kl += F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum()
        return cls(tokens[:, 1:].numel(), clean, spliced, kl)

    def __add__(self, other: SplicedSums) -> SplicedSums:
        return SplicedSums(
            self.n_tokens + other.n_tokens,
            self.clean + other.clean,
            self.spliced + other.spliced,
            self.kl + other.kl,
        )

    def metrics(self, zero_ablated: float, mean_ablated: float) -> dict[str, float]:
        """Per-token means, given those of the two ablations (nats per token, on the same rows).

        `ce_degradation` is spliced - clean, positive if the model got worse (the BatchTopK authors' code logs its
        negative). There is no recovery ratio if its ablation changes nothing.
        """
        clean, spliced = self.clean.item() / self.n_tokens, self.spliced.item() / self.n_tokens
        metrics = {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_zero_ablated": zero_ablated,
            "ce_mean_ablated": mean_ablated,
            "ce_degradation": spliced - clean,
            "kl_nats_per_token": self.kl.item() / self.n_tokens,
            "n_downstream_tokens": float(self.n_tokens),
        }
        for name, ablated in (("ce_recovered_zero", zero_ablated), ("ce_recovered_mean", mean_ablated)):
            ratio = recovered(clean, spliced, ablated)
            if ratio is not None:
                metrics[name] = ratio
        return metrics
