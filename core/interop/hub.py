"""The folder of one dictionary: here, or fetched from a model repository of the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import disable_progress_bars

from core.errors import UserError

TIMEOUT_S = 10.0
Formats = Mapping[str, tuple[Collection[str], Collection[str]]]  # by name: the files it needs, and those it may have


def place(repo: str, path: str | None, revision: str | None, formats: Formats) -> tuple[Path, str | None]:
    """The folder with one dictionary's files, and the commit it is of; None for a folder that is here.

    repo, path   a folder here and one below it, or a name on the hub and a folder in it; `path` may name a file there
    revision     on the hub, `main` if None
    formats      what is looked for: of a repository, the files of those formats that are there whole are fetched

    The hub is asked once whether it answers; where it does not, the local cache serves. Raises UserError.
    """
    known = {name for files in formats.values() for group in files for name in group}
    inner = PurePosixPath(path or "")
    if inner.name in known:
        inner = inner.parent
    local = Path(repo).expanduser()
    if local.is_dir():
        if not (local / inner).is_dir():
            held = ", ".join(sorted(entry.name for entry in local.iterdir())[:12]) or "nothing"
            raise UserError(f"method.path: {local} has no folder {inner}; it holds {held}.")
        return local / inner, None
    if repo.startswith(("/", "~", ".")) or repo.count("/") != 1:
        raise UserError(f"method.repo: there is no folder {local}, and no name on the hub (owner/name) is like that.")
    return _fetched(repo, inner, revision or "main", formats)


def _fetched(repo: str, inner: PurePosixPath, revision: str, formats: Formats) -> tuple[Path, str]:
    api = HfApi()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api.model_info(repo, revision=revision, timeout=TIMEOUT_S)
        commit = api.resolve_revision(repo, revision=revision).resolved
        names = _wanted(_listed(api, repo, inner, commit), formats)
        if not names:
            held = ", ".join(_listed(api, repo, inner, commit)[:12])
            raise UserError(f"method.path: {repo}, folder {inner}, holds no dictionary that is known; it holds {held}.")
        files = [Path(hf_hub_download(repo, str(inner / name), revision=commit)) for name in names]
        return files[0].parent, commit
    except UserError:
        raise
    except Exception as error:  # the errors of the hub, of its HTTP client and of the system have no base in common
        found = _cached(repo, inner, revision, formats)
        if found is None or _is_answer(error):
            raise UserError(_reason(error, repo, inner, revision)) from error
        return found


def _listed(api: HfApi, repo: str, inner: PurePosixPath, commit: str) -> list[str]:
    """The names of what lies in a folder of the repository."""
    within = None if str(inner) == "." else str(inner)
    return [PurePosixPath(entry.path).name for entry in api.list_repo_tree(repo, within, revision=commit)]


def _wanted(names: Collection[str], formats: Formats) -> list[str]:
    """The files to fetch: all of every format whose needed ones are there."""
    whole = [(needed, optional) for needed, optional in formats.values() if set(needed) <= set(names)]
    files = [name for needed, optional in whole for name in (*needed, *optional) if name in names]
    return list(dict.fromkeys(files))


def cached_commit(repo: str, revision: str) -> str | None:
    """What a revision stood for when it was last fetched to this machine; None if it never was. Asks no network."""
    try:
        return HfApi().resolve_revision(repo, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None


def _cached(repo: str, inner: PurePosixPath, revision: str, formats: Formats) -> tuple[Path, str] | None:
    """The same from the local cache, or None."""
    commit = cached_commit(repo, revision)
    if commit is None:
        return None
    known = dict.fromkeys(name for files in formats.values() for group in files for name in group)
    found = {name: try_to_load_from_cache(repo, str(inner / name), revision=commit) for name in known}
    paths = {name: Path(file) for name, file in found.items() if isinstance(file, str)}
    names = _wanted(paths, formats)
    return (paths[names[0]].parent, commit) if names else None


def _is_answer(error: BaseException) -> bool:
    """Whether the hub has said that there is no such thing, or that it must not be had."""
    if isinstance(error, LocalEntryNotFoundError):  # the hub did not answer, and the file is not in the cache
        return False
    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError | HFValidationError)


def _reason(error: BaseException, repo: str, inner: PurePosixPath, revision: str) -> str:
    """One sentence on why it cannot be had, and the way out."""
    if isinstance(error, GatedRepoError):
        return f"method.repo: {repo} is gated. Accept its licence at https://huggingface.co/{repo}, then set HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return f"method.revision: {repo} has no revision {revision!r} on the hub."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"method.repo: {repo} is neither a folder here nor a model repository on the hub that can be read."
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"method.path: {repo} has no folder {inner} at revision {revision}."
    if isinstance(error, OfflineModeIsEnabled):
        why = "offline mode is on (HF_HUB_OFFLINE=1)"
    else:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"method.repo: {repo}, folder {inner}, could not be fetched, and is not whole in the local cache ({why}). "
        "Fetch it where there is a network, or give a folder here as method.repo."
    )
