"""`method=pretrained`: a dictionary from a folder or from the Hugging Face hub, in any supported format.

Only the files of one dictionary are fetched from a repository, at one commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from core.errors import UserError
from core.input_norm import CONSTANT, Normalisation
from core.inputs import note_commit, note_file
from core.interop import crosscoder, dictionary_learning, gemma_scope, meta_saes, native, saelens, sparsify
from core.interop.hooks import check_names, check_site, hook_of
from core.interop.hub import Formats, dictionary_folder
from core.interop.trained_on import check_identity, check_model
from core.interop.training_facts import told
from core.methods.batchtopk import BatchTopK
from core.methods.dictionary import Dictionary
from core.methods.pretrained import Pretrained, at_inference
from core.methods.pretrained_crosscoder import PretrainedCrosscoder
from core.reading import optional_field
from core.remarks import remark

Format = Literal[
    "auto", "saelens", "gemma_scope", "dictionary_learning", "sparsify", "meta_saes", "crosscoder", "native"
]
NEEDED: dict[str, tuple[str, ...]] = {  # by format: required files, the most distinctive first
    "saelens": (saelens.WEIGHTS, saelens.CFG),
    "sparsify": (sparsify.WEIGHTS, sparsify.CFG),
    "gemma_scope": (gemma_scope.PARAMS,),
    "dictionary_learning": (dictionary_learning.WEIGHTS, dictionary_learning.CONFIG),
    "meta_saes": (meta_saes.WEIGHTS, meta_saes.CONFIG),
    "native": (native.MANIFEST, native.WEIGHTS),
}
OPTIONAL = {"saelens": (saelens.SCALER, saelens.SPARSITY)}
PAIRS = "Crosscoders are read with method=pretrained_crosscoder, in experiments on pairs of models."
CROSSCODER: Formats = {name: ((name,), (crosscoder.TRAINER, crosscoder.CONFIG)) for name in crosscoder.WEIGHTS}


def load(
    d_model: int | None,
    repo: str,
    path: str | None = None,
    revision: str | None = None,
    format: Format = "auto",
    site: str | None = None,
    model: Mapping[str, Any] | None = None,
    dict_size: int | None = None,
    input_norm: Normalisation | None = None,
    norm_scaling_factor: float | Sequence[float] | None = None,
    threshold: float | None = None,
    n_models: int = 1,
) -> Dictionary:
    """A dictionary for inference, on the CPU.

    repo, path           a name on the hub or a local folder, and the folder within it (or its `params.npz`, or a
                         crosscoder's file)
    revision             commit, tag or branch on the hub; ignored for a local folder
    format               `auto` detects it from the file names; `native` is a dictionary trained here (its folder in the
                         store, or the folder of a cell that used it)
    d_model, dict_size   checked against the files, if given
    site                 our name of the site, checked if the files have theirs; None for no check
    model                the language model in use, as in conf/model; checked if the files name theirs; None: no check
    input_norm           used if the files have none: `token_center` for dictionaries of a model with centred writing
                         weights whose cfg.json is older than that setting
    norm_scaling_factor  see `core.interop.saelens.read`; two numbers for `core.interop.crosscoder.read`
    threshold            see `core.interop.meta_saes.read`
    n_models             2 for a crosscoder

    What the files say of its training is in `source` (`core.interop.training_facts`), and remarked where it changes the
    meaning of figures. Raises UserError if the dictionary cannot be read, or does not fit the arguments.
    """
    if format not in get_args(Format):
        raise UserError(f"method.format: {format!r} is not one of {', '.join(get_args(Format))}.")
    pair = n_models > 1
    if pair and format not in ("auto", "crosscoder", "native"):
        raise UserError(f"method.format: {format} has dictionaries of one model; a crosscoder is of {n_models}.")
    formats: Formats = {
        **{name: (files, OPTIONAL.get(name, ())) for name, files in NEEDED.items() if not pair or name == "native"},
        **(CROSSCODER if pair else {}),
    }
    if format not in ("auto", "crosscoder"):
        formats = {format: formats[format]}
    file = PurePosixPath(path or "").name
    if file in CROSSCODER and pair:
        formats = {file: CROSSCODER[file]}
    folder, commit = dictionary_folder(repo, path, revision, formats, only_first=pair)
    kind = _pair_format(folder, format) if pair else _format(folder, format)
    _note(folder, kind, repo, revision, commit)
    if not pair:
        check_names(site, repo, path)
    try:
        if kind == "crosscoder":
            method: Dictionary = crosscoder.read(
                folder / file if file in CROSSCODER else folder, _pair(norm_scaling_factor)
            )
        else:
            method = _read(folder, kind, repo, path, norm_scaling_factor, threshold)
    except UserError as error:
        raise error if str(folder) in str(error) else UserError(f"{folder}: {error}") from error
    _require_models(method, n_models, folder)
    if isinstance(method, Pretrained | PretrainedCrosscoder):
        method.source |= {"repo": repo, "path": path, "revision": commit}
        check_site(optional_field(method.source, "hook", str, f"{folder}: its source"), site)
        check_model(optional_field(method.source, "model", str, f"{folder}: its source"), model)
        where = repo if path is None else f"{repo}, {path}"
        if sentence := told(optional_field(method.source, "trained", dict, where) or {}, where):
            remark(sentence)
    elif kind == "meta_saes":
        check_site(meta_saes.hook(folder), site)
    if kind == "native":
        trained_on, identity = native.site(folder), native.model(folder)
        check_site(trained_on and hook_of(trained_on), site)
        check_identity(identity, model)
    for name, stated, actual, remedy in (
        ("model.d_model", d_model, method.d_model, "Choose the model that it was trained on (model=...)"),
        ("method.dict_size", dict_size, method.dict_size, "Set method.dict_size=null to accept any size"),
    ):
        if stated not in (None, actual):
            raise UserError(f"{name} is {stated}, but the dictionary in {folder} has {actual}. {remedy}.")
    return method if input_norm is None else _with_norm(method, input_norm, folder)


def is_one(repo: str, path: str | None) -> bool:
    """Whether a repository and a path name one dictionary by themselves: there is a path, or the repository is a local
    folder with the files of one."""
    folder = Path(repo).expanduser()
    return path is not None or (folder.is_dir() and bool(_present(folder)))


def _require_models(method: Dictionary, n_models: int, folder: Path) -> None:
    held = method.input_shape[0] if len(method.input_shape) > 1 else 1
    if held != n_models:
        what = f"a crosscoder of {held} models" if held > 1 else "a dictionary of one model"
        raise UserError(f"method.repo: {folder} contains {what}, and this experiment needs one of {n_models}. {PAIRS}")


def _pair(factors: float | Sequence[float] | None) -> Sequence[float] | None:
    return [factors] if isinstance(factors, int | float) else factors


def _read(
    folder: Path,
    format: str,
    repo: str,
    path: str | None,
    norm_scaling_factor: float | Sequence[float] | None,
    threshold: float | None,
) -> Dictionary:
    for name, value, user in (
        ("norm_scaling_factor", norm_scaling_factor, "saelens"),
        ("threshold", threshold, "meta_saes"),
    ):
        if value is not None and format != user:
            raise UserError(f"method.{name}: the format {format} does not use it. Set it to null.")
    if format == "saelens":
        if norm_scaling_factor is not None and not isinstance(norm_scaling_factor, int | float):
            raise UserError(f"method.norm_scaling_factor: {norm_scaling_factor!r} is not one number.")
        return saelens.read(folder, norm_scaling_factor)
    if format == "gemma_scope":
        return gemma_scope.read(folder / gemma_scope.PARAMS, repo, path or "")
    if format == "dictionary_learning":
        return dictionary_learning.read(folder)
    if format == "meta_saes":
        return _thresholded(meta_saes.read(folder, threshold), folder)
    return sparsify.read(folder) if format == "sparsify" else native.read(folder)


def _thresholded(method: BatchTopK, folder: Path) -> BatchTopK:
    if method.threshold.isnan():
        raise UserError(
            f"method.threshold: {folder} contains a BatchTopK dictionary without the threshold that inference needs. "
            "Set one (the authors used 0.153 for the released meta-SAE of 2304 latents)."
        )
    return method


def _note(folder: Path, kind: str, repo: str, revision: str | None, commit: str | None) -> None:
    """Record that the running cell's results depend on this commit, or on these files."""
    if commit is not None:
        note_commit(repo, revision or "main", commit)
        return
    names = (*crosscoder.WEIGHTS, crosscoder.TRAINER, crosscoder.CONFIG) if kind == "crosscoder" else NEEDED[kind]
    files = [folder / name for name in (*names, *OPTIONAL.get(kind, ()))]
    if kind == "native":
        files = [folder / native.POINTER, *(native.stored(folder) / name for name in NEEDED[kind])]
    if kind == "sparsify" and (run := sparsify.run_config(folder)):
        files.append(run)
    for file in files:
        if file.is_file():
            note_file(file)


def _with_norm(method: Dictionary, input_norm: Normalisation, folder: Path) -> Pretrained:
    if method.norm.kind not in ("none", input_norm):
        raise UserError(
            f"method.input_norm={input_norm}: the dictionary in {folder} has its own input normalisation, "
            f"{method.norm.kind}. Set method.input_norm=null."
        )
    if input_norm in CONSTANT:
        raise UserError(
            f"method.input_norm={input_norm} needs a measured constant, which a loaded dictionary lacks. Set it to "
            "null."
        )
    m = at_inference(method)
    threshold = m.threshold if m.settings.activation == "jumprelu" else None
    options: dict[str, Any] = {
        "activation": m.settings.activation,
        "k": m.settings.k,
        "subtract_b_dec": m.settings.subtract_b_dec,
        "source": m.source,
    }
    return Pretrained.of(m.W_enc, m.W_dec, m.b_enc, m.b_dec, threshold=threshold, input_norm=input_norm, **options)


def _format(folder: Path, stated: Format) -> str:
    """The format of the files in a folder, checked if it is given."""
    present = _present(folder)
    if stated in present:
        return stated
    if stated == "auto" and len(present) == 1:
        return present[0]
    held = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) if folder.is_dir() else ""
    if stated == "auto" and len(present) > 1:
        raise UserError(f"method.format: {folder} has the files of {' and '.join(present)}. Set it to one of these.")
    if stated == "auto" and any((folder / file).is_file() for file in crosscoder.WEIGHTS):
        raise UserError(f"method.repo: {folder} seems to contain a crosscoder of two models. {PAIRS}")
    wanted = NEEDED if stated == "auto" else {stated: NEEDED[stated]}
    needs = "; ".join(f"{name}: {' and '.join(files)}" for name, files in wanted.items())
    raise UserError(
        f"method.path: {folder} lacks the files of a dictionary ({needs}). It contains: {held or 'nothing'}."
    )


def _pair_format(folder: Path, stated: Format) -> str:
    """The format of a crosscoder's files: of ours if the folder has them."""
    ours = (folder / native.POINTER).is_file() or all((folder / name).is_file() for name in NEEDED["native"])
    return "native" if stated == "native" or (stated == "auto" and ours) else "crosscoder"


def _present(folder: Path) -> list[str]:
    """The formats whose files a folder holds."""
    present = [name for name, files in NEEDED.items() if all((folder / file).is_file() for file in files)]
    return [*present, "native"] if (folder / native.POINTER).is_file() else present
