"""Write a trained or loaded dictionary as a SAELens folder, read it back, and score both on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig

from core.analysis.evaluate import evaluate_dictionaries
from core.artifacts import MANIFEST as ARTIFACT
from core.atomic import note_outside
from core.building import plain
from core.errors import UserError
from core.fleet import Request
from core.interop import native, saelens
from core.methods.dictionary import Dictionary
from core.methods.pretrained import Pretrained
from core.models.identity import model_label
from core.reading import read_object
from experiments.common import held_out, is_loaded, requests, trained
from experiments.tools.settings import ExportSettings

SETTINGS = ExportSettings

SCORES = ("l0_mean", "nmse_raw_energy", "nmse_token_std", "ce_degradation")


def dictionaries(cfg: DictConfig) -> list[Request]:
    """What the fleet trains for this cell; nothing if the dictionary is loaded."""
    return requests(cfg)


def check(cfg: DictConfig) -> None:
    """Raises UserError for a folder that holds files, and for a method that the format cannot hold."""
    if cfg.export.folder is not None:
        target(cfg)
    if not is_loaded(cfg.method):
        saelens.check_writable(get_class(cfg.method["_target_"]), cfg.method.input_norm, cfg.export.centred_model)


def run(cfg: DictConfig) -> dict[str, float]:
    """L0, errors and loss of the dictionary and of the exported one (`_exported`). `log_sparsity` is measured on the
    same held-out text."""
    folder = target(cfg)
    method = trained(cfg)
    text = held_out(cfg)
    name = made_for(method) or model_label(cfg.model)
    centred, trained_on = cfg.export.centred_model, rows_of_training(cfg)
    saelens.write(method, folder, model=name, site=text.site, centred_model=centred, trained=trained_on)
    evaluations = evaluate_dictionaries({"": method, "_exported": saelens.read(folder).to(text.lm.device)}, text)
    log_sparsity = (evaluations[""].sparsity.frequencies() + 1e-10).log10().float()
    saelens.write_log_sparsity(log_sparsity, folder)
    note_outside(file for file in folder.iterdir() if file.is_file())
    scores = {name: evaluation.metrics() for name, evaluation in evaluations.items()}
    return {score + name: values[score] for name, values in scores.items() for score in SCORES if score in values}


def made_for(method: Dictionary) -> str | None:
    """The language model that the files of a loaded dictionary name."""
    return method.source.get("model") if isinstance(method, Pretrained) else None


def rows_of_training(cfg: DictConfig) -> dict[str, Any] | None:
    """How the rows of text began that a dictionary of ours was trained on; None for one that was made elsewhere. In
    `concat`, a beginning-of-text token opens documents and not rows."""
    stream = plain(cfg.stream)
    if is_loaded(cfg.method):
        folder = Path(cfg.method.repo).expanduser() / (cfg.method.path or "")
        artifact = native.stored(folder) / ARTIFACT if folder.is_dir() else folder
        spec = read_object(artifact).get("spec") or {} if artifact.is_file() else {}
        stream = spec.get("source", {}).get("batches", {}).get("stream", {})
    if "packing" not in stream:
        return None
    packing = stream["packing"]
    return {"prepend_bos": packing == "per_document", "context_size": stream["n_ctx"], "packing": packing}


def target(cfg: DictConfig) -> Path:
    """The folder to write to. Raises UserError if the user named it and it is not empty."""
    if cfg.export.folder is None:
        return Path(cfg.cell_folder) / "saelens"
    folder = Path(cfg.export.folder).expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not cfg.force:
        raise UserError(f"export.folder={folder} already holds files; choose another folder, or force=true.")
    return folder
