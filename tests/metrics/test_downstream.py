import math

import pytest
import torch
import torch.nn.functional as F

from core.metrics.downstream import SplicedSums, recovered


def random_logits(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(6, 5, 11, generator=g),
        torch.randn(6, 5, 11, generator=g),
        torch.randint(11, (6, 5), generator=g),
    )


def test_losses_and_kl_by_hand():
    # One row of two tokens: position 0 predicts token 1. Clean p = (3/4, 1/4), spliced q = (1/2, 1/2).
    clean = torch.tensor([[[3.0, 1.0], [9.0, 9.0]]]).log()
    spliced = torch.tensor([[[1.0, 1.0], [9.0, 1.0]]]).log()
    sums = SplicedSums.of(clean, spliced, torch.tensor([[0, 1]]))
    found = sums.metrics(zero_ablated=2.0, mean_ablated=1.5)
    assert sums.n_tokens == 1
    assert found["ce_clean"] == pytest.approx(math.log(4))
    assert found["ce_spliced"] == pytest.approx(math.log(2))
    assert found["ce_degradation"] == pytest.approx(-math.log(2))  # here the reconstruction happens to help
    assert found["kl_nats_per_token"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found["ce_recovered_zero"] == pytest.approx((math.log(2) - 2) / (math.log(4) - 2))
    assert found["ce_recovered_mean"] == pytest.approx((math.log(2) - 1.5) / (math.log(4) - 1.5))


def test_losses_and_kl_against_torch_over_the_whole_batch():
    clean, spliced, tokens = random_logits(0)
    sums = SplicedSums.of(clean, spliced, tokens)
    flat = [part[:, :-1].flatten(0, 1) for part in (clean, spliced)]
    target = tokens[:, 1:].flatten()
    kl = F.kl_div(flat[1].log_softmax(-1), flat[0].softmax(-1), reduction="batchmean")
    found = sums.metrics(10.0, 10.0)
    assert found["ce_clean"] == pytest.approx(F.cross_entropy(flat[0], target).item(), rel=1e-5)
    assert found["ce_spliced"] == pytest.approx(F.cross_entropy(flat[1], target).item(), rel=1e-5)
    assert found["kl_nats_per_token"] == pytest.approx(kl.item(), rel=1e-5)
    assert found["n_downstream_tokens"] == 24


def test_sums_do_not_depend_on_how_rows_are_cut_into_batches():
    clean, spliced, tokens = random_logits(1)
    whole = SplicedSums.of(clean, spliced, tokens)
    parts = SplicedSums.of(clean[:1], spliced[:1], tokens[:1]) + SplicedSums.of(clean[1:], spliced[1:], tokens[1:])
    assert parts.metrics(9.0, 8.0) == pytest.approx(whole.metrics(9.0, 8.0), rel=1e-12)


def test_an_identical_model_loses_nothing_and_recovers_everything():
    clean, _, tokens = random_logits(2)
    found = SplicedSums.of(clean, clean, tokens).metrics(9.0, 8.0)
    assert found["ce_degradation"] == 0
    assert found["kl_nats_per_token"] == 0
    assert found["ce_recovered_zero"] == found["ce_recovered_mean"] == 1


def test_recovery_is_zero_at_the_ablation_and_undefined_where_ablating_changes_nothing():
    assert recovered(clean=1.0, spliced=3.0, ablated=3.0) == 0
    assert recovered(clean=2.0, spliced=3.0, ablated=2.0) is None
    clean, spliced, tokens = random_logits(3)
    sums = SplicedSums.of(clean, spliced, tokens)
    found = sums.metrics(zero_ablated=sums.clean.item() / sums.n_tokens, mean_ablated=99.0)
    assert "ce_recovered_zero" not in found
    assert all(math.isfinite(value) for value in found.values())
