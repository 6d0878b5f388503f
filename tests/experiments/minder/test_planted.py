"""minder_planted against its truth: what L1 and BatchTopK crosscoders make of known concepts, on three seeds.

Two of the runs are in the quick suite. Each takes some 10 s of one core.
"""

from collections.abc import Callable

import pandas as pd
import pytest

from experiments.minder import planted
from tests.composing import composed

L1, BTK = "method=crosscoder_l1", "method=crosscoder_batchtopk"
SQUARED, NORM, LOUD = "method.error=squared", "method.error=norm", "stream.noise=1.0"
AS_PLANTED = ("method.threshold_start=0.25", "method.k_aux=32")
RUNS = {
    "l1_strong": (L1, SQUARED, "method.l1_coefficient=0.3"),
    "l1_weak": (L1, SQUARED, "method.l1_coefficient=0.1"),
    "l1_loud": (L1, NORM, "method.l1_coefficient=0.15", LOUD),
    "l1_norm": (L1, NORM, "method.l1_coefficient=0.1"),
    "btk": (BTK, NORM, "method.k=1.4", *AS_PLANTED),
    "btk_squared": (BTK, SQUARED, "method.k=1.4", *AS_PLANTED),
    "btk_loud": (BTK, NORM, "method.k=1.4", LOUD, *AS_PLANTED),
    "btk_wide": (BTK, SQUARED, "method.k=3.0", *AS_PLANTED),
}

Measured = tuple[dict[str, float], pd.DataFrame]
Measure = Callable[[str, int], Measured]
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """The metrics of a run, and its table of latents; each run is made once."""
    folder = tmp_path_factory.mktemp("planted")
    known: dict[tuple[str, int], Measured] = {}

    def measure(name: str, seed: int) -> Measured:
        if (name, seed) not in known:
            cell = folder / f"{name}_{seed}"
            places = (f"artifacts_dir={folder}", f"output_dir={folder}", f"cell_folder={cell}", "logging=none")
            metrics = planted.run(composed("experiment=minder_planted", *RUNS[name], *places, f"seed={seed}"))
            known[name, seed] = metrics, pd.read_parquet(cell / "latents.parquet")
        return known[name, seed]

    return measure


def complete_shrinkage(metrics: dict[str, float]) -> None:
    assert metrics["delta_weak_base_lowest"] > 0.95
    assert metrics["nu_error_weak_base"] == pytest.approx(0.30, abs=0.03)
    assert metrics["nu_reconstruction_weak_base"] < 0.15
    assert metrics["n_chat_only_weak_base"] == 6


def concepts_stay_whole(metrics: dict[str, float]) -> None:
    """The BatchTopK crosscoder with as many latents per row as there are concepts."""
    assert metrics["delta_weak_base_lowest"] == pytest.approx(0.85, abs=0.03)
    assert metrics["delta_weak_base_highest"] == pytest.approx(0.85, abs=0.03)
    assert metrics["specific_share"] >= 0.85
    assert metrics["n_twins"] <= 1
    assert metrics["n_chat_concepts_found"] == 4


# ---- the quick suite


def test_l1_takes_the_base_decoder_of_a_weak_concept_away_and_latent_scaling_says_so(measured: Measure):
    """Of a concept with 0.3 of its strength in the base model nothing is left there, and nu of the error is 0.3."""
    complete_shrinkage(measured("l1_strong", 0)[0])


def test_batchtopk_at_the_true_number_of_latents_keeps_every_concept_whole(measured: Measure):
    """Delta_norm of a concept with 0.3 of its strength in the base model is 1 - 0.3 / 2."""
    concepts_stay_whole(measured("btk", 0)[0])


# ---- the slow one: all assertions on all seeds


@pytest.mark.slow
@SEEDS
def test_complete_shrinkage_on_every_seed(seed: int, measured: Measure):
    complete_shrinkage(measured("l1_strong", seed)[0])


@pytest.mark.slow
@SEEDS
def test_latent_decoupling_splits_concepts_into_twins(seed: int, measured: Measure):
    """A concept that is in both models in half of its rows, else in one: nu of its chat-only latent's reconstruction is
    P(both) / P(chat) = 0.5 / 0.75."""
    metrics, _ = measured("l1_weak", seed)
    assert metrics["n_split"] >= 6
    assert metrics["nu_reconstruction_sometimes"] == pytest.approx(2 / 3, abs=0.05)
    assert abs(metrics["nu_error_sometimes"]) < 0.15
    assert metrics["n_twins"] >= 6


@pytest.mark.slow
@SEEDS
@pytest.mark.parametrize("name", ["l1_weak", "l1_strong"])
def test_few_chat_only_latents_of_l1_are_specific_and_latent_scaling_finds_those(
    name: str, seed: int, measured: Measure
):
    metrics, _ = measured(name, seed)
    assert metrics["specific_share"] <= 0.40
    assert metrics["n_specific"] == metrics["n_specific_chat_only"] > 0


@pytest.mark.slow
@SEEDS
@pytest.mark.parametrize("name", ["btk", "btk_squared"])
def test_batchtopk_keeps_concepts_whole_on_every_seed(name: str, seed: int, measured: Measure):
    concepts_stay_whole(measured(name, seed)[0])


@pytest.mark.slow
@SEEDS
def test_with_much_noise_and_the_papers_loss_l1_calls_more_latents_chat_only(seed: int, measured: Measure):
    l1, btk = measured("l1_loud", seed)[0], measured("btk_loud", seed)[0]
    assert l1["specific_share"] <= 0.2 and btk["specific_share"] >= 0.9
    assert l1["n_chat_only"] >= 4 * btk["n_chat_only"]
    assert btk["fve"] >= l1["fve"]


@pytest.mark.slow
@SEEDS
@pytest.mark.parametrize("name", ["l1_weak", "l1_strong", "l1_norm"])
def test_the_subgradient_says_which_latents_lose_their_base_decoder(name: str, seed: int, measured: Measure):
    """Without a base decoder, the pull of the error is below that of the penalty; with one, both are equal."""
    metrics, _ = measured(name, seed)
    assert metrics["shrinkage_ratio_shrunk_highest"] <= 1.05
    assert metrics["shrinkage_ratio_kept_median"] == pytest.approx(1.0, abs=0.05)
    assert metrics["shrinkage_ratio_kept_lowest"] >= (0.85 if name == "l1_norm" else 0.95)


@pytest.mark.slow
def test_batchtopk_with_twice_the_true_number_of_latents_splits_concepts_again(measured: Measure):
    """The negative control: BatchTopK lessens the artefacts and does not remove them. One seed may have none."""
    runs = [measured("btk_wide", seed)[0] for seed in range(3)]
    assert sum(metrics["n_twins"] >= 1 or metrics["specific_share"] < 0.6 for metrics in runs) >= 2
    assert sum(metrics["n_twins"] for metrics in runs) >= 3


@pytest.mark.slow
@SEEDS
def test_what_the_base_model_alone_has_is_found_from_its_side(seed: int, measured: Measure):
    """With the base decoder as the probe, base-only concepts have nu near 0, as chat-only ones have with the chat's."""
    metrics, latents = measured("btk", seed)
    own = latents[(latents["kind"] == "base_only") & (latents["delta"] < 0.1)]
    assert own["concept"].nunique() == 4 and own["base_specific"].all()
    assert own[["nu_error_of_base", "nu_reconstruction_of_base"]].abs().to_numpy().max() < 0.1
    assert metrics["n_base_specific"] >= 4
