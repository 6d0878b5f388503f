"""Meta-SAEs: they find planted attributes, resume and store trainings, and their scores equal hand-worked values."""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from core import fleet
from core.analysis.directions import max_cosines
from core.analysis.meta_sae import (
    decompose,
    decompose_together,
    meta_request,
    null_rows,
    replaced_decoder,
    score,
    trained_metas,
)
from core.artifacts import Store
from core.errors import NonFiniteLoss, UserError
from core.fleet import KIND, Fleet, Request
from core.methods.batchtopk import BatchTopK
from core.metrics.reconstruction import VarianceExplained
from core.metrics.recovery import dictionary_mcc
from core.metrics.sparsity import firing_counts
from core.runtime import Runtime
from core.seeding import generator
from core.streams.decoder_rows import directions, random_directions
from core.synthetic.planted import PlantedEntities
from tests.composing import CONF, composed

METHOD: dict[str, Any] = {
    "_target_": "core.methods.batchtopk.BatchTopK", "d_model": 64, "dict_size": 40, "k": 4, "use_enc_bias": False,
    "enc_init_norm": None,
    "threshold_rule": "posthoc_mean", "threshold_ema_rate": 0.01, "aux": "r1", "aux_coefficient": 1 / 16,
    "k_aux": 512, "lr": 1e-3, "betas": [0.9, 0.99], "input_norm": "none", "seed": 0, "decoder_norm": "before_step",
    "dead_after_tokens": 6400, "grad_clip": 1e5,
    "b_dec_init": "zeros", "warmup_steps": 0, "decay_fraction": 0.0, "path": "auto",
}  # fmt: skip


def request_of(rows: torch.Tensor, n_steps: int = 40, start: BatchTopK | None = None, **method: Any) -> Request:
    return request_with(rows, {"n_steps": n_steps, "finetune_steps": n_steps}, start=start, **method)


def request_with(
    rows: torch.Tensor, meta: dict[str, Any], weights: Any = None, start: Any = None, **method: Any
) -> Request:
    """A request with other settings of the group `meta`."""
    settings = {
        "method": {**METHOD, "d_model": rows.shape[1], **method}, "n_steps": 40, "batch_size": 64,
        "sampling": "shuffled", "seed": 0, "calibration_batches": 10, "batches_per_chunk": 8,
    }  # fmt: skip
    return meta_request({**settings, **meta}, rows, weights=weights, start=start)


def train_metas(requests: list[Request], run: Runtime) -> list[BatchTopK]:
    return trained_metas(requests, run, torch.device("cpu"))


def train_meta(request: Request, run: Runtime) -> BatchTopK:
    return train_metas([request], run)[0]


@pytest.fixture
def run(runtime: Any, tmp_path: Path) -> Any:
    return partial(runtime, tmp_path)


ROWS = random_directions(200, 16, seed=5)


# ---- ground truth


def recovered(meta: BatchTopK, planted: PlantedEntities) -> tuple[float, float]:
    """Mean cosine of attributes with their matched meta-latents, and the share of attributes with one above 0.7."""
    nearest = max_cosines(planted.attributes, directions(meta.W_dec, "meta"))[0]
    return float(dictionary_mcc(planted.attributes, meta.W_dec, "cosine")), float((nearest > 0.7).double().mean())


def test_meta_latents_of_entities_are_the_planted_attributes(run: Any):
    """Over eight seeds: mean cosine .84 to .87, .88 to .93 of the attributes found, .89 to .92 of the parts right."""
    planted = PlantedEntities(n_entities=600, seed=0)  # 40 attributes, 3 for each entity
    rows = directions(planted.entities, "entities")
    settings = {"lr": 3e-3, "k": 3, "decay_fraction": 0.5}
    real, null = (
        train_meta(request_with(r, {"n_steps": 600, "batch_size": 200}, **settings), run("store"))
        for r in (rows, null_rows(rows, 0))
    )
    assert recovered(real, planted)[0] > 0.8 and recovered(real, planted)[1] > 0.8
    assert recovered(null, planted)[0] < 0.35 and recovered(null, planted)[1] == 0.0
    assert score(real, rows).batch.centred > score(null, null_rows(rows, 0)).batch.centred + 0.2

    closeness, attribute = max_cosines(directions(real.W_dec, "meta"), planted.attributes)
    codes = decompose(real, rows)
    sure = closeness[codes.cols] > 0.7
    right = planted.attributes_of[codes.rows[sure], attribute[codes.cols[sure]]]
    assert sure.double().mean() > 0.8 and right.mean() > 0.85


@pytest.mark.slow
def test_meta_latents_of_a_trained_dictionary_are_nearer_to_the_attributes_than_those_of_random_directions(run: Any):
    """Over four seeds of the dictionary and three of the meta-dictionary: mean cosine .58 to .69 (random .26 to .29);
    .15 to .6 of the attributes found (random none)."""
    planted = PlantedEntities(n_entities=200, n_attributes=20, seed=0)
    options = {key: value for key, value in METHOD.items() if key != "_target_"}
    changes = {"dict_size": 256, "lr": 3e-3, "seed": 1, "dead_after_tokens": 20480, "decay_fraction": 0.3}
    base, stream = BatchTopK(**{**options, **changes}), planted.batches(512, 0, "train")
    base.n_steps = 1000
    optimizer = base.configure_optimizers()
    for batch in islice(stream, 1000):
        base.update(batch, optimizer)
    base.finish(list(islice(stream, 20)))
    base.eval()
    fires = firing_counts(base.encode(planted.rows(20_000, generator(0, "heldout")).x)) > 20
    rows = directions(base.W_dec[fires], "base")
    settings = {"lr": 3e-3, "k": 3, "decay_fraction": 0.5, "dict_size": 30}
    real, null = (
        train_meta(request_with(r, {"n_steps": 800, "batch_size": 128}, **settings), run("store"))
        for r in (rows, null_rows(rows, 0))
    )
    learned, by_chance = recovered(real, planted), recovered(null, planted)
    assert learned[0] > by_chance[0] + 0.25 and learned[1] > 0.1 and by_chance[1] == 0.0, (learned, by_chance)


# ---- training


def parameters(meta: BatchTopK) -> list[torch.Tensor]:
    return [value.clone() for value in meta.state_dict().values()]


def assert_equal(a: BatchTopK, b: BatchTopK) -> None:
    assert all(torch.equal(x, y) for x, y in zip(parameters(a), parameters(b), strict=True))


class InterruptedTrainingError(RuntimeError):
    pass


def test_a_resumed_training_ends_with_the_same_parameters_bit_for_bit(run: Any, monkeypatch: pytest.MonkeyPatch):
    request = request_of(ROWS)
    whole = train_meta(request, run("whole"))
    original, steps = Fleet.training_step, []

    def breaking(self: Any, chunk: Any, batch_idx: int) -> None:
        steps.append(batch_idx)
        if steps == [0, 1, 2]:
            raise InterruptedTrainingError
        original(self, chunk, batch_idx)

    monkeypatch.setattr(Fleet, "training_step", breaking)
    stopped = run("stopped", checkpoint_every_seconds=1e-9)
    with pytest.raises(InterruptedTrainingError):
        train_meta(request, stopped)
    assert_equal(train_meta(request, stopped), whole)
    assert steps == [0, 1, 2, 2, 3, 4]
    assert not list(Path(stopped.artifacts_dir).glob("training/*/*"))  # checkpoints of finished trainings are removed


def test_a_stored_dictionary_is_not_trained_again_and_other_settings_have_another_key(run: Any, monkeypatch):
    request = request_of(ROWS)
    first = train_meta(request, run("store"))
    monkeypatch.setattr(fleet, "_train", lambda *_: pytest.fail("trained again"))
    assert_equal(train_meta(request_of(ROWS.clone()), run("store")), first)
    others = [request_of(ROWS, 41), request_of(ROWS, k=5), request_of(ROWS * 0.5), request_of(ROWS, start=first)]
    assert len({request.key, *(other.key for other in others)}) == 5
    assert not any(Store(run("store").artifacts_dir).has(KIND, other.spec) for other in others)


def test_dictionaries_trained_together_equal_those_trained_alone(run: Any):
    requests = [request_of(ROWS), request_of(ROWS, dict_size=20), request_of(ROWS, k=8), request_of(null_rows(ROWS, 0))]
    for together, request in zip(train_metas(requests, run("together")), requests, strict=True):
        assert_equal(together, train_meta(request, run("alone")))


def test_a_given_decoder_stays_fixed_and_the_encoder_learns_to_use_it(run: Any):
    other = random_directions(40, 16, seed=9)
    start = replaced_decoder(train_meta(request_of(ROWS, 200), run("store")), other)
    tuned = train_meta(request_of(ROWS, 400, start=start), run("store"))
    torch.testing.assert_close(tuned.W_dec, other)
    assert torch.equal(tuned.b_dec, start.b_dec) and not torch.equal(tuned.W_enc, start.W_enc)
    assert score(tuned, ROWS).batch.centred > score(start, ROWS).batch.centred + 0.05


def test_frequent_rows_are_explained_better_when_they_are_drawn_more_often(run: Any):
    weights = torch.where(torch.arange(200) < 20, 1.0, 0.01)
    even = train_meta(request_of(ROWS, 400), run("store"))
    weighted = request_with(ROWS, {"n_steps": 400, "sampling": "frequency"}, weights)
    tilted = train_meta(weighted, run("store"))
    assert score(tilted, ROWS, weights).batch.centred > score(even, ROWS, weights).batch.centred + 0.1


# ---- what is refused


def test_a_method_that_does_not_fit_is_refused():
    topk = {key: value for key, value in METHOD.items() if not key.startswith("threshold")}
    with pytest.raises(UserError, match=r"meta\.method must be a BatchTopK, not TopK"):
        request_with(ROWS, {"method": {**topk, "_target_": "core.methods.topk.TopK"}})
    with pytest.raises(UserError, match="d_model is 12, but rows have 16"):
        request_of(ROWS, d_model=12)


def test_a_training_that_diverges_raises_and_stores_nothing(run: Any):
    request = request_of(ROWS, lr=1e30, decoder_norm="none")
    with pytest.raises(NonFiniteLoss):
        train_meta(request, run("store"))
    assert not Store(run("store").artifacts_dir).has(KIND, request.spec)


# ---- scores


def by_hand(meta: BatchTopK, codes: torch.Tensor) -> torch.Tensor:
    return codes @ meta.W_dec + meta.b_dec


def test_scores_equal_dense_arithmetic(run: Any):
    meta = train_meta(request_of(ROWS, 100), run("store"))
    z = ((ROWS - meta.b_dec) @ meta.W_enc.T).relu()
    together = z * (z >= z.flatten().topk(4 * len(ROWS)).values[-1])
    alone = z * (z > meta.threshold)
    scored = score(meta, ROWS)
    assert decompose_together(meta, ROWS).l0() == 4 and scored.l0_threshold == pytest.approx(
        float((alone > 0).sum() / 200)
    )
    torch.testing.assert_close(decompose(meta, ROWS).dense(), alone)
    for value, codes in ((scored.batch, together), (scored.threshold, alone)):
        assert value.centred == pytest.approx(VarianceExplained.of(ROWS, by_hand(meta, codes)).centred, abs=1e-6)
    active = (together > 0).sum(0)
    assert scored.dead_fraction == pytest.approx(float((active == 0).double().mean()))
    assert scored.most_frequent == pytest.approx(float(active.max()) / 200)


def test_the_null_rows_have_the_same_shape_and_other_values():
    null = null_rows(ROWS, 3)
    assert null.shape == ROWS.shape and not torch.equal(null, ROWS) and torch.equal(null, null_rows(ROWS, 3))


def test_replacing_the_decoder_changes_nothing_else(run: Any):
    meta = train_meta(request_of(ROWS, 20), run("store"))
    other = replaced_decoder(meta, random_directions(40, 16, 0))
    assert torch.equal(other.W_enc, meta.W_enc) and torch.equal(other.threshold, meta.threshold)
    assert torch.equal(other.W_dec, random_directions(40, 16, 0)) and not torch.equal(other.W_dec, meta.W_dec)


@pytest.mark.parametrize(
    "preset", sorted(path.stem for path in (CONF / "meta").glob("*.yaml") if path.stem != "common")
)
@pytest.mark.parametrize("scale", ["paper", "demo", "smoke"])
def test_a_preset_has_one_row_for_each_size_with_every_scale_and_calls_latents_dead_at_its_batches(preset, scale):
    meta = composed("experiment=leask_meta_sae", f"meta={preset}", f"scale={scale}").meta
    rows = {key: row for key, row in meta.items() if key in ("batch_sizes", "steps", "finetune", "dead_after")}
    assert all(list(row) == ["paper", "demo", "smoke"] for row in rows.values())
    assert (meta.batch_size, meta.n_steps) == (rows["batch_sizes"][scale], rows["steps"][scale])
    assert meta.method.dead_after_tokens == meta.batch_size * (10 if scale == "smoke" else 100)  # rows in 100 batches
    assert meta.finetune_steps == (meta.n_steps if preset == "saebench" else rows["finetune"][scale])
