"""SAE, MLP encoder and LCA on a language model's activations (O'Neill et al. 2025, the GPT-2 section)."""

from __future__ import annotations

from omegaconf import DictConfig

from core.analysis.evaluate import evaluate_dictionary
from core.fleet import Request
from core.methods.dictionary import Dictionary
from experiments.common import held_out, is_loaded, requests, trained
from experiments.oneill.settings import LLMSettings

SETTINGS = LLMSettings


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell."""
    return requests(cfg)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train one dictionary and score it on held-out text. `fvu` is the paper's normalised MSE, with the mean of all
    held-out tokens instead of the batch's. A dictionary that is loaded is scored, without the operations of a training.

    Claims: oneill/llm-1 to -6 compare these cells with each other.
    """
    method = trained(of_any_size(cfg))
    flops = {} if is_loaded(cfg.method) else train_flops(cfg, method)
    metrics = evaluate_dictionary(method, held_out(cfg)).metrics()
    return {**metrics, "alive_fraction": 1 - metrics["dead_fraction"], **atom_norms(method), **flops}


def of_any_size(cfg: DictConfig) -> DictConfig:
    """The configuration; a dictionary that is loaded need not have the size that this experiment trains."""
    if not is_loaded(cfg.method) or cfg.method.dict_size != cfg["at"].dict_size[cfg.scale]:
        return cfg
    changed = cfg.copy()
    changed.method.dict_size = None
    return changed


def train_flops(cfg: DictConfig, method: Dictionary) -> dict[str, float]:
    """Operations of the training. Raises UserError for a method that has no count."""
    n_steps = -(-cfg.stream.n_tokens // cfg.stream.batch_size)
    return {"train_flops": n_steps * method.train_step_flops(cfg.stream.batch_size)}


def atom_norms(method: Dictionary) -> dict[str, float]:
    """Smallest, mean and largest norm of an atom, a row of W_dec."""
    norms = method.W_dec.detach().norm(dim=1)
    return {
        "atom_norm_min": norms.min().item(),
        "atom_norm_mean": norms.mean().item(),
        "atom_norm_max": norms.max().item(),
    }
