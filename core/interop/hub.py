"""The folder of one dictionary: here, or fetched from a model repository of the Hugging Face hub."""

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
    RevisionResolutionError,
)
from huggingface_hub.utils import disable_progress_bars

from core.errors import UserError

TIMEOUT_S = 10.0
Formats = Mapping[str, tuple[Collection[str], Collection[str]]]  # by name: the files it needs, and those it may have


@dataclass(frozen=True)
class _Asked:
    repo: str
    inner: PurePosixPath
    revision: str
    formats: Formats
    node: str  # of the configuration, for messages
    only_first: bool

    def files(self, names: Collection[str]) -> list[str]:
        """Those to fetch of what is there: all of every format whose needed ones are, or of the first such format."""
        whole = [(needed, optional) for needed, optional in self.formats.values() if set(needed) <= set(names)]
        files = [n for needed, optional in whole[: 1 if self.only_first else None] for n in (*needed, *optional)]
        return list(dict.fromkeys(name for name in files if name in names))


def place(
    repo: str,
    path: str | None,
    revision: str | None,
    formats: Formats,
    node: str = "method",
    only_first: bool = False,
) -> tuple[Path, str | None]:
    """The folder with one dictionary's files, and the commit it is of; None for a folder that is here.

    repo, path   a folder here and one below it, or a name on the hub and a folder in it; `path` may name a file there
    revision     on the hub, `main` if None
    formats      what is looked for: of a repository, the files of those formats that are there whole are fetched
    node         whose settings repo, path and revision are, for messages
    only_first   fetch the first of the formats that is there, not all of them

    The hub is asked once whether it answers; where it does not, the local cache serves. Raises UserError.
    """
    known = _names(formats)
    inner = PurePosixPath(path or "")
    if inner.name in known:
        inner = inner.parent
    local = Path(repo).expanduser()
    if local.is_dir():
        if not (local / inner).is_dir():
            held = ", ".join(sorted(entry.name for entry in local.iterdir())[:12]) or "nothing"
            raise UserError(f"{node}.path: {local} has no folder {inner}; it holds {held}.")
        return local / inner, None
    if repo.startswith(("/", "~", ".")) or repo.count("/") != 1:
        raise UserError(f"{node}.repo: there is no folder {local}, and no name on the hub (owner/name) is like that.")
    return _fetched(_Asked(repo, inner, revision or "main", formats, node, only_first))


def _names(formats: Formats) -> list[str]:
    """The names of all files that a format may have."""
    return list(dict.fromkeys(name for files in formats.values() for group in files for name in group))


def _fetched(asked: _Asked) -> tuple[Path, str]:
    api, repo, inner = HfApi(), asked.repo, asked.inner
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api.model_info(repo, revision=asked.revision, timeout=TIMEOUT_S)
        commit = api.resolve_revision(repo, revision=asked.revision).resolved
        here = _listed(api, repo, inner, commit)
        names = asked.files(here)
        if not names:
            held = ", ".join(here[:12])
            raise UserError(
                f"{asked.node}.path: {repo}, folder {inner}, holds no dictionary that is known; it holds {held}."
            )
        files = [Path(hf_hub_download(repo, str(inner / name), revision=commit)) for name in names]
        return files[0].parent, commit
    except UserError:
        raise
    except Exception as error:  # the errors of the hub, of its HTTP client and of the system have no base in common
        found = _cached(asked)
        if found is None or _is_answer(error):
            raise UserError(_reason(error, asked)) from error
        return found


def _listed(api: HfApi, repo: str, inner: PurePosixPath, commit: str) -> list[str]:
    """The names of what lies in a folder of the repository."""
    within = None if str(inner) == "." else str(inner)
    return [PurePosixPath(entry.path).name for entry in api.list_repo_tree(repo, within, revision=commit)]


def cached_commit(repo: str, revision: str) -> str | None:
    """What a revision stood for when it was last fetched to this machine; None if it never was. Asks no network."""
    try:
        return HfApi().resolve_revision(repo, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None


def _cached(asked: _Asked) -> tuple[Path, str] | None:
    """The same from the local cache, or None."""
    commit = cached_commit(asked.repo, asked.revision)
    if commit is None:
        return None
    known = _names(asked.formats)
    found = {name: try_to_load_from_cache(asked.repo, str(asked.inner / name), revision=commit) for name in known}
    paths = {name: Path(file) for name, file in found.items() if isinstance(file, str)}
    names = asked.files(paths)
    return (paths[names[0]].parent, commit) if names else None


def _is_answer(error: BaseException) -> bool:
    """Whether the hub has said that there is no such thing, or that it must not be had."""
    if isinstance(error, LocalEntryNotFoundError):  # the hub did not answer, and the file is not in the cache
        return False
    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError | HFValidationError)


def _reason(error: BaseException, asked: _Asked) -> str:
    """One sentence on why it cannot be had, and the way out."""
    node, repo, inner, revision = asked.node, asked.repo, asked.inner, asked.revision
    if isinstance(error, GatedRepoError):
        return f"{node}.repo: {repo} is gated. Accept its licence at https://huggingface.co/{repo}, then set HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return f"{node}.revision: {repo} has no revision {revision!r} on the hub."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"{node}.repo: {repo} is neither a folder here nor a model repository on the hub that can be read."
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{node}.path: {repo} has no folder {inner} at revision {revision}."
    if isinstance(error, OfflineModeIsEnabled):
        why = "offline mode is on (HF_HUB_OFFLINE=1)"
    else:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"{node}.repo: {repo}, folder {inner}, could not be fetched, and is not whole in the local cache ({why}). "
        f"Fetch it where there is a network, or give a folder here as {node}.repo."
    )
