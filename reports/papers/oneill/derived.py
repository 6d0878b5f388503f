"""FLOPs at which a method passes the SAE: the crossings of fig. 2b, 3b, 4c and 4d of O'Neill et al. 2025.

A method passes a level of the SAE's mean curve over seeds, at equal settings. The level is the final value where codes
are known (the curve rises to a plateau), else the best value. Curves are interpolated linearly between their points. A
curve has no crossing if it never passes the level, or if it is above it from its first point on. The published
crossings are those of mean curves. Crossings of single runs show the spread, without the runs that never pass. Two more
crossings explain differences from the published ones: those of runs that lost no code, and those of the published
level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from reports.collect import Cell
from reports.papers.oneill.curves import SETTINGS, curve_of, total_flops

BASELINE = "SAE"
MODES = ("paper", "corrected")
NAMES = {"latent_mcc": "crossing_flops", "dict_mcc": "dict_crossing_flops"}
# the best of the SAE's mean curve in the authors' file of 40,000 steps
PUBLISHED = {"oneill_unknown": {"latent_mcc": 0.566}}
_PLATEAU = ("plateau_crossing_flops", "plateau_crossing_flops_corrected")
_CROSSING = tuple(f"crossing_flops_{mode}" for mode in MODES)
_DICT_CROSSING = tuple(f"dict_{name}" for name in _CROSSING)
# experiment -> the derived metrics that claims and tables may read
METRICS = {
    "oneill_known_codes": (
        *_PLATEAU,
        *(f"mean_{name}" for name in _PLATEAU),
        *(f"whole_{name}" for name in _PLATEAU),
    ),
    "oneill_known_dictionary": (*_CROSSING, *(f"mean_{name}" for name in _CROSSING)),
    "oneill_unknown": (
        *_CROSSING,
        *_DICT_CROSSING,
        *(f"mean_{name}" for name in (*_CROSSING, *_DICT_CROSSING)),
        *(f"mean_{name}_at_published" for name in _CROSSING),
    ),
}
FEWEST_POINTS = 10  # of a curve that may be interpolated

Group = tuple[Any, ...]


def derive(cells: Iterable[Cell]) -> list[Cell]:
    """The cells in their order. Runs that have a crossing get it as a further metric.

    crossing_flops_<mode>, dict_crossing_flops_<mode>  training and one inference; latents, dictionary
    plateau_crossing_flops[_corrected]                 training alone, where the codes are known
    whole_plateau_crossing_flops[_corrected]           the same, for runs that have lost no code at their end
    mean_<any of these>                                of the mean curve over seeds, equal for all of them
    mean_crossing_flops_<mode>_at_published            of the mean curve, where it passes the level in `PUBLISHED`
    """
    cells = list(cells)
    curves = {id(cell): curve for cell in cells if (curve := _readable(cell)) is not None}
    levels = sae_levels([cell for cell in cells if id(cell) in curves and cell.method == BASELINE])
    stacks: dict[Group, list[pd.DataFrame]] = defaultdict(list)
    for cell in cells:
        if id(cell) in curves:
            stacks[_stack_of(cell)].append(curves[id(cell)])
    means = {
        stack: pd.concat(of).groupby("step", as_index=False).mean(numeric_only=True) for stack, of in stacks.items()
    }
    extended = []
    for cell in cells:
        level = levels.get(group_of(cell), {})
        if id(cell) in curves and level and cell.method != BASELINE:
            of_mean = _crossings(cell, means[_stack_of(cell)], level)
            published = _crossings(cell, means[_stack_of(cell)], PUBLISHED.get(cell.experiment, {}))
            of_mean |= {f"{name}_at_published": at for name, at in published.items()}
            own = _crossings(cell, curves[id(cell)], level)
            if "lost" in curves[id(cell)] and not curves[id(cell)]["lost"].iloc[-1]:
                own |= {f"whole_{name}": at for name, at in own.items() if name.startswith("plateau")}
            own |= {f"mean_{name}": at for name, at in of_mean.items()}
            cell = replace(cell, metrics={**own, **cell.metrics})
        extended.append(cell)
    return extended


def sae_levels(cells: Sequence[Cell]) -> dict[Group, dict[str, float]]:
    """Group -> metric -> the level to pass, from the curves of the SAE's runs."""
    groups: dict[Group, list[pd.DataFrame]] = defaultdict(list)
    known_codes = {group_of(cell) for cell in cells if cell.get("task") == "known_codes"}
    for cell in cells:
        if (curve := curve_of(cell)) is not None:
            groups[group_of(cell)].append(curve)
    levels: dict[Group, dict[str, float]] = {}
    for group, curves in groups.items():
        table = pd.concat(curves)
        means = {name: table.groupby("step")[name].mean() for name in NAMES if name in table}
        levels[group] = {n: float(m.iloc[-1] if group in known_codes else m.max()) for n, m in means.items()}
    return levels


def group_of(cell: Cell) -> Group:
    """The settings that a method and the SAE must share to be compared."""
    return (cell.experiment, cell.scale, *(cell.get(key) for key in (*SETTINGS, "coder.l1")))


def _stack_of(cell: Cell) -> Group:
    """What runs share that differ in their seed alone."""
    return (cell.folder, cell.method, cell.get("coder.k"), *group_of(cell))


def crossing(flops: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Where the curve first passes the level from below; None if it does not."""
    above = np.asarray(values) > level
    if above[0] or not above.any():
        return None
    at = int(above.argmax())
    share = (level - values[at - 1]) / (values[at] - values[at - 1])
    return float(flops[at - 1] + share * (flops[at] - flops[at - 1]))


def _readable(cell: Cell) -> pd.DataFrame | None:
    curve = curve_of(cell) if cell.method else None
    return curve if curve is not None and "latent_mcc" in curve and len(curve) >= FEWEST_POINTS else None


def _crossings(cell: Cell, curve: pd.DataFrame, levels: dict[str, float]) -> dict[str, float]:
    flops: dict[str, float | None] = {}
    for metric, level in levels.items():
        if metric in curve:
            for mode in MODES:
                values = curve[metric].to_list()
                if cell.get("task") == "known_codes":
                    name = "plateau_crossing_flops" + ("" if mode == "paper" else f"_{mode}")
                    flops[name] = crossing(curve[f"train_flops_{mode}"].to_list(), values, level)
                else:
                    flops[f"{NAMES[metric]}_{mode}"] = crossing(total_flops(curve, mode).to_list(), values, level)
    return {name: value for name, value in flops.items() if value is not None}
