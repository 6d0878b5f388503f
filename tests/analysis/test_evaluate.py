from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from core.analysis.evaluate import evaluate_compat, evaluate_dictionaries, evaluate_dictionary
from core.analysis.held_out import HeldOut, downstream_reference, n_compat_rows
from core.errors import UserError
from core.input_norm import InputNorm
from core.kernels.codes import DenseCodes, SparseCodes
from core.methods.batchtopk import BatchTopK
from core.models.language_model import Edit, LanguageModel

SITE, D, BOS, R, T = "resid_pre.1", 16, 0, 24, 8


class Toy(nn.Module):
    """Batch top k of relu(x W_enc^T + b) in training, a fixed threshold in evaluation; counts its calls in training."""

    def __init__(self, W_enc: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor, k: int, norm: str) -> None:
        super().__init__()
        self.W_enc, self.W_dec, self.b_dec = nn.Parameter(W_enc), nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.k, self.norm = k, InputNorm(norm)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("n_calls", torch.tensor(0))

    def encode(self, x: torch.Tensor) -> SparseCodes | DenseCodes:
        a = (x @ self.W_enc.T).relu()
        if not self.training:
            return DenseCodes(a * (a > self.threshold))
        self.n_calls += 1
        self.threshold.mul_(0.9)
        rows, cols = (a >= a.flatten().topk(self.k * len(a)).values[-1]).nonzero(as_tuple=True)
        return SparseCodes(rows, cols, a[rows, cols], tuple(a.shape))

    def decode(self, codes: SparseCodes | DenseCodes) -> torch.Tensor:
        return codes.dense() @ self.W_dec + self.b_dec

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        x_n, shift = self.norm(x)
        x_hat = self.decode(self.encode(x_n.flatten(0, -2))).view(x.shape)
        return self.norm.undo(x_hat, shift)


def toy(seed: int = 0, norm: str = "token_std", k: int = 4) -> Toy:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(40, D, generator=g)
    W = W / W.norm(dim=-1, keepdim=True)
    return Toy(W, W.clone(), 0.1 * torch.randn(D, generator=g), k, norm)


def constant(value: torch.Tensor) -> Toy:
    return Toy(torch.zeros(3, D), torch.zeros(3, D), value, k=1, norm="none")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": 50, "n_positions": T, "n_embd": D, "n_layer": 3, "n_head": 2}
        config = GPT2Config(**size, initializer_range=0.3, bos_token_id=BOS, eos_token_id=BOS)
        model = GPT2LMHeadModel(config)
    words = {"<|endoftext|>": BOS, **{f"w{i}": i for i in range(1, 50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return LanguageModel(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>"), "tiny")


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    rows = torch.randint(1, 50, (R, T), generator=torch.Generator().manual_seed(1))
    rows[::3, 2] = BOS
    return rows


def text(lm, rows, n_downstream_rows: int, rows_per_batch: int, **known) -> HeldOut:
    given = {"lm": lm, "site": SITE, "rows": rows, "starts": rows == BOS, **known}
    return HeldOut(n_downstream_rows=n_downstream_rows, rows_per_batch=rows_per_batch, **given)


def test_figures_equal_those_computed_over_all_rows_at_once(lm, rows):
    method = toy().eval()
    found = evaluate_dictionary(method, text(lm, rows, 10, 7)).metrics()
    with torch.no_grad():
        x = lm.capture(rows, SITE).flatten(0, 1)
        x_n, shift = method.norm(x)
        codes = method.encode(x_n)
        x_hat_n = method.decode(codes)
        x_hat = method.norm.undo(x_hat_n, shift)
    l0 = (codes.values > 0).sum(-1).double()
    is_bos = rows.flatten() == BOS
    expected = {
        "n_tokens": R * T,
        "nmse_token_std": (x_n - x_hat_n).square().mean().item(),
        "fvu": ((x_n - x_hat_n).square().sum() / (x_n - x_n.mean(0)).square().sum()).item(),
        "fve_raw": 1 - ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(),
        "nmse_raw_energy": ((x - x_hat).square().sum() / x.square().sum()).item(),
        "cosine": torch.cosine_similarity(x_n, x_hat_n).mean().item(),
        "l2_ratio_raw": (x_hat.norm(dim=-1) / x.norm(dim=-1)).mean().item(),
        "l0_mean": l0.mean().item(),
        "l0_std": l0.std(correction=0).item(),
        "l0_mean_without_bos": l0[~is_bos].mean().item(),
        "l0_bos_mean": l0[is_bos].mean().item(),
        "dead_fraction": (~(codes.values > 0).any(0)).double().mean().item(),
        "dense_fraction": ((codes.values > 0).double().mean(0) > 0.1).double().mean().item(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)

    ten, edit = rows[:10], Edit(SITE, method.reconstruct)
    clean, spliced = (lm.token_losses(ten, e).mean().item() for e in (None, edit))
    zero = lm.token_losses(ten, Edit(SITE, torch.zeros_like)).mean().item()
    at_mean = Edit(SITE, lambda a: a.mean((0, 1)).expand_as(a))
    mean = lm.token_losses(ten, at_mean).mean().item()
    p, q = (lm.logits(ten, e)[:, :-1].log_softmax(-1) for e in (None, edit))
    expected = {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero_ablated": zero,
        "ce_mean_ablated": mean,
        "ce_degradation": spliced - clean,
        "ce_recovered_zero": (spliced - zero) / (clean - zero),
        "ce_recovered_mean": (spliced - mean) / (clean - mean),
        "kl_nats_per_token": (p.exp() * (p - q)).sum(-1).mean().item(),
        "n_downstream_tokens": 10 * (T - 1),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_histograms_count_every_token_with_and_without_beginnings_of_text(lm, rows):
    found = evaluate_dictionary(toy(), text(lm, rows, 2, 8))
    assert found.l0_histogram.sum() == R * T
    assert found.l0_histogram_without_bos.sum() == R * T - (rows == BOS).sum()
    values = torch.arange(len(found.l0_histogram))
    assert (found.l0_histogram * values).sum().item() / (R * T) == pytest.approx(found.metrics()["l0_mean"])


def test_the_number_of_rows_per_batch_changes_nothing(lm, rows):
    one, other = (evaluate_dictionary(toy(), text(lm, rows, 10, n)).metrics() for n in (1, R))
    assert one == pytest.approx(other, rel=1e-5)


def test_a_perfect_dictionary_loses_nothing(lm, rows):
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    method = Toy(both, both, torch.zeros(D), k=1, norm="token_std")
    method.threshold.zero_()
    found = evaluate_dictionary(method, text(lm, rows, R, 8)).metrics()
    assert found["l0_mean"] == D
    assert [found[name] for name in ("fve", "fve_raw", "cosine", "l2_ratio")] == pytest.approx([1] * 4)
    assert found["ce_degradation"] == pytest.approx(0, abs=1e-5)
    assert found["kl_nats_per_token"] == pytest.approx(0, abs=1e-5)
    assert found["ce_recovered_zero"] == pytest.approx(1, abs=1e-4)


def test_dictionaries_that_say_zero_or_the_mean_recover_nothing_from_that_ablation(lm, rows):
    mean = lm.capture(rows, SITE).double().mean((0, 1)).float()
    methods = {"zero": constant(torch.zeros(D)), "mean": constant(mean)}
    found = evaluate_dictionaries(methods, text(lm, rows, R, 8))
    zero, at_mean = found["zero"].metrics(), found["mean"].metrics()
    assert zero["ce_recovered_zero"] == pytest.approx(0, abs=1e-5)
    assert zero["nmse_raw_energy"] == pytest.approx(1)
    assert at_mean["ce_recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert at_mean["fve_raw"] == pytest.approx(0, abs=1e-6)
    assert at_mean["dead_fraction"] == 1


def test_dictionaries_scored_together_and_alone_with_a_shared_reference_agree_exactly(lm, rows):
    methods = {"a": toy(0), "b": toy(1, norm="none")}
    reference = downstream_reference(lm, SITE, rows[:10], rows_per_batch=5)
    together = evaluate_dictionaries(methods, text(lm, rows, 10, 5, reference=reference))
    for name, method in methods.items():
        assert together[name].metrics() == evaluate_dictionary(method, text(lm, rows, 10, 5)).metrics()


def test_compat_scores_the_training_rule_on_one_batch(lm, rows):
    method = toy(k=4).eval()
    compat = evaluate_compat(method, text(lm, rows, 0, 1).one_batch(10 * T + 3))
    assert compat["n_tokens_compat"] == 10 * T
    assert compat["l0_mean_compat"] == 4
    with torch.no_grad():
        x, _ = method.norm(lm.capture(rows[:10], SITE).flatten(0, 1))
        method.train()
        x_hat = method.decode(method.encode(x))
    assert compat["nmse_token_std_compat"] == pytest.approx((x - x_hat).square().mean().item(), rel=1e-5)
    inference = evaluate_dictionary(method, text(lm, rows[:10], 10, 10)).metrics()
    assert inference["l0_mean"] != 4
    assert compat.keys() == {f"{name}_compat" for name in inference}


def test_scoring_changes_neither_modes_nor_buffers_nor_random_state_nor_the_model(lm, rows):
    method = toy()
    method.norm.eval()  # a part in another mode than the whole
    before = {name: value.clone() for name, value in method.state_dict().items()}
    rng, logits = torch.get_rng_state(), lm.logits(rows)
    evaluate_dictionary(method, text(lm, rows, 4, 8))
    evaluate_compat(method, text(lm, rows, 0, 1).one_batch(32))
    assert method.training and not method.norm.training
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(lm.logits(rows), logits)


def test_without_downstream_rows_the_figures_of_the_loss_are_left_out_and_the_others_stay(lm, rows):
    whole = evaluate_dictionary(toy(), text(lm, rows, 8, 8)).metrics()
    without = evaluate_dictionary(toy(), text(lm, rows, 0, 8)).metrics()
    assert without == {name: value for name, value in whole.items() if name in without}
    left_out = whole.keys() - without.keys()
    assert {"ce_spliced", "ce_degradation"} <= left_out and {"l0_mean", "nmse_token_std"} <= without.keys()


def test_a_reference_of_another_site_or_other_rows_is_refused(lm, rows):
    reference = downstream_reference(lm, SITE, rows[:4], rows_per_batch=4)
    for site, n_rows in (("resid_pre.2", 4), (SITE, 5)):
        with pytest.raises(ValueError, match="reference"):
            text(lm, rows, n_rows, 4, site=site, reference=reference)


def test_nan_stops_the_evaluation_and_names_the_dictionary(lm, rows):
    method = toy()
    method.b_dec.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="'broken'"):
        evaluate_dictionaries({"fine": toy(), "broken": method}, text(lm, rows, 4, 8))
    assert method.training


def test_a_compat_batch_of_more_rows_than_asked_for_is_refused_and_one_of_more_than_there_are_has_all(lm, rows):
    with pytest.raises(UserError, match=r"at most evaluation\.n_rows=24"):
        n_compat_rows(4096, R, T)
    with pytest.raises(UserError, match=r"needs 1 row or more"):
        text(lm, rows, 0, 1).one_batch(T - 1)
    assert len(text(lm, rows, 0, 1).one_batch(4096).rows) == R  # a short text has fewer


def test_the_beginnings_of_text_are_those_put_there_and_not_equal_ids_of_the_text(lm, rows):
    starts = torch.zeros_like(rows, dtype=torch.bool)
    starts[:, 0] = True
    metrics = evaluate_dictionary(toy().eval(), text(lm, rows, 4, 8, starts=starts)).metrics()
    x_n, _ = toy().eval().norm(lm.capture(rows, SITE).flatten(0, 1))
    l0 = (toy().eval().encode(x_n).values > 0).sum(-1).double()
    assert (rows == BOS).any() and not (rows[:, 0] == BOS).any()
    assert metrics["l0_bos_mean"] == pytest.approx(l0[starts.flatten()].mean().item())
    assert metrics["l0_mean_without_bos"] == pytest.approx(l0[~starts.flatten()].mean().item())


def test_a_batchtopk_dictionary_is_scored_by_both_of_its_rules(lm, rows):
    method = BatchTopK(
        d_model=D,
        dict_size=32,
        k=3,
        use_enc_bias=False,
        enc_init_norm=None,
        threshold_rule="posthoc_mean",
        threshold_ema_rate=0.1,
        aux="none",
        aux_coefficient=0.0,
        k_aux=8,
        lr=1e-3,
        betas=(0.9, 0.99),
        input_norm="token_std",
        seed=0,
        decoder_norm="after_step",
        dead_after_tokens=100,
        grad_clip=1.0,
        b_dec_init="zeros",
        warmup_steps=0,
        decay_fraction=0.0,
        path="auto",
    )
    method.threshold.fill_(1.0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    found = evaluate_dictionary(method, text(lm, rows, 8, 8)).metrics()
    compat = evaluate_compat(method, text(lm, rows, 0, 1).one_batch(R * T))
    x, _ = method.norm(lm.capture(rows, SITE).flatten(0, 1))
    l0 = ((x - method.b_dec) @ method.W_enc.T > 1.0).sum(-1).double().mean().item()
    assert found["l0_mean"] == pytest.approx(l0)
    assert compat["l0_mean_compat"] == pytest.approx(3)
    torch.testing.assert_close(dict(method.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    assert method.training


def test_activations_and_reference_made_before_change_no_figure(tiny_model, words):
    from core.methods.topk import TopK
    from core.models.language_model import load_language_model
    from core.text.rows import RowStream

    lm, site = load_language_model(tiny_model), "resid_pre.1"
    text = RowStream(words, lm.tokenizer, "heldout", 0, 16, "concat", 64).rows_of_one_pass(10)
    rows = text.tokens
    method = TopK(
        d_model=32, dict_size=64, k=4, use_enc_bias=False,
        enc_init_norm=None, aux="none", aux_coefficient=0.0, k_aux=1, path="auto",
        lr=1e-3, betas=(0.9, 0.99), input_norm="token_std", seed=0, decoder_norm="before_step", dead_after_tokens=100,
        grad_clip=1.0, b_dec_init="zeros", warmup_steps=0, decay_fraction=0.0,
    )  # fmt: skip
    held_out = HeldOut(lm=lm, site=site, rows=rows, starts=text.starts, n_downstream_rows=4, rows_per_batch=3)
    plain = evaluate_dictionary(method, held_out).metrics()
    plain_compat = evaluate_compat(method, held_out.one_batch(64))
    captured = torch.cat([lm.capture(part, site) for part in rows.split(3)])
    for keep_logits in (False, True):
        reference = downstream_reference(lm, site, rows[:4], 3, keep_logits)
        kept = replace(held_out, reference=reference, captured=captured)
        assert evaluate_dictionary(method, kept).metrics() == pytest.approx(plain, rel=1e-9)
        one_batch = kept.one_batch(64)
        reference = downstream_reference(lm, site, one_batch.rows, len(one_batch.rows), keep_logits)
        compat = evaluate_compat(method, replace(one_batch, reference=reference))
        assert compat == pytest.approx(plain_compat, rel=1e-5)


def test_the_first_rows_keep_their_activations_and_a_reference_that_fits(lm, rows):
    reference = downstream_reference(lm, SITE, rows[:4], rows_per_batch=4)
    whole = text(lm, rows, 4, 8, reference=reference, captured=lm.capture(rows, SITE))
    assert whole.first(4).reference is reference and whole.first(5).reference is None
    assert whole.first(5).downstream_rows.equal(rows[:5]) and whole.first(5).activations(slice(0, 9)).shape[0] == 5
    alone = evaluate_dictionary(toy().eval(), text(lm, rows[:4], 4, 8)).metrics()
    assert evaluate_dictionary(toy().eval(), whole.first(4)).metrics() == pytest.approx(alone, rel=1e-5)
