"""SAE, MLP encoder and LCA on a language model's activations (O'Neill et al. 2025, the GPT-2 section)."""

from __future__ import annotations

from omegaconf import DictConfig

from core.analysis.evaluate import evaluate_dictionary
from core.errors import UserError
from core.fleet import Request
from core.methods.base import DictionaryMethod
from core.methods.lca import LCA
from core.methods.mlp_encoder import MLPEncoder
from core.methods.relu_l1 import ReluL1
from core.metrics.flops import mlp_train_step, sae_train_step
from experiments.common import held_out, requests, trained


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell."""
    return requests(cfg)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train one dictionary and score it on held-out text. `fvu` is the paper's normalised MSE, with the mean of all
    held-out tokens instead of the batch's.

    Claims: oneill/llm-1 to -6 compare these cells with each other.
    """
    method = trained(cfg)
    step_flops = train_step_flops(method, cfg.stream.batch_size)  # fails for a method that has no count
    metrics = evaluate_dictionary(method, held_out(cfg)).metrics()
    n_steps = -(-cfg.stream.n_tokens // cfg.stream.batch_size)
    return {
        **metrics,
        "alive_fraction": 1 - metrics["dead_fraction"],
        **atom_norms(method),
        "train_flops": n_steps * step_flops,
    }


def atom_norms(method: DictionaryMethod) -> dict[str, float]:
    """Smallest, mean and largest norm of an atom, a row of W_dec."""
    norms = method.W_dec.detach().norm(dim=1)
    return {
        "atom_norm_min": norms.min().item(),
        "atom_norm_mean": norms.mean().item(),
        "atom_norm_max": norms.max().item(),
    }


def train_step_flops(method: DictionaryMethod, batch_size: int) -> float:
    """Of one step with dense products (`core.metrics.flops`, corrected). LCA: products alone, of all its iterations, so
    an upper bound where rows come to rest before."""
    m, d = method.dict_size, method.d_model
    if isinstance(method, LCA):
        n = min(method.rows_per_step, batch_size)
        iterations, unrolled = method.n_iterations, method.dictionary_gradient == "unrolled"
        return 2.0 * n * d * m * (3 * iterations * (3 if unrolled else 1) + 2)
    if isinstance(method, MLPEncoder):
        return mlp_train_step(m, d, len(method.b_hid), batch_size, True, "corrected", bias=True)
    if isinstance(method, ReluL1):
        return sae_train_step(m, d, batch_size, True, "corrected", bias=True)
    raise UserError(f"method: {type(method).__name__} is not one of oneill_sae, oneill_mlp, lca.")
