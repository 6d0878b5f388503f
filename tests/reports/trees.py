"""Small trees of results, whole and damaged, for the tests of the report."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SIZES, KS = (256, 512), (8, 16)
RECORD = {
    "commit": "0123456789ab", "device": "cpu", "versions": {"torch": "2.13.0"}, "started": "2026-01-01T00:00:00Z",
    "seconds": 2.0,
}  # fmt: skip
COUNTS = {"l0": range(14), "count": [0, 5, 0, 60, *[0] * 8, 35, 0], "count_without_bos": [0, 0, 0, 60, *[0] * 8, 35, 0]}


def write_cell(
    folder: Path, experiment: str, metrics: dict[str, Any], config: dict[str, Any], scale: str = "demo", seed: int = 0
) -> Path:
    """One results.json in `<folder>/<experiment>/<scale>/<number>`."""
    place = folder / experiment / scale
    place = place / f"cell={len(list(place.glob('*')))},seed={seed}"
    place.mkdir(parents=True)
    record = {"experiment": experiment, "scale": scale, "seed": seed, **RECORD, "metrics": metrics}
    (place / "results.json").write_text(json.dumps({**record, "config": {"seed": seed, **config}}))
    return place


def batchtopk(outputs: Path, **changes: Any) -> list[Path]:
    """A grid of leask_batchtopk: two methods, two sizes, two k, two seeds. `changes` to the model's settings."""
    folders = []
    for seed in (0, 1):
        for method in ("topk.TopK", "batchtopk.BatchTopK"):
            for dict_size in SIZES:
                for k in KS:
                    error = 1 - k / 100 - dict_size / 2000 + seed / 1000 - (0.1 if "batch" in method else 0)
                    metrics = {"nmse_token_std": error, "ce_degradation": error / 2, "l0_mean": float(k), "fve": 0.5}
                    config = {
                        "model": {"name": "bundled", "source": None, "revision": None, **changes},
                        "stream": {"site": "resid_pre.4"},
                        "method": {"_target_": f"core.methods.{method}", "dict_size": dict_size, "k": k},
                    }
                    folders.append(write_cell(outputs, "leask_batchtopk", metrics, config, seed=seed))
                    pd.DataFrame(COUNTS).to_parquet(folders[-1] / "l0_histogram.parquet")
    return folders


def stacks(outputs: Path, experiment: str = "oneill_unknown") -> list[Path]:
    """Stacked cells of O'Neill et al. with curves: an SAE, sparse coding from two starts, an MLP; two seeds each."""
    folders = []
    for method, end in (("SAE", 0.57), ("SC", 0.7), ("SC from -2", 0.72), ("MLP32", 0.62)):
        metrics = {"latent_mcc": end, "dict_mcc": 0.5 + end / 2, "latent_mcc_chance": 0.3, "dict_mcc_chance": 0.6}
        config = {
            "seeds": [0, 1], "task": experiment.removeprefix("oneill_"), "profile": "repo", "objective": "cosine",
            "source": {"N": 16, "M": 8, "K": 3, "per_run": False}, "coder": {"bias": False, "l1": 0.01, "k": None},
        }  # fmt: skip
        folder = write_cell(outputs, experiment, metrics, config, "paper")
        names = {"coder.name": method, "coder.l1": 0.01, "coder.k": None}
        pd.DataFrame(
            [{"seed": s, **names, **{f"metrics.{n}": v + s / 100 for n, v in metrics.items()}} for s in (0, 1)]
        ).to_parquet(folder / "runs.parquet")
        curves = [
            {
                "seed": seed, **names, "step": step, "latent_mcc": 0.4 + (end - 0.4) * (1 - np.exp(-step / 300)),
                "dict_mcc": 0.6 + (end - 0.4) * (1 - np.exp(-step / 300)) / 2, "lost": 0.0,
                "train_flops_paper": 1e7 * step, "test_flops_paper": 1e6, "train_flops_corrected": 1e6 * step,
                "test_flops_corrected": 1e6,
            }
            for seed in (0, 1) for step in range(0, 2001, 200)
        ]  # fmt: skip
        pd.DataFrame(curves).to_parquet(folder / "curves.parquet")
        folders.append(folder)
    return folders


WEIRD: list[Any] = [
    None, True, False, 0, -1, 1.5, float("nan"), float("inf"), -1e308, 10**400, 2**63, "", "abc", "$x_1$", "$",
    "<script>alert(1)</script>", "a|b", "../../etc", "x" * 300, "\n\n", "\ud83d", "\x00\x1b[31m", "[red]x[/]", "é漢😀",
    [], [1, [2]], {}, {"a": {"b": 1}},
]  # fmt: skip
CONTENTS = [
    b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900, b'{"a": ' + b"9" * 5000 + b"}",
    b"PAR1", b"PAR1PAR1", b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
]  # fmt: skip


def damage(folder: Path, dice: random.Random) -> Path:
    """Damage one file of a cell: its bytes, or its values. Returns the file."""
    path = dice.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    if dice.random() < 0.3:
        path.write_bytes(_damaged_bytes(path.read_bytes(), dice))
    elif path.suffix == ".json":
        content = json.loads(path.read_text())
        for _ in range(dice.choice([1, 1, 3])):
            _change(content, dice)
        path.write_text(json.dumps(content))
    else:
        pq.write_table(_changed(pq.read_table(path), dice), path)
    return path


def _damaged_bytes(whole: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(whole))
    kinds: list[Callable[[], bytes]] = [
        lambda: whole[:place],
        lambda: whole[:place] + bytes([whole[place] ^ dice.randrange(1, 256)]) + whole[place + 1 :],
        lambda: whole[:place] + dice.randbytes(8) + whole[place:],
        lambda: dice.choice(CONTENTS),
    ]
    return dice.choice(kinds)()


def _change(content: dict[str, Any], dice: random.Random) -> None:
    """One key somewhere in the object is removed, renamed, or gets another value."""
    parent = dice.choice([content, *_objects(content)])
    key = dice.choice(sorted(parent)) if parent else "new"
    kind = dice.random()
    if kind < 0.2:
        parent.pop(key, None)
    elif kind < 0.3:
        parent[dice.choice(["$a", "<b>", "x" * 300, "a|b", "\n", "\ud800"])] = parent.pop(key, 1)
    else:
        parent[key] = dice.choice(WEIRD)


def _objects(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for value in content.values():
        if isinstance(value, dict):
            yield value
            yield from _objects(value)


def _changed(table: pa.Table, dice: random.Random) -> pa.Table:
    """One column is removed, doubled, or gets another value somewhere or everywhere; or rows are gone."""
    i = dice.randrange(table.num_columns)
    name, values = table.column_names[i], table.column(i).to_pylist()
    kind = dice.random()
    if kind < 0.2:
        return table.remove_column(i)
    if kind < 0.3:
        return table.append_column(name, table.column(i))
    if kind < 0.4:
        return table.slice(0, dice.choice([0, 1]))
    new = dice.choice([float("nan"), float("inf"), -1.0, 0.0, 1e308, 2**40, "abc", "$", None, b"\xff", [1], {"a": 1}])
    place = dice.randrange(len(values))
    try:
        column = pa.array([new if j == place else value for j, value in enumerate(values)])
    except (pa.ArrowException, TypeError):
        column = pa.array([new] * len(values))
    return table.set_column(i, name, column)
