"""The figure of bench_quality has a line for each peer and learning rate, and leaves out cells without a peer."""

from pathlib import Path
from typing import Any

from matplotlib.container import ErrorbarContainer

from reports.collect import Cell
from reports.figures import bench_quality


def cell(**changes: Any) -> Cell:
    settings = {"kind": "batchtopk", "k": 16, "n_steps": 512, "lr": 0.002, "dict_size": 512} | changes
    metrics = settings.pop("metrics", {"over_saelens": 0.9, "over_saelens_low": 0.85, "over_saelens_high": 0.95})
    return Cell("bench_quality", "demo", 0, Path("nowhere"), metrics, settings, {})


def test_a_point_is_the_ratio_with_its_interval():
    assert bench_quality.ratio_of(cell(), "saelens") == (512.0, 0.9, 0.85, 0.95)
    assert bench_quality.ratio_of(cell(metrics={"over_saelens": 0.9}), "saelens") == (512.0, 0.9, 0.9, 0.9)
    assert bench_quality.ratio_of(cell(), "dictionary_learning") is None


def test_there_is_a_panel_for_each_method_and_k_and_a_line_for_each_peer_and_rate():
    both = {"over_saelens": 0.9, "over_dictionary_learning": 0.99}
    cells = [cell(k=k, n_steps=n, lr=lr, metrics=both) for k in (8, 16) for n in (512, 1024) for lr in (0.002, 0.004)]
    cells += [cell(kind="topk", k=k) for k in (8, 16)]
    figure = bench_quality.ratios(cells)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["BatchTopK, k 8", "BatchTopK, k 16", "TopK, k 8", "TopK, k 16"]
    lines = [sum(isinstance(c, ErrorbarContainer) for c in axes.containers) for axes in figure.axes]
    assert lines == [4, 4, 1, 1]


def test_cells_without_a_peer_have_no_figure():
    assert list(bench_quality.drawings([cell(metrics={"fvu_ours": 0.2})])) == []
    [drawing] = bench_quality.drawings([cell(metrics={"fvu_ours": 0.2}), cell()])
    assert drawing.name == "bench_quality_demo_512" and len(drawing.cells) == 1
