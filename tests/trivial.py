"""An experiment for tests of the command line: a table, a page and one number, at once."""

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from core.atomic import write_atomically, write_table


def run(cfg: DictConfig) -> dict[str, float]:
    folder = Path(cfg.cell_folder)
    write_table(pd.DataFrame({"x": range(5_000)}), folder / "table.parquet")
    write_atomically(folder / "page.html", f"<p>{cfg.seed}</p>")
    return {"seed": float(cfg.seed)}
