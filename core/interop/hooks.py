"""Translate between other libraries' names of sites and ours."""

from __future__ import annotations

import re

from core.errors import UserError, shown

TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_post": "mlp_hidden",
}
SITES = tuple(TRANSFORMER_LENS.values())
INPUT = " (input)"  # after the name of a module whose input was read, not its output
LAYER = "([0-9]{1,4})"
PATTERNS = (  # module paths, which stand for the module's output, and names by which libraries' scripts call them
    (re.compile(rf"^(?:.*\.)?(?:layers|h)[._]{LAYER}$"), "resid_post"),
    (re.compile(rf"^(?:.*\.)?(?:layers|h)[._]{LAYER}[._]mlp$"), "mlp_out"),
    (re.compile(rf"^(?:.*\.)?(?:layers|h)[._]{LAYER}{re.escape(INPUT)}$"), "resid_pre"),
    (re.compile(rf"^(resid_pre|resid_post|mlp_out)_layer_{LAYER}$"), None),
    (re.compile(rf"^mlp_layer_{LAYER}$"), "mlp_out"),
)
UNLIKE = re.compile(
    "transcod|cross-?layer|crosscoder", re.IGNORECASE
)  # in the names of what is no dictionary of a site


def site_of(hook: str) -> str | None:
    """Our name of a site, from TransformerLens' name (`blocks.8.hook_resid_pre` -> `resid_pre.8`) or a module's path
    (`transformer.h.7` -> `resid_post.7`); None for sites that we have no name for."""
    match = re.match(rf"^blocks\.{LAYER}\.(.+)$", hook)
    if match:
        kind = TRANSFORMER_LENS.get(match[2])
        return f"{kind}.{int(match[1])}" if kind else None
    for pattern, kind in PATTERNS:
        if match := pattern.match(hook):
            *named, layer = match.groups()
            return f"{kind or named[0]}.{int(layer)}"
    return None


def hook_of(site: str) -> str:
    """TransformerLens' name of one of our sites."""
    kind, _, layer = site.partition(".")
    names = {ours: theirs for theirs, ours in TRANSFORMER_LENS.items()}
    return f"blocks.{layer}.{names[kind]}"


def check_site(hook: str | None, site: str | None) -> None:
    """Raises UserError if a dictionary trained at `hook` is to be used at another `site`. No check if one is None."""
    if hook is None or site is None:
        return
    trained_at = site_of(hook)
    if trained_at is None:
        raise UserError(
            f"stream.site={site}: the dictionary was trained at {shown(hook)}, which is not a supported site or no "
            f"name of one. Set method.site=null to use it at {site} all the same."
        )
    if _canonical(trained_at) != _canonical(site):
        raise UserError(
            f"stream.site={site}: the dictionary was trained at {shown(hook)}. Set stream.site={trained_at}, or "
            "method.site=null to use it at another site."
        )


def check_names(site: str | None, *names: str | None) -> None:
    """Raises UserError where the last part of a name says transcoder or crosscoder: these read one place and write
    another. No check if `site` is None."""
    for name in names:
        last = (name or "").rstrip("/").rpartition("/")[2]
        if site is not None and UNLIKE.search(last):
            raise UserError(
                f"method.repo: by its name {shown(last)} maps one place of the model to another, or several at once, "
                f"and is no dictionary of {site}. Set method.site=null if it is one."
            )


def _canonical(site: str) -> str:
    """One name for the output of a block and the input of the next one."""
    kind, _, layer = site.partition(".")
    return f"resid_pre.{int(layer) + 1}" if kind == "resid_post" and layer.isdecimal() else site
