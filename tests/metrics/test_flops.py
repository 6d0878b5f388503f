import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.errors import UserError
from core.metrics import flops

N, M, n = 16, 8, 1024  # the paper's sizes


@pytest.mark.parametrize(
    ("count", "published"),
    [
        (flops.sae_train_step(N, M, n, True, "paper"), 1_785_856),
        (flops.sae_train_step(N, M, n, False, "paper"), 1_392_640),
        (flops.mlp_train_step(N, M, 32, n, True, "paper"), 5_881_856),
        (flops.mlp_train_step(N, M, 32, n, False, "paper"), 5_488_640),
        (flops.mlp_train_step(N, M, 256, n, True, "paper"), 40_058_880),
        (flops.mlp_train_step(N, M, 1024, n, False, "paper"), 156_844_032),
        (flops.sc_train_step(N, M, n, "paper"), 52_477_952),
        (flops.sc_train_step_batch_once(N, M, n), 886_016),
        (flops.sae_inference(N, M, n), 540_672),
        (flops.mlp_inference(N, M, 32, n), 1_884_160),
        (flops.mlp_inference(N, M, 256, n), 13_123_584),
        (flops.optimise_codes(N, M, n, 1, "paper") - flops.optimise_codes(N, M, n, 0, "paper"), 720_896),
        (flops.optimise_codes(N, M, n, 10_000, "paper"), 7_209_107_456),
        (flops.sae_known_codes_step(N, M, 1, "paper"), 848),
        (flops.mlp_known_codes_step(N, M, 32, 1, "paper"), 4_848),
        (20_000 * flops.sae_known_codes_step(N, M, n, "paper"), 17_367_040_000),
    ],
)
def test_counts_are_those_behind_the_papers_figures_to_the_last_digit(count: float, published: int):
    assert count == published


def test_sparse_coding_is_charged_59_times_too_much():
    once = flops.sc_train_step_batch_once(N, M, n)
    assert flops.sc_train_step(N, M, n, "paper") / once == pytest.approx(59.2, abs=0.05)
    assert once / flops.sae_train_step(N, M, n, True, "paper") == pytest.approx(0.5, abs=0.01)


def test_corrected_sparse_coding_term_by_term():
    # Products: X_hat, gradients of S and D; exp and its derivative, penalty and its gradient; residual and its square.
    by_hand = 6 * M * N * n + 4 * N * n + 2 * M * n + 3 * M * N + 10 * (N * n + M * N)
    assert flops.sc_train_step(N, M, n, "corrected") == by_hand == 1_033_856
    # Against the authors' terms: 9 more per parameter for Adam, and no backward pass (6MN) through the normalisation.
    assert by_hand - flops.sc_train_step_batch_once(N, M, n) == 9 * (N * n + M * N) - 6 * M * N


def test_corrected_sae_term_by_term():
    by_hand = 10 * M * N * n + 4 * N * n + 2 * M * n + 3 * M * N + 10 * 2 * M * N
    assert flops.sae_train_step(N, M, n, True, "corrected") == by_hand == 1_395_584
    fixed = 8 * M * N * n + 4 * N * n + 2 * M * n + 10 * M * N
    assert flops.sae_train_step(N, M, n, False, "corrected") == fixed


def test_training_compute_ranks_sparse_coding_above_the_sae_as_published_and_below_it_corrected():
    ratio = {mode: flops.sc_train_step(N, M, n, mode) / flops.sae_train_step(N, M, n, True, mode) for mode in MODES}
    assert ratio["paper"] > 29 and ratio["corrected"] < 0.75


MODES: tuple[flops.Mode, ...] = ("paper", "corrected")


@pytest.mark.parametrize("count", [flops.sae_train_step, flops.sae_known_codes_step, flops.sc_train_step])
def test_weight_updates_cost_the_same_for_any_number_of_samples_only_when_corrected(count):
    learned = (True,) if count is flops.sae_train_step else ()

    def beyond_proportional(mode: flops.Mode) -> float:
        return 2 * count(N, M, n, *learned, mode) - count(N, M, 2 * n, *learned, mode)

    once_per_step = {  # an SAE: encoder and D with Adam, D normalised; encoder and bias; sparse coding: D
        flops.sae_train_step: 10 * 2 * M * N + 3 * M * N,
        flops.sae_known_codes_step: 10 * (M + 1) * N,
        flops.sc_train_step: 10 * M * N + 3 * M * N,
    }
    assert beyond_proportional("corrected") == once_per_step[count]
    if count is not flops.sc_train_step:
        assert beyond_proportional("paper") == 0


def test_known_codes_have_no_decoder_when_corrected():
    counted = flops.sae_known_codes_step(N, M, n, "corrected")
    assert counted == 4 * M * N * n + 4 * N * n + 7 * N * n + 10 * (M + 1) * N
    with_decoder = flops.sae_train_step(N, M, n, False, "paper")
    assert with_decoder - flops.sae_known_codes_step(N, M, n, "paper") == 4 * M * N * n


def test_cold_inference_under_a_known_dictionary_is_free_of_an_saes_training_only_when_corrected():
    codes = {mode: flops.optimise_codes(N, M, n, 100, mode) for mode in MODES}
    sae = {mode: 50 * flops.sae_train_step(N, M, n, False, mode) for mode in MODES}

    def ito(mode: flops.Mode, warm_start: bool) -> float:
        return flops.sae_ito(N, M, n, 50, n, 100, mode, learn_D=False, warm_start=warm_start)

    assert ito("paper", False) == ito("paper", True) == sae["paper"] + codes["paper"]
    assert ito("corrected", False) == codes["corrected"]
    assert ito("corrected", True) == sae["corrected"] + codes["corrected"] + (2 * M * N + N) * n
    learned = flops.sae_ito(N, M, n, 50, n, 100, "corrected", learn_D=True, warm_start=False)
    assert learned == 50 * flops.sae_train_step(N, M, n, True, "corrected") + codes["corrected"]


def test_optimised_codes_corrected_by_hand():
    per_iteration = 4 * M * N + 4 * N + 2 * M + 10 * N
    assert flops.optimise_codes(N, M, n, 1000, "corrected") == (1000 * per_iteration + N) * n


R = 3


def encoder(widths: list[int], bias: bool) -> list[torch.Tensor]:
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(R, i, o, requires_grad=True) for i, o in pairs]
    return weights + ([torch.randn(R, 1, o, requires_grad=True) for _, o in pairs] if bias else [])


def codes_of(X: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    weights = [p for p in parameters if p.shape[1] > 1]
    biases = [p for p in parameters if p.shape[1] == 1] or [torch.zeros(1)] * len(weights)
    for W, b in zip(weights, biases, strict=True):
        X = (torch.bmm(X, W) + b).relu()
    return X


def matmuls_of(terms: flops.Terms, counter: FlopCounterMode) -> tuple[float, float]:
    return R * terms.matmul, counter.get_total_flops()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learn_D", [False, True])
@pytest.mark.parametrize(("h", "sizes"), [(None, (16, 8, 64)), (None, (5, 7, 3)), (32, (16, 8, 64)), (4, (6, 9, 11))])
def test_products_of_a_training_step_are_those_that_torch_counts(
    h: int | None, sizes: tuple[int, int, int], learn_D: bool, bias: bool
):
    N, M, n = sizes
    X, D = torch.randn(R, n, M), torch.randn(R, N, M, requires_grad=learn_D)
    parameters = encoder([M, N] if h is None else [M, h, N], bias)
    with FlopCounterMode(display=False) as counter:
        S = codes_of(X, parameters)
        ((X - torch.bmm(S, D)).square().mean() + S.mean()).backward()
    net = flops._layer(M, N, n, bias, first=True) if h is None else flops._mlp(N, M, h, n, bias)
    terms = net + flops._reconstruction(N, M, n, learn_D)
    ours, torchs = matmuls_of(terms, counter)
    assert ours == torchs
    step = (
        flops.sae_train_step(N, M, n, learn_D, "corrected", bias)
        if h is None
        else flops.mlp_train_step(N, M, h, n, learn_D, "corrected", bias)
    )
    assert step == terms.total
    n_parameters = sum(p[0].numel() for p in [*parameters, *([D] if learn_D else [])])
    assert terms.adam == 10 * n_parameters


@pytest.mark.parametrize("learn_D", [False, True])
def test_products_of_sparse_coding_are_those_that_torch_counts(learn_D: bool):
    X, D = torch.randn(R, n, M), torch.randn(R, N, M, requires_grad=learn_D)
    L = torch.randn(R, n, N, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        S = L.exp()
        ((X - torch.bmm(S, D)).square().mean() + S.mean()).backward()
    terms = flops._log_codes(N, n) + flops._reconstruction(N, M, n, learn_D)
    ours, torchs = matmuls_of(terms, counter)
    assert ours == torchs
    assert flops.sc_train_step(N, M, n, "corrected", learn_D) == terms.total


@pytest.mark.parametrize("h", [None, 32])
def test_products_towards_known_codes_are_those_that_torch_counts(h: int | None):
    X, S = torch.randn(R, n, M), torch.rand(R, n, N)
    parameters = encoder([M, N] if h is None else [M, h, N], bias=True)
    with FlopCounterMode(display=False) as counter:
        (-torch.cosine_similarity(S, codes_of(X, parameters), dim=1).mean()).backward()
    net = flops._layer(M, N, n, True, first=True) if h is None else flops._mlp(N, M, h, n, True)
    ours, torchs = matmuls_of(net, counter)
    assert ours == torchs


def test_products_of_inference_are_those_that_torch_counts():
    X, D, h = torch.randn(1, n, M), torch.randn(1, N, M), 32
    for widths, count, units in (
        ([M, N], flops.sae_inference(N, M, n), N),
        ([M, h, N], flops.mlp_inference(N, M, h, n), h + N),
    ):
        weights = [torch.randn(1, i, o) for i, o in itertools.pairwise(widths)]
        with FlopCounterMode(display=False) as counter:
            torch.bmm(codes_of(X, weights), D)
        assert count - units * n == counter.get_total_flops()


def test_a_misspelt_mode_is_refused_by_name():
    with pytest.raises(UserError, match="'papr' must be paper or corrected"):
        flops.sc_train_step(N, M, n, "papr")  # type: ignore[arg-type]
