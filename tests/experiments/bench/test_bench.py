"""Measuring, and what the benchmarks compare: the measures see what is planted, the competitors do the same work."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from core.artifacts import Store
from core.batch import Batch
from core.bench import PeakMemory, Times, alternate, hardware, save_table, threads
from core.errors import UserError
from core.fleet import KIND
from core.kernels import reference
from core.methods.saved import save_dictionary
from core.models.language_model import load_language_model
from core.runtime import resolve_device
from experiments.bench import fleet as bench_fleet
from experiments.bench import hours as bench_hours
from experiments.bench import peers
from experiments.bench import scaling as bench_scaling
from experiments.bench import stream as bench_stream
from experiments.bench import train_step as bench_train_step
from experiments.bench.common import RepeatedBatches, built, fit_fleet
from hydra_plugins.blocks_sweeper.sweeper import cells_of
from reports import compare, figures
from reports.collect import read_cells
from tests.composing import composed, composing

CPU = torch.device("cpu")
PEERS = [name for name in peers.PACKAGES if name != "dense"]


def configured(name: str, *overrides: str) -> DictConfig:
    return composed(f"experiment={name}", "scale=smoke", "logging=none", *overrides)


def tiny_case(peer: str, kind: str = "batchtopk", **changes: Any) -> peers.Case:
    settings: dict[str, Any] = {
        "peer": peer, "kind": kind, "batch_size": 64, "d_model": 16, "dict_size": 64, "k": 4, "n_threads": 1,
        "device": "cpu", "repetitions": 2, "warmup": 1, "seed": 0,
    }  # fmt: skip
    return peers.Case(**{**settings, **changes})


# ---- measuring


def test_a_ratio_is_the_median_of_the_rounds_with_their_quartiles():
    times = Times({"step": [3.0, 4.0, 8.0], "product": [1.0, 2.0, 2.0]})
    assert times.ratio("step", "product") == (3.0, 2.5, 3.5)  # the rounds give 3, 2, 4


def test_one_repetition_gives_a_ratio_without_spread():
    assert Times({"a": [3.0], "b": [2.0]}).ratio("a", "b") == (1.5, 1.5, 1.5)


def test_tasks_alternate_and_warm_up_rounds_are_not_counted():
    done: list[str] = []
    times = alternate({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, CPU, 3, warmup=2)
    assert done == ["a", "b"] * 5
    assert [len(seconds) for seconds in times.seconds.values()] == [3, 3]


def test_cpu_time_does_not_count_waiting_and_wall_time_does():
    import time

    tasks = {"wait": lambda: time.sleep(0.05)}
    assert alternate(tasks, CPU, 1, 0).median("wait") < 0.02
    assert alternate(tasks, CPU, 1, 0, wall=True).median("wait") >= 0.05


def test_the_number_of_threads_is_as_before_afterwards():
    with threads(2):
        assert torch.get_num_threads() == 2
        with threads(None):
            assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_hardware_names_the_processor_and_its_threads():
    assert "1 of " in hardware(CPU, 1)
    assert resolve_device("cpu") == CPU


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory on the CPU is Linux's")
def test_peak_memory_sees_a_buffer_that_is_gone_again_and_not_one_from_before():
    kept = torch.ones(1 << 24)
    peak = PeakMemory(CPU)
    torch.ones(1 << 25)
    peak.restart()
    torch.ones(1 << 24)  # 64 MiB
    assert peak.extra() == pytest.approx(1 << 26, abs=4 << 20)
    assert kept.numel() == 1 << 24


@pytest.mark.slow
def test_a_dense_step_holds_more_matrices_than_a_sparse_one():
    cfg = configured("bench_train_step", "batch_size=1024", "d_model=64", "k=8", "~methods.batchtopk")
    sparse = bench_train_step.memory(cfg, 4096, CPU)["peak_extra_preactivation_buffers"]
    cfg.methods.topk.path = "dense"
    dense = bench_train_step.memory(cfg, 4096, CPU)["peak_extra_preactivation_buffers"]
    assert 0.3 < sparse < 2.5 and dense > 3  # pre-activations, a mask, codes, and gradients of both


# ---- the training step


def test_metrics_have_the_names_of_the_table():
    times = Times({"step": [2.0], "product": [1.0], "copy": [0.1]})
    names = {bench_train_step.Row(who, "batchtopk", 24576, times).name for who in ("ours", "dense", "saelens")}
    assert names == {"batchtopk_m24576", "dense_batchtopk_m24576", "peer_saelens_batchtopk_m24576"}
    row = bench_train_step.Row("saelens", "batchtopk", 24576, times)
    assert row.metrics()["peer_saelens_batchtopk_m24576_over_product"] == 2.0


def test_floors_by_hand():
    times = Times({"step": [9.0], "product": [3.0], "product_bfloat16": [1.0], "copy": [0.5]})
    cfg = OmegaConf.create({"d_model": 10})
    metrics = bench_train_step.own_metrics(cfg, bench_train_step.Row("ours", "topk", 5, times))
    assert metrics["topk_m5_over_product"] == 3.0 and metrics["topk_m5_over_product_bfloat16"] == 9.0
    assert metrics["topk_m5_over_bandwidth_floor"] == 4.0  # 36 bytes a parameter, a copy moves 8: 4.5 copies
    assert metrics["topk_m5_over_larger_floor"] == 4.0


def test_the_step_that_is_timed_trains(tmp_path):
    cfg = configured("bench_train_step", f"cell_folder={tmp_path}", "product_dtypes.cpu=[bfloat16]")
    row = bench_train_step.own_step(cfg, "batchtopk", 128, CPU)
    metrics = bench_train_step.own_metrics(cfg, row)
    assert all(value > 0 for value in metrics.values())
    assert "batchtopk_m128_over_product_bfloat16" in metrics


def test_gradients_and_moments_are_allocated_without_moving_a_parameter():
    cfg = configured("bench_train_step")
    method = built(cfg.methods.topk, CPU, dict_size=64)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = method.configure_optimizers()
    bench_train_step.allocate_state(method, optimizer)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None and "exp_avg_sq" in optimizer.state[p] for p in trained)


def test_lightning_and_the_bare_loop_do_the_same_work(tmp_path):
    cfg = configured("bench_train_step", f"output_dir={tmp_path}", "trainer.accelerator=cpu")
    method, twin = (built(cfg.methods.batchtopk, CPU, dict_size=64) for _ in range(2))
    batches = [Batch(x) for x in peers.structured_rows(2 * 64, cfg.d_model, 0).split(64)]
    bare = bench_train_step.BareChunks(twin, CPU, warmup=1)
    fit_fleet(cfg, [method], batches, 3, 4, bare)
    assert method.n_updates == twin.n_updates == 12 and len(bare.bare) == len(bare.in_fit) == 2
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), twin.parameters(), strict=True))


def test_batches_from_memory_resume_at_their_state():
    batches = [Batch(torch.full((1, 1), float(i))) for i in range(3)]
    first, second = RepeatedBatches(batches), RepeatedBatches(batches)
    next(first)
    second.load_state_dict(first.state_dict())
    assert float(next(first).x) == float(next(second).x)


# ---- the competitors


@pytest.mark.parametrize("kind", ["batchtopk", "topk"])
def test_plain_pytorch_computes_the_loss_of_the_reference_kernels(kind):
    case = tiny_case("dense", kind)
    model, x = peers.DenseDictionary(case), peers.structured_rows(64, 16, 1)
    encode = {"batchtopk": reference.encode_batchtopk, "topk": reference.encode_topk}[kind]
    x_hat = reference.decode(encode(x, model.W_enc, model.b_enc, 4, model.b_dec), model.W_dec) + model.b_dec
    assert torch.allclose(model(x), (x - x_hat).square().mean())


def test_plain_pytorch_learns():
    case = tiny_case("dense")
    torch.manual_seed(0)
    step, x = peers.dense(case), peers.structured_rows(64, 16, 0)
    model = next(c.cell_contents for c in step.__closure__ or () if isinstance(c.cell_contents, peers.DenseDictionary))
    before = float(model(x).detach())
    for _ in range(50):
        step(x)
    assert float(model(x).detach()) < before


def test_a_competitor_is_timed_in_a_process_of_its_own():
    timed = peers.time_peer(tiny_case("dense"), sys.executable)
    assert timed.version == torch.__version__
    assert len(timed.times.seconds["step"]) == len(timed.times.seconds["product"]) == 2
    assert timed.times.ratio("step", "product").value > 1


def test_a_peer_that_cannot_be_imported_is_named_and_left_out(monkeypatch, tmp_path):
    cfg = configured("bench_train_step", "peers.names=[sparsify]", f"peers_python={sys.executable}")
    monkeypatch.setattr(peers, "available", lambda python, names: dict.fromkeys(names))
    rows, notes = bench_train_step.other_steps(cfg, [128], CPU)
    assert rows == [] and "sparsify is not installed" in notes[0]
    monkeypatch.setattr(peers, "available", lambda python, names: dict.fromkeys(names, "1.0"))
    monkeypatch.setitem(peers.STEPS, "sparsify", peers.dense)

    def fails(case: peers.Case, python: str) -> peers.Timed:
        raise peers.PeerError("ModuleNotFoundError: No module named 'sparsify'")

    monkeypatch.setattr(peers, "time_peer", fails)
    rows, notes = bench_train_step.other_steps(cfg, [128], CPU)
    assert rows == [] and "sparsify, topk" in notes[0] and "No module named 'sparsify'" in notes[0]


def test_an_unknown_peer_or_interpreter_is_refused():
    with pytest.raises(UserError, match=r"peers\.names: 'saelense'"):
        peers.available(sys.executable, ["saelense"])
    with pytest.raises(UserError, match="peers_python: /nowhere/python"):
        peers.available("/nowhere/python", ["saelens"])


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_that_is_installed_is_timed(peer):
    python = bench_train_step.peers_python(configured("bench_train_step"))
    version = peers.available(python, [peer])[peer]
    if version is None:
        pytest.skip(f"{peers.PACKAGES[peer]} is not installed for {python}: `make peers`")
    for kind in peers.KINDS[peer][:1]:
        timed = peers.time_peer(tiny_case(peer, kind, dict_size=256), python)
        assert timed.version == version and min(timed.times.seconds["step"]) > 0


# ---- stream, fleet, scaling


def test_a_truncated_model_ends_with_the_layers_below_the_site(tiny_model):
    lm = load_language_model(OmegaConf.create(tiny_model))
    tokens = torch.arange(40).view(2, 20)
    for site in ("resid_pre.2", "resid_post.1"):
        bare = bench_stream.truncated(lm, site)
        with torch.no_grad():
            hidden = bare(input_ids=tokens, use_cache=False).last_hidden_state
        assert torch.equal(hidden, lm.model.transformer.ln_f(lm.capture(tokens, site)))
    assert lm.n_layers == len(lm.model.transformer.h) == 3


def test_a_random_model_has_the_shape_that_was_asked_for():
    shape = "{n_embd: 32, n_layer: 3, n_head: 2, n_positions: 64, vocab_size: 5000}"
    lm = bench_stream.random_model(configured("bench_stream", f"random_architecture={shape}", "model.device=cpu"))
    assert lm.capture(torch.zeros(1, 8, dtype=torch.long), "resid_pre.2").shape == (1, 8, 32)


def test_the_fleet_benchmark_asks_for_the_dictionaries_of_the_grid(tmp_path):
    with composing():
        cfg = compose("config", overrides=["experiment=bench_fleet", "scale=smoke", f"artifacts_dir={tmp_path}"])
        requests = bench_fleet.requests_of_grid(cfg)
    targets = sorted(request.method["_target_"].rpartition(".")[2] for request in requests)
    assert targets == ["BatchTopK", "JumpReLU", "TopK"]
    assert all(request.source.data["artifacts_dir"] == str(tmp_path) for request in requests)


def test_stores_differ_where_one_bit_of_a_dictionary_does(tmp_path):
    cfg = configured("bench_train_step")

    class Asked:
        spec = {"one": 1}  # noqa: RUF012

    stores = Store(tmp_path / "a"), Store(tmp_path / "b")
    method = instantiate(cfg.methods.topk, dict_size=64)
    stores[0].put(KIND, Asked.spec, lambda folder: save_dictionary(method, {}, folder))
    stores[1].put(KIND, Asked.spec, lambda folder: save_dictionary(method, {}, folder))
    assert bench_fleet.largest_difference([Asked()], *stores) == 0
    with torch.no_grad():
        method.W_enc[3, 2] = torch.nextafter(method.W_enc[3, 2], torch.tensor(9.0))
    stores[1].put(KIND, Asked.spec, lambda folder: save_dictionary(method, {}, folder))
    assert 0 < bench_fleet.largest_difference([Asked()], *stores) < 1e-6


def test_scaling_varies_one_axis_at_a_time(tmp_path):
    cfg = configured("bench_scaling", f"cell_folder={tmp_path}", f"output_dir={tmp_path}", "trainer.accelerator=cpu")
    metrics = bench_scaling.run(cfg)
    table = pd.read_parquet(tmp_path / bench_scaling.CURVES)
    assert set(table["axis"]) == {"dict_size", "k", "batch_size", "n_dictionaries"}
    assert metrics["k_8_over_product"] > 0 and metrics["fleet_of_2_rows_per_second"] > 0


# ---- hours


def test_time_follows_a_line_by_hand():
    assert bench_hours.extended(0.01, 5.0, 0.02, 6.0) == pytest.approx(104.0)  # 4 s, and 100 s for all of the work
    assert bench_hours.extended(0.01, 5.0, 0.02, 4.9) == 4.9


def test_hours_of_the_parts_add_up_and_are_shared_by_the_cores(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Two parts by hand: 3 cells of 2 s and 360 s of work each, and one cell of 720 s of work."""
    work = {"a": [2.0, 360.0, 3], "b": [0.0, 720.0, 1]}

    def seconds_of_cells(part, fraction: float) -> list[float]:
        start, full, cells = work[part["panel"]]
        return [start + full * fraction] * cells

    monkeypatch.setattr(bench_hours, "seconds_of_cells", seconds_of_cells)
    monkeypatch.setattr(bench_hours, "number_of_cell_processes", lambda asked, cells: min(2, cells))
    parts = {"first": {"panel": "a", "full": {}}, "second": {"panel": "b", "full": {}, "fractions": [0.1, 0.3]}}
    cfg = OmegaConf.create({"parts": parts, "fractions": [0.01, 0.02], "cell_folder": str(tmp_path)})
    hours = bench_hours.run(cfg)
    assert hours["first_hours"] == pytest.approx(3 * 362 / 3600) and hours["second_hours"] == pytest.approx(0.2)
    assert hours["hours_on_all_cores"] == pytest.approx((3 * 362 / 3600 + 0.2) / 2)
    assert hours["hours_on_all_cores_from_larger"] == pytest.approx((3 * (2 / 0.02 + 360) + 720) / 3600 / 2)
    assert [row["cells"] for row in json.loads((tmp_path / "table.json").read_text())["rows"]] == [3, 1]


def test_the_parts_of_a_panel_are_its_grid():
    """Each cell is in one part, with a fraction of its own work."""
    hours = configured("bench_hours", "scale=paper")
    parts = hours.parts
    for panel in {part.panel for part in parts.values()}:
        cfg = configured(panel, "scale=paper")
        cells = [
            cell
            for part in parts.values()
            if part.panel == panel
            for fraction in part.get("fractions", hours.fractions)[1:]
            for cell in cells_of(cfg.grid.paper, bench_hours.overrides(part, fraction))
        ]
        axes = {key for block in cfg.grid.paper for key in block} - {"steps", "log_every"}
        named = {tuple(sorted(word for word in cell if word.split("=")[0] in axes)) for cell in cells}
        assert len(named) == len(cells) == len(cells_of(cfg.grid.paper, []))
        for cell in (cells[0], cells[-1]):
            small = configured(panel, "scale=paper", *cell)
            assert small.steps <= 3_000 and small.steps % small.log_every == 0


# ---- the report


def write_benchmark(outputs: Path, name: str) -> Path:
    folder = outputs / name / "demo" / "base"
    folder.mkdir(parents=True)
    record = {
        "experiment": name, "scale": "demo", "seed": 0, "commit": "0123456789ab", "device": "cpu",
        "versions": {"torch": "2.13.0"}, "started": "2026-01-01T00:00:00Z", "seconds": 2.0,
        "metrics": {"batchtopk_m64_over_product": 1.5}, "config": {"seed": 0},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def test_the_report_shows_the_table_that_lies_beside_the_results(tmp_path, capsys):
    folder = write_benchmark(tmp_path, "bench_fleet")
    save_table(
        folder, [{"way": "fleet", "s": 12.3456}, {"way": "alone", "rate": 12345.6}], ["Some CPU, 1 of 2 threads"]
    )
    assert compare.main(["--outputs", str(tmp_path), "--no-kept"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| fleet | 12.35 |  |" in text and "| alone |  | 12,346 |" in text and "- Some CPU, 1 of 2 threads" in text


def test_figures_are_drawn_for_steps_and_scaling(tmp_path):
    steps = write_benchmark(tmp_path, "bench_train_step")
    times = Times({"step": [2.0, 2.2], "product": [1.0, 1.0]})
    rows = [bench_train_step.Row(who, "batchtopk", 64, times, "1.0") for who in ("ours", "dense", "saelens")]
    save_table(steps, [row.line(4) for row in rows], ["a CPU", "B 4"])
    scaling = write_benchmark(tmp_path, "bench_scaling")
    points = [
        {"axis": a, "value": v, "over_product": 2.0, "quartile1": 1.9, "quartile3": 2.2}
        for a in bench_scaling.AXES
        for v in (1, 2)
    ]
    fleets = [{"axis": "n_dictionaries", "value": v, "rows_per_second": 10.0} for v in (1, 2)]
    pd.DataFrame([*points, *fleets]).to_parquet(scaling / bench_scaling.CURVES)
    for cell in read_cells(tmp_path):
        drawn = figures.draw(cell.experiment, [cell], tmp_path / "figures")
        assert [path.suffix for path in drawn] == [".png", ".svg"] and all(path.stat().st_size for path in drawn)
