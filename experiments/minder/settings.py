"""The settings that the experiments of Minder et al. 2025 add to the shared ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from core.checked import Checked, at_least


@dataclass(frozen=True, kw_only=True)
class PlantedSettings(Checked):
    """Rows that a crosscoder is measured on."""

    node: ClassVar[str] = ""
    n_heldout: int = at_least(2)
