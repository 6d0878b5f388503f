"""Stitching against a ground truth: which latents of the larger dictionary are new is planted."""

from functools import cache
from itertools import islice, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.analysis.frankenstein import frankenstein
from core.analysis.stitch_path import insertion, interpolation, walk
from core.analysis.stitching import (
    NOVEL,
    RECONSTRUCTION,
    UNDECIDED,
    components,
    error_and_bias,
    nearest,
    predict_novel,
    score_latents,
)
from core.methods.batchtopk import BatchTopK
from core.methods.relu_l1 import ReluL1
from core.seeding import generator
from core.synthetic.planted import PlantedEntities

OPTIONS = {
    "betas": [0.9, 0.99], "input_norm": "none", "dead_after_tokens": 20480, "grad_clip": 1e5,
    "b_dec_init": "zeros", "warmup_steps": 0,
    "decay_fraction": 0.0, "path": "auto",
}  # fmt: skip


# ---- dictionaries made by hand: atoms that both know, and atoms that the large one alone knows

D, N_KNOWN = 32, 10


def atoms() -> Tensor:
    """Orthonormal rows `[D, D]`; every latent of a dictionary below has one of them for its own."""
    return torch.linalg.qr(torch.randn(D, D, generator=generator(0, "atoms"))).Q


def knowing(directions: Tensor, seed: int = 0) -> ReluL1:
    """Finds the weight of each of its directions `[m, D]`, up to the 0.05 that its bias takes."""
    method = ReluL1(
        d_model=D, dict_size=len(directions), l1_coefficient=0.1, l1_warmup_steps=0, reconstruction="squared_error",
        subtract_b_dec=True, resample_every=0, lr=1e-3, seed=seed, decoder_norm="none", **OPTIONS,
    )  # fmt: skip
    with torch.no_grad():
        method.W_enc.copy_(directions)
        method.W_dec.copy_(directions)
        method.b_enc.fill_(-0.05)
    return method.eval()


def planted_rows(n: int = 2000) -> list[Tensor]:
    """Each atom is there in one row in ten, with a weight from 0.5 to 1.5."""
    g = generator(0, "planted")
    weights = torch.empty(n, D).uniform_(0.5, 1.5, generator=g) * (torch.rand(n, D, generator=g) < 0.1)
    return list((weights @ atoms()).split(n // 40))


def test_the_planted_new_latents_are_the_novel_ones():
    order = torch.randperm(D, generator=generator(0, "order"))
    small, large = knowing(atoms()[:N_KNOWN]), knowing(atoms()[order])
    new = order >= N_KNOWN
    scores, near = score_latents(small, large, planted_rows()), nearest(small, large)
    classes = scores.classes(seed=0)
    assert torch.equal(classes == NOVEL, new) and torch.equal(classes == RECONSTRUCTION, ~new)
    assert torch.equal(near.cosine > 0.99, ~new) and torch.equal(near.partner[~new], order[~new])
    found = predict_novel(near.cosine, scores.delta_mse)
    assert found is not None and found.auc == 1.0 and found.balanced_accuracy == 1.0
    curves = walk(small, large, planted_rows(), {"new": insertion(new, N_KNOWN), "known": insertion(~new, N_KNOWN)})
    assert float(curves["new"].mse[1]) == pytest.approx(error_and_bias(large, planted_rows())[0].mse, rel=1e-5)
    assert curves["known"].mse[1] > curves["known"].mse[0]


def test_a_split_latent_is_swapped_for_all_its_children():
    """The large dictionary has two children, 20 degrees to either side, for each of the first three atoms."""
    A = atoms()
    tilt = torch.deg2rad(torch.tensor(20.0))
    children = torch.cat([tilt.cos() * A[:3] + sign * tilt.sin() * A[20:23] for sign in (1, -1)])
    small, large = knowing(A[:6]), knowing(torch.cat([children, A[3:6], A[6:12]]))
    graph = components(small, large, 0.7)
    assert graph.large[:3].tolist() == graph.large[3:6].tolist() == graph.small[:3].tolist()
    assert graph.sizes[graph.small].tolist() == [3, 3, 3, 2, 2, 2]
    path = interpolation(nearest(small, large), graph, 6)
    assert torch.equal(path.comes[:3], path.goes[:3]) and torch.equal(path.comes[3:6], path.goes[:3])
    assert path.phases[int(path.comes[0]) - 1] == "swap" and bool((path.comes[9:] <= 6).all())


def test_a_grown_dictionary_takes_every_new_latent_once():
    A = atoms()
    family = [knowing(A[:10]), knowing(A[5:20]), knowing(A[:30])]
    grown = frankenstein(family, planted_rows, seed=0)
    assert [method.dict_size for method in grown] == [10, 20, 30]
    torch.testing.assert_close(grown[-1].W_dec.detach(), A[:30])
    errors = [error_and_bias(method, planted_rows())[0].mse for method in grown]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(error_and_bias(family[-1], planted_rows())[0].mse, rel=1e-5)


# ---- trained dictionaries of doubling size: small ones learn attributes, large ones entities


@cache
def family() -> tuple[list[BatchTopK], list[Tensor], Tensor]:
    """Trained BatchTopK dictionaries with 32 to 256 latents, held-out batches, and the planted directions at unit norm:
    40 attributes and 200 entities `[240, 64]`."""
    source = PlantedEntities(seed=0)
    methods = [
        BatchTopK(
            d_model=64, dict_size=m, k=4, use_enc_bias=False,
            enc_init_norm=None, threshold_rule="posthoc_mean", threshold_ema_rate=0.01,
            aux="r1", aux_coefficient=1 / 32, k_aux=512, lr=3e-3, seed=m, decoder_norm="before_step", **OPTIONS,
        )
        for m in (32, 64, 128, 256)
    ]  # fmt: skip
    optimizers = [method.configure_optimizers() for method in methods]
    stream = source.batches(512, 0, "train")
    for batch in islice(stream, 600):
        for method, optimizer in zip(methods, optimizers, strict=True):
            method.update(batch, optimizer)
    calibration = list(islice(stream, 50))
    for method in methods:
        method.finish(calibration)
        method.eval()
    rows = source.rows(20_000, generator(0, "heldout")).x
    return methods, list(rows.split(500)), normalize(torch.cat([source.attributes, source.entities]), dim=1)


def is_new(small: BatchTopK, large: BatchTopK, planted: Tensor, found_at: float = 0.8) -> tuple[Tensor, Tensor]:
    """For the large dictionary's latents: whether the planted direction next to a latent has no latent of the small
    dictionary at a cosine of `found_at`; and whether the latent itself has found one."""
    of_large, of_small = (normalize(method.W_dec.detach(), dim=1) @ planted.T for method in (large, small))
    best, direction = of_large.max(1)
    return (of_small.max(0).values < found_at)[direction], best >= found_at


@pytest.mark.slow
def test_on_trained_families_the_cosine_predicts_what_is_new():
    """Measured at 1500 steps by the note: AUC .945 to .989, latents of c < .6 change the error by a factor .945 to
    .984, those of c >= .7 by 3.6 to 7.4. Here, at 600 steps and over seven seeds: .938 to .999; .87 to .95; 3.8 to
    7.2."""
    methods, batches, _ = family()
    for small, large in pairwise(methods):
        scores, near = score_latents(small, large, batches), nearest(small, large)
        alive = ~scores.dead
        found = predict_novel(near.cosine[alive], scores.delta_mse[alive])
        assert found is not None and found.auc > 0.92 and found.spearman > 0.8 and 0.5 < found.threshold < 0.8
        assert 0.3 < float((scores.delta_mse[alive] < 0).double().mean()) < 0.6
        chosen = {"low": near.cosine < 0.6, "high": near.cosine >= 0.7}
        curves = walk(small, large, batches, {k: insertion(v & alive, small.dict_size) for k, v in chosen.items()})
        low, high = (float(curves[key].mse[1] / curves[key].mse[0]) for key in chosen)
        assert low < 0.98 and 3 < high < 8


@pytest.mark.slow
def test_on_trained_families_the_novel_latents_are_the_planted_new_ones():
    """Of the latents that have found a planted direction and are decided, over seven seeds: 76 to 96 % are classed as
    planted; no known one is called novel, and 57 to 88 % of the new ones are."""
    methods, batches, planted = family()
    for small, large in pairwise(methods):
        classes = score_latents(small, large, batches).classes(seed=0)
        new, labelled = is_new(small, large, planted)
        decided = labelled & ((classes == NOVEL) | (classes == RECONSTRUCTION))
        novel = classes == NOVEL
        assert float((new == novel)[decided].double().mean()) > 0.7
        assert not (novel & ~new & labelled).any()
        assert float((novel & new & decided).sum() / (new & decided).sum()) > 0.5
        assert int((classes == UNDECIDED).sum()) < 0.2 * large.dict_size


@pytest.mark.slow
def test_on_trained_families_the_error_falls_from_the_small_to_the_large_and_l0_comes_back():
    methods, batches, _ = family()
    small, large = methods[1], methods[3]
    near = nearest(small, large)
    path = interpolation(near, components(small, large, 0.6), 4)
    curve = walk(small, large, batches, {"way": path})["way"]
    for point, method in ((0, small), (-1, large)):
        alone = error_and_bias(method, batches)[0]
        assert float(curve.mse[point]) == pytest.approx(alone.mse, rel=1e-6)
        assert float(curve.l0[point]) == pytest.approx(alone.l0, rel=1e-6)
    assert curve.mse[4] < 0.9 * curve.mse[0] and curve.mse[8] < 0.8 * curve.mse[4]
    assert curve.l0[4] > 1.1 * curve.l0[0] and float(curve.l0[8]) == pytest.approx(float(curve.l0[0]), rel=0.02)


@pytest.mark.slow
def test_on_trained_families_growing_by_novel_latents_is_no_match_for_training():
    """The error falls with every addition, and L0 rises; but a trained dictionary of the same size has a lower error.
    (The authors report the contrary of their ReLU family on GPT-2.)"""
    methods, batches, _ = family()
    grown = [error_and_bias(method, batches)[0] for method in frankenstein(methods, lambda: batches, seed=0)]
    assert all(after.mse < before.mse and after.l0 > before.l0 for before, after in pairwise(grown))
    assert grown[-1].mse > error_and_bias(methods[2], batches)[0].mse
