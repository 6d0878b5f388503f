"""Tokenizers are accepted only whole: from nothing, the library makes one up that has two tokens and gives no text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from core.errors import UserError
from core.interrupts import raise_if_interrupted
from core.models.files import ModelFiles, cause_of, check_file, count, read_part
from core.models.weights import some

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)  # read if they are there
FROM_MERGES = ("gpt2", "gpt_neox", "qwen2", "qwen3")  # families whose tokenizer is built from VOCABULARY and MERGES
PROBE = "the quick brown fox jumps over the lazy dog and then it sleeps for an hour"
MOSTLY_USED = 0.9  # a smaller part of the embedding than this with a token of its own is said


def tokenizer_names(files: ModelFiles, family: str) -> list[str]:
    """The names of the files that make the tokenizer. Raises UserError if the one with the tokens is missing."""
    if files.gguf is not None:
        return [files.gguf]
    beside = [name for name in BESIDE if name in files]
    if TOKENIZER in files:
        return [TOKENIZER, *beside]
    if VOCABULARY in files and MERGES in files and family in FROM_MERGES:
        return [VOCABULARY, MERGES, *beside]
    if "tokenizer.model" in files:
        raise files.missing(
            "has its tokenizer as tokenizer.model only, which is not read. Convert it where sentencepiece is installed "
            "(`AutoTokenizer.from_pretrained(...).save_pretrained(...)`), which writes tokenizer.json."
        )
    raise files.missing(f"has no {TOKENIZER}, so its text cannot be turned into tokens. Fetch the tokenizer's files.")


def load_tokenizer(files: ModelFiles, names: Iterable[str]) -> Any:
    """The tokenizer in these files. Raises UserError for files that are damaged, and for a tokenizer that does not give
    ordinary words back."""
    paths = files.get(names)
    for path in paths:
        if path.suffix == ".json":
            read_part(path)
        check_file(path)
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if files.gguf is not None:
        where["gguf_file"] = files.gguf
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **where)
    except Exception as error:  # the library's parser raises plain Exception
        raise_if_interrupted(error)
        raise UserError(_unreadable(files, paths, error)) from error
    check_words(files.source, tokenizer)
    return tokenizer


def check_words(source: str, tokenizer: Any) -> None:
    """Raises UserError unless ordinary words can be encoded, without unknown tokens, and decoded back."""
    try:
        ids = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        text = " ".join(tokenizer.decode(ids).split())
    except Exception as error:  # see `load_tokenizer`
        raise_if_interrupted(error)
        raise UserError(f"model.source: the tokenizer of {source} cannot encode text: {cause_of(error)}") from error
    if not ids:
        problem = "gives no tokens for"
    elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        problem = f"does not know words of ({ids.count(tokenizer.unk_token_id)} of {len(ids)} tokens are unknown)"
    elif text != PROBE:
        problem = f"gives {text!r:.100} back for"
    else:
        return
    raise UserError(
        f"model.source: the tokenizer of {source} has {len(tokenizer):,} tokens and {problem} the ordinary text "
        f"{PROBE!r}. "
        "It is not whole, or not a tokenizer of text. Fetch its files again."
    )


def check_ids(source: str, tokenizer: Any, n_embeddings: int) -> None:
    """Raises UserError for tokens that have no row in the embedding. Says so if many rows have no token."""
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= n_embeddings)
    if beyond:
        named = some([f"{token!r} ({number})" for number, token in beyond])
        raise UserError(
            f"model.source: the tokenizer of {source} does not fit the model, whose embedding has {n_embeddings:,} "
            "rows: "
            f"{count(len(beyond), 'token')} beyond it: {named}. Take them out of the tokenizer's files, use the "
            "tokenizer that "
            "the model was trained with, or enlarge the embedding (`model.resize_token_embeddings`)."
        )
    if len(tokenizer) < MOSTLY_USED * n_embeddings:
        print(
            f"{source}: the tokenizer has {len(tokenizer):,} tokens, the embedding {n_embeddings:,} rows. Are they "
            "made for "
            "each other?",
            file=sys.stderr,
        )


def _unreadable(files: ModelFiles, paths: list[Path], error: Exception) -> str:
    named = ", ".join(path.name for path in paths)
    what = f"the tokenizer of {files.source} cannot be read from {named}"
    return f"model.source: {what}: {cause_of(error)} Fetch them again."
