"""Branches of the Hugging Face hub as commits.

A branch is resolved once in a process, so all that a process makes is of one state of a repository. A training that was
stopped keeps the commits that it began with beside its checkpoints. A run that finds them there goes on with them, even
if the branch has moved. Without a network a branch is what this machine fetched last.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

from core.inputs import HUB, cached_commit
from core.interrupts import raise_if_interrupted
from core.reading import field, read_object

Kind = Literal["model", "dataset"]
TIMEOUT_S = 10.0
COMMITS = "commits.json"  # beside the checkpoints of a training: commits by `name_of`
_COMMIT = re.compile("[0-9a-f]{40}")
_known: dict[str, str] = {}  # by `name_of`: the commits that this process uses
_kept: dict[str, tuple[str, Path]] = {}  # those of unfinished trainings, and the folders that say so


def is_commit(revision: str) -> bool:
    return bool(_COMMIT.fullmatch(revision))


def name_of(repo: str, revision: str, kind: Kind = "model") -> str:
    """`hub:<owner>/<name>@<revision>`; for data sets `hub:datasets/<owner>/<name>@<revision>`."""
    return f"{HUB}{'datasets/' if kind == 'dataset' else ''}{repo}@{revision}"


def commit_of(repo: str, revision: str, kind: Kind = "model") -> str:
    """The commit of a revision, the same throughout a process.

    Raises what the hub or the HTTP client raises if the hub does not say and the local cache does not know it either.
    """
    name = name_of(repo, revision, kind)
    if is_commit(revision):
        return revision
    if name not in _known:
        _known[name] = _of_training(repo, revision, kind) if name in _kept else _asked(repo, revision, kind)
    return _known[name]


def go_on_with_unfinished(artifacts_dir: str | Path) -> None:
    """From now on, branches that an unfinished training of this store has read are what they were when it began."""
    root = Path(artifacts_dir)
    files = [*root.glob(f"training/*/[!.]*/{COMMITS}"), *root.glob(f"finetuning/[!.]*/{COMMITS}")]
    for path in sorted(files):
        content = read_object(path)
        _kept.update({name: (field(content, name, str, path), path.parent) for name in content})


def tip(repo: str, revision: str, kind: Kind = "model") -> str:
    """The commit that the hub names now. Fails at once where other calls would try again for minutes."""
    from huggingface_hub import HfApi  # slow to import

    api = HfApi()
    info: Any = (api.model_info if kind == "model" else api.dataset_info)(repo, revision=revision, timeout=TIMEOUT_S)
    if kind == "dataset" and info.gated:
        api.auth_check(repo, repo_type="dataset")
    return str(info.sha)


def _asked(repo: str, revision: str, kind: Kind) -> str:
    """The commit now, from the hub or else from the cache."""
    from huggingface_hub import HfApi

    try:
        tip(repo, revision, kind)
        return str(HfApi().resolve_revision(repo, revision=revision, repo_type=kind).resolved)  # keeps it in the cache
    except Exception as error:  # errors of the hub, of its HTTP client and of the system have no common base class
        raise_if_interrupted(error)
        cached = cached_commit(repo, revision, kind)
        if cached is None:
            raise
        return cached


def _of_training(repo: str, revision: str, kind: Kind) -> str:
    """The commit that an unfinished training began with. Says so if the branch has moved since."""
    commit, folder = _kept[name_of(repo, revision, kind)]
    try:
        now = tip(repo, revision, kind)
    except Exception as error:  # without an answer there is nothing to compare with
        raise_if_interrupted(error)
        return commit
    if now != commit:
        setting = "model" if kind == "model" else "data"
        print(
            f"{repo}: {revision} has moved from {commit} to {now} since the unfinished training in {folder} began. "
            f"This run goes on with {commit}. For the newer one set {setting}.revision={now}, or remove {folder}.",
            file=sys.stderr,
        )
    return commit
