"""The folder of one dictionary: a local one, or one fetched from a model repository of the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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
)
from huggingface_hub.utils import disable_progress_bars

from core.errors import UserError
from core.inputs import cached_commit

TIMEOUT_S = 10.0
Formats = Mapping[str, tuple[Collection[str], Collection[str]]]  # by name: required and optional files


@dataclass(frozen=True)
class _Query:
    repo: str
    inner: PurePosixPath
    revision: str
    formats: Formats
    only_first: bool

    def files(self, names: Collection[str]) -> list[str]:
        """The files to fetch, given the names in the folder: those of every complete format, or of the first one."""
        complete = [(needed, optional) for needed, optional in self.formats.values() if set(needed) <= set(names)]
        files = [n for needed, optional in complete[: 1 if self.only_first else None] for n in (*needed, *optional)]
        return list(dict.fromkeys(name for name in files if name in names))


def dictionary_folder(
    repo: str,
    path: str | None,
    revision: str | None,
    formats: Formats,
    only_first: bool = False,
) -> tuple[Path, str | None]:
    """The folder with one dictionary's files, and its commit (None for a local folder).

    repo, path   a local folder or a name on the hub, and a folder within it; `path` may also name a file there
    revision     on the hub, `main` if None
    formats      the formats to look for; from a repository, the files of all complete formats are fetched
    only_first   fetch only the first complete format

    The hub is asked once. If it does not answer, the local cache is used. Raises UserError.
    """
    known = _names(formats)
    inner = PurePosixPath(path or "")
    if inner.name in known:
        inner = inner.parent
    local = Path(repo).expanduser()
    if local.is_dir():
        if not (local / inner).is_dir():
            held = ", ".join(sorted(entry.name for entry in local.iterdir())[:12]) or "nothing"
            raise UserError(f"method.path: {local} has no folder {inner}; it contains {held}.")
        return local / inner, None
    if repo.startswith(("/", "~", ".")) or repo.count("/") != 1:
        raise UserError(f"method.repo: there is no folder {local}, and it is not a name on the hub (owner/name).")
    return _fetched(_Query(repo, inner, revision or "main", formats, only_first))


def _names(formats: Formats) -> list[str]:
    """The names of all files of all formats."""
    return list(dict.fromkeys(name for files in formats.values() for group in files for name in group))


def _fetched(query: _Query) -> tuple[Path, str]:
    api, repo, inner = HfApi(), query.repo, query.inner
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api.model_info(repo, revision=query.revision, timeout=TIMEOUT_S)
        commit = api.resolve_revision(repo, revision=query.revision).resolved
        listed = _listed(api, repo, inner, commit)
        names = query.files(listed)
        if not names:
            held = ", ".join(listed[:12])
            raise UserError(
                f"method.path: {repo}, folder {inner}, contains no dictionary in a known format, only {held}."
            )
        files = [Path(hf_hub_download(repo, str(inner / name), revision=commit)) for name in names]
        return files[0].parent, commit
    except UserError:
        raise
    except Exception as error:  # errors of the hub, of its HTTP client and of the system have no common base class
        cached = _cached(query)
        if cached is None or _is_answer(error):
            raise UserError(_reason(error, query)) from error
        return cached


def _listed(api: HfApi, repo: str, inner: PurePosixPath, commit: str) -> list[str]:
    """The names in a folder of the repository."""
    within = None if str(inner) == "." else str(inner)
    return [PurePosixPath(entry.path).name for entry in api.list_repo_tree(repo, within, revision=commit)]


def _cached(query: _Query) -> tuple[Path, str] | None:
    """The same from the local cache, or None."""
    commit = cached_commit(query.repo, query.revision)
    if commit is None:
        return None
    known = _names(query.formats)
    cached = {name: try_to_load_from_cache(query.repo, str(query.inner / name), revision=commit) for name in known}
    paths = {name: Path(file) for name, file in cached.items() if isinstance(file, str)}
    names = query.files(paths)
    return (paths[names[0]].parent, commit) if names else None


def _is_answer(error: BaseException) -> bool:
    """Whether the hub has answered that the file does not exist or may not be read."""
    if isinstance(error, LocalEntryNotFoundError):  # the hub did not answer, and the file is not in the cache
        return False
    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError | HFValidationError)


def _reason(error: BaseException, query: _Query) -> str:
    """One sentence on why the dictionary cannot be read, with a way out."""
    repo, inner, revision = query.repo, query.inner, query.revision
    if isinstance(error, GatedRepoError):
        return f"method.repo: {repo} is gated. Accept its licence at https://huggingface.co/{repo}, then set HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return f"method.revision: {repo} has no revision {revision!r} on the hub."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"method.repo: {repo} is neither a local folder nor a readable model repository on the hub."
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"method.path: {repo} has no folder {inner} at revision {revision}."
    if isinstance(error, OfflineModeIsEnabled):
        why = "offline mode is on (HF_HUB_OFFLINE=1)"
    else:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"method.repo: {repo}, folder {inner}, could not be fetched, and is not complete in the local cache ({why}). "
        "Fetch it with a network, or set method.repo to a local folder."
    )
