"""The files of a language model: what its folder or repository lists decides what is read, and why something cannot be.

A repository of the hub is listed at one commit before anything else is fetched from it. The files in use then go into
the local cache one by one, and from there on a repository is a folder like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

from core import hub
from core.artifacts import content_key
from core.errors import UserError, chain_of
from core.inputs import file_hash, note_commit, note_file
from core.interrupts import raise_if_interrupted
from core.reading import POINTER, read_object

SHIPPED = {name: Path(__file__).parent / name for name in ("bundled", "bundled_chat")}  # models that come with the code
OFFLINE = "model=bundled needs no network."
CONFIG, WEIGHTS, INDEX, GGUF = "config.json", "model.safetensors", "model.safetensors.index.json", ".gguf"


@dataclass(frozen=True)
class ModelFiles:
    """A folder or a repository at one commit, and what is in it.

    source    `model.source`: a folder, a GGUF file, a name on the hub, or a shipped model
    folder    where the files are, or will be when they are fetched
    sizes     bytes of every file by name; None where only the cache was asked, which does not say what is missing
    repo, revision, commit  on the hub; None for a folder
    gguf      the one GGUF file that `source` names, which then has configuration, tokenizer and weights in it
    """

    source: str
    folder: Path
    sizes: Mapping[str, int | None] = field(repr=False)
    repo: str | None = None
    revision: str = "main"
    commit: str | None = None
    gguf: str | None = None
    is_whole_list: bool = True

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def get(self, names: Iterable[str]) -> list[Path]:
        """The files, fetched first where they are on the hub. Raises UserError for one that cannot be fetched, or is
        not as long as the hub says."""
        return [self.folder / name if self.repo is None else self._fetched(name) for name in names]

    def missing(self, what: str) -> UserError:
        """The error for a part that is not in the list, in the words `what`."""
        if self.is_whole_list:
            return UserError(f"model.source: {self.source} {what}")
        return UserError(
            f"model.source: {self.source} could not be reached, and is not complete in the local cache: {self.folder} "
            f"{what} {OFFLINE}"
        )

    def _fetched(self, name: str) -> Path:
        if not self.is_whole_list:
            return self.folder / name
        assert self.repo is not None
        try:
            path = Path(hf_hub_download(self.repo, name, revision=self.commit))
        except Exception as error:  # errors of the hub, of its HTTP client and of the system have no common base class
            raise_if_interrupted(error)
            raise UserError(_not_fetched(self, name, error)) from error
        n_bytes, wanted = path.stat().st_size, self.sizes[name]
        if wanted is not None and n_bytes != wanted:
            raise UserError(damaged(path, f"it has {n_bytes:,} bytes, the hub lists {wanted:,}"))
        return path

    def digest(self, names: Iterable[str]) -> str:
        """A hash of the content of some files and of their names."""
        return content_key({name: file_hash(path) for name, path in zip(names, self.get(names), strict=True)})

    def note(self, names: Iterable[str]) -> None:
        """Record that the running cell's results depend on these files, or on the commit that they are from."""
        if self.repo is not None:
            assert self.commit is not None
            note_commit(self.repo, self.revision, self.commit)
            return
        for path in self.get(names):
            note_file(path)


def model_files(source: str, revision: str | None) -> ModelFiles:
    """What `model.source` names. Raises UserError for a source that does not exist or cannot be reached."""
    place = SHIPPED.get(source, Path(source).expanduser())
    if place.is_dir():
        return ModelFiles(source, place, {path.name: path.stat().st_size for path in place.iterdir() if path.is_file()})
    if place.is_file():
        if place.suffix != GGUF:
            raise UserError(f"model.source: {place} is a file. Name the folder of a model, or a {GGUF} file.")
        return ModelFiles(source, place.parent, {place.name: place.stat().st_size}, gguf=place.name)
    if source in SHIPPED:
        raise UserError(f"model={source}: {place} is missing. It is part of the repository: git checkout {place}")
    inside_repo = source.endswith(GGUF) and source.count("/") > 1
    if source.startswith(("/", "~", ".")) or ((source.count("/") > 1 or source.endswith(GGUF)) and not inside_repo):
        what = "file" if source.endswith(GGUF) else "folder"
        raise UserError(f"model.source: there is no {what} {place}. {OFFLINE}")
    owner, name, *inner = source.split("/") if "/" in source else ["", source]
    repo = f"{owner}/{name}" if owner else name
    return _of_repository(source, repo, revision or "main", "/".join(inner) or None)


def _of_repository(source: str, repo: str, revision: str, gguf: str | None) -> ModelFiles:
    """A repository at its commit. The hub is asked once, because other calls would try again for minutes. If it does
    not answer, what the local cache has of it is used."""
    if not sys.stderr.isatty() and not are_progress_bars_disabled():
        disable_progress_bars()
    commit = None
    try:
        commit = hub.commit_of(repo, revision)
        sizes: Mapping[str, int | None] = _listed(repo, commit, asked=not hub.is_commit(revision))
        return ModelFiles(source, _cache_folder(repo, commit), sizes, repo, revision, commit, gguf)
    except Exception as error:  # see `ModelFiles._fetched`
        raise_if_interrupted(error)
        folder = None if commit is None else _cached_folder(repo, commit, gguf)
        if folder is None or commit is None:
            raise UserError(_not_reached(source, repo, revision, error)) from error
        held = {str(path.relative_to(folder)): None for path in folder.rglob("*") if path.is_file()}
        return ModelFiles(source, folder, held, repo, revision, commit, gguf, is_whole_list=False)


def _listed(repo: str, commit: str, asked: bool) -> dict[str, int | None]:
    """Bytes by name of all files at a commit. The list is kept in the local cache."""
    problem: Exception | None = None
    if (sizes := _cached_list(repo, commit)) is None:
        if not asked:
            hub.tip(repo, commit)  # fails at once
        try:
            snapshot_download(repo, revision=commit, allow_patterns=[CONFIG])  # keeps the list in the cache
        except Exception as error:  # see `ModelFiles._fetched`
            raise_if_interrupted(error)
            problem = error  # if only the file has failed, it will be asked for by its name
        if (sizes := _cached_list(repo, commit)) is None:
            raise problem or OSError(f"{repo} has no list of files in the local cache")
    return sizes


def _cached_list(repo: str, commit: str) -> dict[str, int | None] | None:
    try:
        return {entry.path: entry.size for entry in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None


def _cache_folder(repo: str, commit: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def _cached_folder(repo: str, commit: str, gguf: str | None) -> Path | None:
    """The folder in the local cache if it has the first file that is needed."""
    first = gguf or CONFIG
    return (
        _cache_folder(repo, commit) if isinstance(try_to_load_from_cache(repo, first, revision=commit), str) else None
    )


def weight_names(files: ModelFiles) -> list[str]:
    """The names of the files with weights. Raises UserError that says what is there instead."""
    if files.gguf is not None:
        if files.gguf not in files:
            raise files.missing(f"has no file {files.gguf}.")
        return [files.gguf]
    if WEIGHTS in files:
        return [WEIGHTS]
    if INDEX in files:
        return _shards(files)
    raise files.missing(_instead_of_weights(files) if files.is_whole_list else f"has no {WEIGHTS}.")


def _shards(files: ModelFiles) -> list[str]:
    """The shards that the index leads to."""
    [path] = files.get([INDEX])
    weight_map = read_part(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"model.source: {path} has no weight_map, which says where the weights are.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not name.endswith(".safetensors") or PurePosixPath(name).name != name:
            raise UserError(
                f"model.source: {path} leads to {name!r}, which is no .safetensors file beside it. Other files are not "
                "read, since pickled weights can run code."
            )
    absent = [name for name in names if name not in files]
    if absent:
        raise files.missing(
            f"is not whole: {INDEX} names {len(names)} shards, and {_first(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} missing. Fetch them again."
        )
    return [INDEX, *names]


def _instead_of_weights(files: ModelFiles) -> str:
    at_top = sorted(name for name in files.sizes if "/" not in name)
    by_ending = {ending: [name for name in at_top if name.endswith(ending)] for ending in (".safetensors", GGUF)}
    pickled = [name for name in at_top if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if "adapter_config.json" in at_top:
        return "has the weights of an adapter only. Merge it into its model (`merge_and_unload`) and save that."
    if shards := [name for name in by_ending[".safetensors"] if "-of-" in name]:
        return f"has shards ({_first(shards)}), but {INDEX} is missing, which says what is in them. Fetch it again."
    if others := by_ending[".safetensors"]:
        return f"has no {WEIGHTS}, only {_first(others)}. Save the model with `model.save_pretrained`."
    if by_ending[GGUF]:
        named = f"{files.source}/{by_ending[GGUF][0]}"
        return f"has its weights as GGUF only ({_first(by_ending[GGUF])}). Name one file: model.source={named}"
    found = f" There are {_first(pickled)}." if pickled else ""
    return (
        "has no weights as safetensors, and pickled weights are not read, since they can run code."
        f"{found} Convert them (`model.save_pretrained`), or use model=bundled."
    )


def check_file(path: Path) -> None:
    """Raises UserError for a pointer of Git LFS in the place of a file, and for an empty file."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise UserError(f"model.source: {path} is a pointer of Git LFS, not the file itself. Fetch it: git lfs pull")
    if not start:
        raise UserError(damaged(path, "it is empty"))


def read_part(path: Path) -> dict[str, Any]:
    """The object in one of a model's JSON files. Raises UserError that says to fetch it again."""
    check_file(path)
    try:
        return read_object(path)
    except UserError as error:
        raise UserError(f"model.source: {error} Correct it, or fetch it again.") from error


def check_content(files: ModelFiles, names: Iterable[str]) -> None:
    """Raises UserError for a file in the local cache of the hub whose content is not what the hub has: the cache names
    large files after their SHA-256."""
    if files.repo is None:
        return
    for path in files.get(names):
        name = path.resolve().name
        if len(name) == 64 and set(name) <= set("0123456789abcdef") and file_hash(path) != name:
            raise UserError(damaged(path, "its content is not what the hub has"))


def damaged(path: Path, why: str) -> str:
    """The message for a file that is not whole: remove it and fetch it again. In the hub's cache a file is a link."""
    where = path.resolve()
    return f"model.source: {path} is damaged: {why}. Remove {where} and fetch it again."


def _first(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _not_reached(source: str, repo: str, revision: str, error: BaseException) -> str:
    """One sentence on why a repository cannot be read, with a way out."""
    causes = chain_of(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        url = f"https://huggingface.co/{repo}"
        return f"model.source: {source} is gated. Accept its licence at {url} and set HF_TOKEN, or use model=bundled."
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"model.revision: {source} has no revision {revision!r} on the hub."
    if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
        return f"model.source: {source} is neither a local folder nor a readable model on the hub. {OFFLINE}"
    return (
        f"model.source: {source} could not be reached, and is not complete in the local cache "
        f"({_status(error)}). {OFFLINE}"
    )


def _not_fetched(files: ModelFiles, name: str, error: BaseException) -> str:
    causes = chain_of(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        assert files.repo is not None
        return _not_reached(files.source, files.repo, files.revision, error)
    return (
        f"model.source: {name} of {files.source} is on the hub, but could not be fetched ({_status(error)}). Run the "
        f"same command again: it goes on with what is missing. {OFFLINE}"
    )


def _status(error: BaseException) -> str:
    """What the hub or the connection said: the HTTP status, or the first line of the first error."""
    causes = chain_of(error)
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            hint = ": too many requests, wait a while" if cause.response.status_code == 429 else ""
            return f"HTTP {cause.response.status_code} {cause.response.reason_phrase}{hint}"
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode is on (HF_HUB_OFFLINE=1)"
    last: Any = causes[-1]
    line = str(last).strip().partition("\n")[0] or str(error).strip().partition("\n")[0]
    return f"{type(last).__name__}: {line}" if line else type(last).__name__


def cause_of(error: BaseException) -> str:
    """The type and the words of an error from a library, on one line."""
    words = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {words:.300}." if words else f"{type(error).__name__}."


def count(n: int, what: str) -> str:
    """`1 tensor`, `3 tensors`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
