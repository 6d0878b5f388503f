"""results.json and failed.json: one folder per cell, readable by a person, never half-written.

A cell is finished when its folder holds a results.json of the same configuration and of unchanged input files
(`core.inputs`). Settings that cannot change a number (`IGNORED_KEYS`) are not compared.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache, reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core import inputs
from core.artifacts import write_atomically
from core.cells import CHANGES_NO_NUMBER
from core.counts import counting
from core.interrupts import raise_if_interrupted

RESULTS, FAILED = "results.json", "failed.json"
IGNORED_KEYS = (*CHANGES_NO_NUMBER, "at", "grid", "cell_folder", "module")
SCALES = {"smoke", "demo", "paper"}
REPORTED_PACKAGES = ("torch", "pytorch-lightning", "transformers", "datasets", "hydra-core", "numpy", "scikit-learn")

Metrics = Mapping[str, float]


def comparable(cfg: DictConfig) -> dict[str, Any]:
    """The part of a resolved configuration that decides a cell's numbers."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    plain = json.loads(json.dumps(container))
    for key in IGNORED_KEYS:
        *parents, last = key.split(".")
        reduce(lambda node, parent: node.get(parent, {}), parents, plain).pop(last, None)
    return plain


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration without the tables of what differs between scales, which older results have at its top:
    they decide nothing by themselves."""
    return {key: node for key, node in config.items() if not (isinstance(node, dict) and set(node) == SCALES)}


def is_finished(folder: Path, cfg: DictConfig) -> bool:
    """Whether the folder holds results of exactly this configuration and unchanged inputs. Reports changed inputs."""
    stored = read(folder / RESULTS)
    if stored is None or _decisive(stored.get("config") or {}) != comparable(cfg):
        return False
    changed = inputs.changed(stored.get("inputs", {}))
    if changed:
        _print_once(f"{folder} will be run again, since this has changed: {', '.join(changed)}")
    return not changed


@cache
def _print_once(message: str) -> None:
    """At most once in a process."""
    print(message, file=sys.stderr)


def read(path: Path) -> dict[str, Any] | None:
    """The content of a result file, or None if it is missing or unreadable."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None


def read_all(root: Path, name: str = RESULTS) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, content) of every result file below `root`, sorted by path."""
    for path in sorted(root.rglob(name)):
        content = read(path)
        if content is not None:
            yield path.parent, content


def run_cell(cfg: DictConfig, folder: Path, run: Callable[[DictConfig], Metrics]) -> None:
    """Run one cell and write results.json. If it fails, writes failed.json and raises the error again."""
    started = time.time()
    try:
        with inputs.noting() as noted, counting() as counts:
            metrics = run(cfg)
        metrics = _checked({**counts, **metrics})
        record = {**_provenance(cfg, started), "metrics": metrics, "config": comparable(cfg)}
        if noted:
            record["inputs"] = noted
        write_atomically(folder / RESULTS, json.dumps(record, indent=1))
        (folder / FAILED).unlink(missing_ok=True)
    except Exception as error:
        raise_if_interrupted(error)
        record_failure(cfg, folder, error, started)
        raise


def record_failure(cfg: DictConfig, folder: Path, error: Exception, started: float) -> None:
    """Write failed.json, with the error's traceback if it has one. `started` is a `time.time`."""
    record = {
        **_provenance(cfg, started),
        "error": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        write_atomically(folder / FAILED, json.dumps(record, indent=1))
    except OSError as unwritable:  # such as a full disk; the cell's own error is still raised
        print(f"could not write {folder / FAILED}: {unwritable}", file=sys.stderr)


def _checked(metrics: Metrics) -> dict[str, float]:
    for name, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RuntimeError(f"The metric {name} is {value!r}; it must be a finite number.")
    return dict(metrics)


def _provenance(cfg: DictConfig, started: float) -> dict[str, Any]:
    return {
        "experiment": cfg.name,
        "scale": cfg.scale,
        "seed": cfg.seed,
        "commit": _commit(),
        "device": _device(),
        "versions": _versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 3),
    }


@cache
def _commit() -> str:
    """The commit of the code, with `-dirty` if tracked files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
