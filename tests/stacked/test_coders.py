"""Gradients written out are autograd's, and a run in a stack comes out as it would alone."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from core.stacked.coders import Coder, LinearCoder, LogCodes, MLPCoder, ReluCodes, keep_largest_
from core.stacked.objectives import KnownCodes, Objective, Reconstruction, normalise_, random_dictionary

R, n, M, N, h = 3, 40, 5, 9, 6
K = torch.tensor([2, 4, 9])
SEEDS = (0, 1, 2)


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(R, n, M, generator=g), torch.rand(R, n, N, generator=g)


def coder_of(kind: str, seeds=SEEDS, k: Tensor | None = None) -> Coder:
    if kind == "linear":
        return LinearCoder(seeds, M, N, bias=True, k=k)
    if kind == "mlp":
        return MLPCoder(seeds, M, N, h, bias=True, k=k)
    if kind == "relu":
        return ReluCodes(seeds, M, N, n, k=k)
    coder = LogCodes(seeds, M, N, n, init=-1.0, k=k)
    noise = [torch.randn(n, N, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    coder.L.data.add_(torch.stack(noise))
    return coder


def codes_by_autograd(coder: Coder, X: Tensor) -> Tensor:
    """The same codes from plain operations that autograd follows."""
    if isinstance(coder, LinearCoder):
        S = torch.relu(X @ coder.W_enc + coder.b_enc)
    elif isinstance(coder, MLPCoder):
        S = torch.relu(torch.relu(X @ coder.W_1 + coder.b_1) @ coder.W_2 + coder.b_2)
    else:
        S = coder.L.relu() if isinstance(coder, ReluCodes) else coder.L.exp()
    if coder.k is not None:
        kept = torch.zeros_like(S)
        for r, k in enumerate(coder.k.tolist()):
            kept[r].scatter_(1, S[r].topk(k, dim=1).indices, 1.0)
        S = S * kept
    return S


def assert_gradients(parameters, loss: Tensor) -> None:
    by_hand = [p.grad.clone() for p in parameters]
    for ours, theirs in zip(by_hand, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("kind", ["linear", "mlp", "log", "relu"])
def test_gradients_of_the_reconstruction_are_autograds(kind, k, bias):
    X, _ = data()
    coder, l1 = coder_of(kind, k=k), torch.tensor([0.0, 0.3, 2.0])
    objective = Reconstruction(X, l1, random_dictionary(SEEDS, N, M), learn_D=True, bias=bias)
    if bias:
        objective.b_dec.data.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        objective.gradients(coder, 0)
        loss = objective.loss()
    assert torch.allclose(objective.D.norm(dim=-1), torch.ones(R, N))
    S = codes_by_autograd(coder, X)
    again = (S @ objective.D - objective.explained_by_codes(X)).square().mean((1, 2)) + l1 * S.abs().mean((1, 2))
    torch.testing.assert_close(loss, again.detach())
    assert_gradients([*objective.parameters(), *coder.parameters()], again.sum())


@pytest.mark.parametrize("objective", ["cosine", "mse"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gradients_towards_known_codes_are_autograds(kind, objective):
    X, S = data()
    coder, known = coder_of(kind), KnownCodes(lambda step: (X, S), objective)
    with torch.no_grad():
        known.gradients(coder, 0)
        loss = known.loss()
    S_hat = codes_by_autograd(coder, X)
    if objective == "cosine":
        again = -cosine_similarity(S, S_hat, dim=1, eps=0).nan_to_num(0).mean(1)
    else:
        again = (S - S_hat).square().mean((1, 2))
    torch.testing.assert_close(loss, again.detach())
    assert_gradients(list(coder.parameters()), again.sum())


def test_a_unit_that_never_fires_has_no_gradient_and_no_cosine():
    X, S = data()
    coder, objective = coder_of("linear"), KnownCodes(lambda step: (X, S))
    coder.b_enc.data[:, :, 4] = -100.0
    with torch.no_grad():
        objective.gradients(coder, 0)
        before = objective.loss()
    assert before.isfinite().all() and not coder.W_enc.grad[:, :, 4].any()
    S_hat = codes_by_autograd(coder, X)
    rest = [j for j in range(N) if j != 4]
    expected = -cosine_similarity(S, S_hat, dim=1, eps=0)[:, rest].sum(1) / N
    torch.testing.assert_close(before, expected.detach())


def test_a_frozen_dictionary_gets_no_gradient_and_keeps_its_norms():
    X, _ = data()
    D = 3 * normalize(random_dictionary(SEEDS, N, M), dim=-1)
    objective = Reconstruction(X, torch.zeros(R), D, learn_D=False)
    with torch.no_grad():
        objective.gradients(coder_of("linear"), 0)
    assert objective.D.grad is None and torch.equal(objective.D, D)


def trained(kind: str, seeds, X: Tensor, l1: Tensor, k: Tensor | None) -> tuple[Coder, Objective]:
    coder = coder_of(kind, seeds, k)
    objective = Reconstruction(X, l1, random_dictionary(seeds, N, M), learn_D=True)
    adam = torch.optim.Adam([*coder.parameters(), *objective.parameters()], lr=1e-2, fused=True)
    with torch.no_grad():
        for step in range(60):
            objective.gradients(coder, step)
            adam.step()
    return coder, objective


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("kind", ["linear", "mlp", "log", "relu"])
def test_a_stack_trains_every_run_as_it_would_alone(kind, k):
    X, _ = data()
    l1 = torch.tensor([0.0, 0.1, 1.0])
    coder, objective = trained(kind, SEEDS, X, l1, k)
    for r, seed in enumerate(SEEDS):
        alone, alone_objective = trained(kind, [seed], X[r : r + 1], l1[r : r + 1], None if k is None else k[r : r + 1])
        torch.testing.assert_close(objective.D[r], alone_objective.D[0], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(coder.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours[r], theirs[0], rtol=1e-5, atol=1e-5)


def test_a_stack_equals_torchs_own_layers_under_autograd_and_plain_adam():
    X, _ = data()
    coder, objective = trained("mlp", [7], X[:1], torch.tensor([0.1]), None)
    start = coder_of("mlp", [7])
    first, second = torch.nn.Linear(M, h), torch.nn.Linear(h, N)
    for layer, W, b in ((first, start.W_1, start.b_1), (second, start.W_2, start.b_2)):
        layer.weight.data, layer.bias.data = W[0].mT.clone().contiguous(), b[0, 0].clone()
    D = torch.nn.Parameter(random_dictionary([7], N, M)[0].clone())
    adam = torch.optim.Adam([*first.parameters(), *second.parameters(), D], lr=1e-2, foreach=False, fused=False)
    for _ in range(60):
        normalise_(D)
        S = torch.relu(second(torch.relu(first(X[0]))))
        loss = (S @ D - X[0]).square().mean() + 0.1 * S.abs().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.testing.assert_close(objective.D[0], D, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coder.W_2[0], second.weight.mT, rtol=1e-4, atol=1e-5)


def test_the_largest_k_are_kept_run_by_run():
    S = torch.tensor([[[3.0, 1.0, 2.0]], [[3.0, 1.0, 2.0]]])
    kept = keep_largest_(S, torch.tensor([1, 2]), torch.empty_like(S))
    assert kept.tolist() == [[[3.0, 0.0, 0.0]], [[3.0, 0.0, 2.0]]]


@pytest.mark.parametrize("equal", [False, True])
def test_what_is_kept_of_a_run_is_what_topk_keeps_and_equals_of_the_smallest(equal):
    k = torch.tensor([1, 4, 7, 12])
    S = torch.rand(4, 50, 12, generator=torch.Generator().manual_seed(0))
    if equal:
        S = (5 * S).floor()
    kept = keep_largest_(S.clone(), k, torch.empty_like(S))
    for run, n in enumerate(k.tolist()):
        smallest = S[run].topk(n, dim=-1).values[:, -1:]
        assert torch.equal(kept[run], S[run] * (S[run] >= smallest))


def test_layers_start_in_the_range_of_torchs_linear_and_differ_between_seeds():
    coder = LinearCoder([0, 1, 0], 16, 400)
    W = coder.W_enc.detach()
    assert torch.equal(W[0], W[2]) and not torch.equal(W[0], W[1])
    assert W.abs().max() <= 0.25 and abs(float(W.std()) - 0.25 / 3**0.5) < 0.01
