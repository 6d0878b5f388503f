"""The cost of O'Neill et al.'s methods at a step: (FLOPs of training so far, FLOPs of one inference of the test set).

Every function takes the configuration first, and the step (or iteration) and the mode of counting last.
"""

from __future__ import annotations

from omegaconf import DictConfig

from core.metrics import flops

FREE = ("sc", "sc_relu")  # kinds of coders whose codes are parameters; test codes are optimised afterwards


def training(cfg: DictConfig, learn_D: bool, step: int, mode: flops.Mode) -> tuple[float, float]:
    s, c = cfg.source, cfg.coder
    N = c.N or s.N
    if c.kind in FREE:
        per_step = flops.sc_train_step(N, s.M, s.n_train, mode)
        return step * per_step, flops.optimise_codes(N, s.M, s.n_test, cfg.inference.iterations, mode)
    if c.kind == "mlp":
        per_step = flops.mlp_train_step(N, s.M, c.width, s.n_train, learn_D, mode, c.bias)
        return step * per_step, flops.mlp_inference(N, s.M, c.width, s.n_test)
    return step * flops.sae_train_step(N, s.M, s.n_train, learn_D, mode, c.bias), flops.sae_inference(N, s.M, s.n_test)


def with_ito(cfg: DictConfig, step: int, mode: flops.Mode) -> tuple[float, float]:
    so_far, _ = training(cfg, True, step, mode)
    s = cfg.source
    return so_far, flops.optimise_codes(s.N, s.M, s.n_test, cfg.inference.iterations, mode)


def warm_ito(cfg: DictConfig, step: int, mode: flops.Mode) -> tuple[float, float]:
    s = cfg.source
    total = flops.sae_ito(s.N, s.M, s.n_train, cfg.steps, s.n_test, step, mode, learn_D=False, warm_start=True)
    so_far, _ = training(cfg, False, cfg.steps, mode)
    return so_far, total - so_far


def solver(cfg: DictConfig, step: int, mode: flops.Mode) -> tuple[float, float]:
    """Iterations of ITO, plus the SAE's training at the same index where the paper charges it; other solvers cost 0."""
    s = cfg.source
    if cfg.coder.solver.kind != "ito":
        return 0.0, 0.0
    codes = flops.optimise_codes(s.N, s.M, s.n_test, step, mode)
    total = flops.sae_ito(s.N, s.M, s.n_train, step, s.n_test, step, mode, learn_D=False, warm_start=False)
    return total - codes, codes


def known_codes(cfg: DictConfig, batch_size: int, step: int, mode: flops.Mode) -> tuple[float, float]:
    """Steps on `batch_size` samples each. Neither training nor inference has a decoder."""
    s, c = cfg.source, cfg.coder
    decoder = 2 * s.M * s.N * s.n_test
    if c.kind == "mlp":
        per_step = flops.mlp_known_codes_step(s.N, s.M, c.width, batch_size, mode, c.bias)
        return step * per_step, flops.mlp_inference(s.N, s.M, c.width, s.n_test) - decoder
    per_step = flops.sae_known_codes_step(s.N, s.M, batch_size, mode, c.bias)
    return step * per_step, flops.sae_inference(s.N, s.M, s.n_test) - decoder
