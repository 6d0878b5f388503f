"""Translate between other libraries' names of sites and ours."""

from __future__ import annotations

import re

from core.errors import UserError

TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_post": "mlp_hidden",
}
PATTERNS = (  # module paths, which stand for the module's output
    (re.compile(r"^(?:.*\.)?(?:layers|h)[._](\d+)$"), "resid_post"),
    (re.compile(r"^(?:.*\.)?(?:layers|h)[._](\d+)[._]mlp$"), "mlp_out"),
    (re.compile(r"^resid_post_layer_(\d+)$"), "resid_post"),
    (re.compile(r"^mlp_layer_(\d+)$"), "mlp_out"),
)


def site_of(hook: str) -> str | None:
    """Our name of a site, from TransformerLens' name (`blocks.8.hook_resid_pre` -> `resid_pre.8`) or a module's path
    (`transformer.h.7` -> `resid_post.7`); None for sites that we have no name for."""
    match = re.match(r"^blocks\.(\d+)\.(.+)$", hook)
    if match:
        kind = TRANSFORMER_LENS.get(match[2])
        return f"{kind}.{match[1]}" if kind else None
    for pattern, kind in PATTERNS:
        if match := pattern.match(hook):
            return f"{kind}.{match[1]}"
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
        raise UserError(f"stream.site={site}: the dictionary was trained at {hook}, which is not a supported site.")
    if _canonical(trained_at) != _canonical(site):
        raise UserError(
            f"stream.site={site}: the dictionary was trained at {hook}. Set stream.site={trained_at}, or "
            "method.site=null to use it at another site."
        )


def _canonical(site: str) -> str:
    """One name for the output of a block and the input of the next one."""
    kind, _, layer = site.partition(".")
    return f"resid_pre.{int(layer) + 1}" if kind == "resid_post" else site
