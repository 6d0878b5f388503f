"""SAE, MLP encoder and LCA on a language model's activations (O'Neill et al. 2025, the GPT-2 section)."""

from __future__ import annotations

from omegaconf import DictConfig

from core.analysis.evaluate import evaluate_dictionary
from core.fleet import Request
from core.methods.dictionary import Dictionary
from experiments.common import held_out, requests, trained
from experiments.oneill.settings import LLMSettings

SETTINGS = LLMSettings


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell."""
    return requests(cfg)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train one dictionary and score it on held-out text. `fvu` is the paper's normalised MSE, with the mean of all
    held-out tokens instead of the batch's.

    Claims: oneill/llm-1 to -6 compare these cells with each other.
    """
    method = trained(cfg)
    step_flops = method.train_step_flops(cfg.stream.batch_size)  # fails for a method that has no count
    metrics = evaluate_dictionary(method, held_out(cfg)).metrics()
    n_steps = -(-cfg.stream.n_tokens // cfg.stream.batch_size)
    return {
        **metrics,
        "alive_fraction": 1 - metrics["dead_fraction"],
        **atom_norms(method),
        "train_flops": n_steps * step_flops,
    }


def atom_norms(method: Dictionary) -> dict[str, float]:
    """Smallest, mean and largest norm of an atom, a row of W_dec."""
    norms = method.W_dec.detach().norm(dim=1)
    return {
        "atom_norm_min": norms.min().item(),
        "atom_norm_mean": norms.mean().item(),
        "atom_norm_max": norms.max().item(),
    }
