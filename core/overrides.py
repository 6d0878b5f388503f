"""What Hydra says of a command line that it cannot read, with the user's own setting and a way out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.checked import nearest
from core.errors import UserError

UNREADABLE = re.compile(r"mismatched|no viable|extraneous input|missing \w+ at|LexerNoViable|Unknown function")
UNKNOWN = re.compile(r"Could not override '([^']+)'")
MISTAKEN = (ValueError, TypeError, AssertionError, LookupError, AttributeError)  # what Hydra makes of odd words
TABLES = ("at", "grid")  # of the same settings at each scale
SEE = re.compile(r"\nSee https://hydra\.cc\S+ for details")


def explained(error: Exception, arguments: Sequence[str], conf: Path) -> str | None:
    """The message of an error of Hydra, with what helps; None for an error that is not Hydra's.

    arguments  of the command line
    conf       the folder of the configuration
    """
    message = SEE.sub("", str(error)).strip()
    if isinstance(error, HydraException):
        unknown = UNKNOWN.search(message)
        if unknown is not None:
            return _unknown(unknown[1], arguments, conf)
        return "\n".join([message, *map(quoted, unreadable(arguments))]) if UNREADABLE.search(message) else None
    if isinstance(error, OmegaConfBaseException | UserError) or not isinstance(error, MISTAKEN):
        return None
    return "\n".join([f"Hydra: {message}", *_no_choices(arguments, conf)]) if _raised_by_hydra(error) else None


def unreadable(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments that Hydra's parser refuses."""
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            parser.parse_overrides([argument])
        except (HydraException, ValueError):
            yield argument


def quoted(argument: str) -> str:
    """How to write an argument that the parser refuses."""
    key, equals, value = argument.partition("=")
    if not re.fullmatch(r"[+~]*[\w./@:-]+", key, re.ASCII):
        return f"{key!r}: no setting has such a name."
    if not equals:
        return f"{argument}: write it as {argument}=<value>."
    inner = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    whole = shlex.quote(f'{key}="{inner}"')
    return f"{key}: put the value in quotes, and all of it for the shell: {whole}"


def _no_choices(arguments: Sequence[str], conf: Path) -> Iterator[str]:
    """A line for each group for which no file of the folder is chosen."""
    for key, _, value in (argument.partition("=") for argument in arguments):
        choices = sorted(path.stem for path in (conf / key).glob("*.yaml")) if re.fullmatch(r"\w+(/\w+)*", key) else []
        if choices and not set(value.split(",")) <= set(choices):
            yield f"{key}: {value or 'nothing'} must be one of {', '.join(choices)}."


def _unknown(key: str, arguments: Sequence[str], conf: Path) -> str:
    """A setting that does not exist, and the one that is most like it."""
    known = [name for name in _names(_without_settings(arguments, conf)) if name.partition(".")[0] not in TABLES]
    parent = key.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == parent]
    same = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    top = dict.fromkeys(name.partition(".")[0] for name in known)
    hint = f" Did you mean {same[0]}?" if same else nearest(key, beside or top)
    return f"{key}: there is no such setting.{hint if known else ''}"


def _without_settings(arguments: Sequence[str], conf: Path) -> DictConfig:
    """The configuration with the chosen groups alone; empty if that cannot be composed either."""
    groups = [word for word in arguments if re.fullmatch(r"[\w/@]+=[\w]+(,[\w]+)*", word)]
    chosen = [word.partition(",")[0] for word in groups if (conf / word.partition("=")[0].partition("@")[0]).is_dir()]
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            return compose("config", overrides=chosen)
    except Exception:  # then there is no hint
        return DictConfig({})
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = state


def _names(node: Any, path: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for key in node:
        name = f"{path}.{key}" if path else str(key)
        yield name
        child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(child, DictConfig):
            yield from _names(child, name)


def _raised_by_hydra(error: Exception) -> bool:
    """Whether an error comes from the code of Hydra itself."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4")
