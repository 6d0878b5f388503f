"""results.json and failed.json: one folder per cell, readable by a person, never half-written.

A cell is finished when its folder holds a results.json of the same configuration and of unchanged inputs
(`core.inputs`), and every file beside it that results.json lists is still as it was written. Settings that cannot
change a number (`IGNORED_KEYS`) are not compared.

A cell that runs again first takes back its old results.json, then the files that this lists. So a run that is killed at
any moment leaves a cell that is finished and whole, or one that runs again.
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
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from core import inputs
from core.atomic import NOT_A_LIST, damage, noting_files, remove_leftovers, sync, write_atomically
from core.cells import CHANGES_NO_NUMBER
from core.counts import counting
from core.errors import UserError, lack_of_memory
from core.interrupts import raise_if_interrupted
from core.reading import read_object
from core.remarks import remarking

RESULTS, FAILED = "results.json", "failed.json"
TAKEN_BACK = ".taken_back.json"  # a results.json whose files are being removed
IGNORED_KEYS = (*CHANGES_NO_NUMBER, "at", "grid", "cell_folder", "module")
SCALES = {"smoke", "demo", "paper"}
REPORTED_PACKAGES = ("torch", "pytorch-lightning", "transformers", "datasets", "hydra-core", "numpy", "scikit-learn")

Metrics = Mapping[str, float]


class Moment(NamedTuple):
    """A time of day, and a clock that nobody can set back."""

    time: float
    monotonic: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.time(), time.monotonic())


def comparable(cfg: DictConfig) -> dict[str, Any]:
    """The part of a resolved configuration that decides a cell's numbers."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    plain = json.loads(json.dumps(container))
    for key in IGNORED_KEYS:
        *parents, last = key.split(".")
        reduce(lambda node, parent: node.get(parent, {}), parents, plain).pop(last, None)
    without_places: dict[str, Any] = _without_places(plain)
    return without_places


def _without_places(node: Any) -> Any:
    """A configuration without the folder of the store, at any depth: what lies there is known by its content."""
    if isinstance(node, list):
        return [_without_places(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_places(value) for key, value in node.items() if key != "artifacts_dir"}


def _decisive(config: Any) -> dict[str, Any]:
    """A stored configuration without what older results have in it and decides nothing: the folder of the store, and
    at its top the tables of what differs between scales."""
    config = _without_places(config)
    items = config.items() if isinstance(config, dict) else ()
    return {key: node for key, node in items if not (isinstance(node, dict) and set(node) == SCALES)}


def is_finished(folder: Path, cfg: DictConfig) -> bool:
    """Whether the folder holds results of exactly this configuration, with unchanged inputs and whole files. Reports
    why results of this configuration do not count."""
    stored = read(folder / RESULTS)
    if stored is None or _decisive(stored.get("config")) != comparable(cfg):
        return False
    if wrong := damage_of(folder, stored):
        _print_once(f"{folder} will be run again: {wrong}")
        return False
    try:
        changed, gone = inputs.changed(stored.get("inputs", {}))
    except NOT_A_LIST:
        changed, gone = [f"the list of inputs in {RESULTS}"], []
    if changed:
        _print_once(f"{folder} will be run again, since this has changed: {', '.join(changed)}")
    elif gone:
        _print_once(f"{folder} stays finished, though these files that it read are gone: {', '.join(gone)}")
    return not changed


def damage_of(folder: Path, record: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with the files beside a results.json, in a few words; None if they are whole. Results made before
    files were listed are taken as they are. `record`: the content of results.json, read if it is not given."""
    try:
        return damage(folder, (record or read(folder / RESULTS) or {}).get("files", {}))
    except NOT_A_LIST:
        return f"the list of files in {RESULTS} cannot be read"
    except OSError as error:
        return str(error)


@cache
def _print_once(message: str) -> None:
    """At most once in a process."""
    print(message, file=sys.stderr)


def read(path: Path) -> dict[str, Any] | None:
    """The content of a result file, or None if it is missing or unreadable."""
    try:
        return read_object(path)
    except UserError:
        return None


def read_all(root: Path, name: str = RESULTS) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, content) of every result file below `root`, sorted by path; none from hidden folders."""
    for path in sorted(root.rglob(name)):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        content = read(path)
        if content is not None:
            yield path.parent, content


def run_cell(cfg: DictConfig, folder: Path, run: Callable[[DictConfig], Metrics]) -> None:
    """Take back earlier results, run the cell, and write results.json. If it fails, writes failed.json and raises the
    error again."""
    started = Moment.now()
    take_back(folder)
    try:
        with inputs.noting() as noted, noting_files(folder) as written, counting() as counts, remarking() as said:
            metrics = run(cfg)
        metrics = _checked({**counts, **metrics})
        record = {**_provenance(cfg, started), "metrics": metrics, "config": comparable(cfg)}
        if noted:
            record["inputs"] = noted
        files = {name: entry for name, entry in sorted(written.items()) if (folder / name).is_file()}
        if files:
            record["files"] = files
        if said:
            record["remarks"] = said
        write_atomically(folder / RESULTS, json.dumps(record, indent=1))
        (folder / FAILED).unlink(missing_ok=True)
    except Exception as error:
        raise_if_interrupted(error)
        shortage = lack_of_memory(error)
        record_failure(cfg, folder, shortage or error, started)
        if shortage:
            raise shortage from error
        raise


def take_back(folder: Path) -> None:
    """Remove what an earlier run left: results.json first, then the files that it lists, and unfinished ones."""
    if not folder.is_dir():
        return
    taken_back = folder / TAKEN_BACK
    if (folder / RESULTS).is_file():
        (folder / RESULTS).replace(taken_back)
        sync(folder)
    files = (read(taken_back) or {}).get("files")
    for name in files if isinstance(files, dict) else ():
        file = folder / name
        if file.is_file() and file.resolve().is_relative_to(folder.resolve()):  # what was exported elsewhere stays
            file.unlink()
    taken_back.unlink(missing_ok=True)
    remove_leftovers(folder)


def record_failure(cfg: DictConfig, folder: Path, error: Exception, started: Moment) -> None:
    """Write failed.json, with the error's traceback if it has one."""
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


def _provenance(cfg: DictConfig, started: Moment) -> dict[str, Any]:
    return {
        "experiment": cfg.name,
        "scale": cfg.scale,
        "seed": cfg.seed,
        "commit": _commit(),
        "device": _device(),
        "versions": _versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started.time)),
        "seconds": round(time.monotonic() - started.monotonic, 3),
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
