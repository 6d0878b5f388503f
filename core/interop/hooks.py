"""Names that libraries give to sites, and ours for them."""

from __future__ import annotations

import re

from core.errors import UserError

TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_post": "mlp_hidden",
}
PATTERNS = (  # of module paths, whose output is meant
    (re.compile(r"^(?:.*\.)?(?:layers|h)[._](\d+)$"), "resid_post"),
    (re.compile(r"^(?:.*\.)?(?:layers|h)[._](\d+)[._]mlp$"), "mlp_out"),
    (re.compile(r"^resid_post_layer_(\d+)$"), "resid_post"),
    (re.compile(r"^mlp_layer_(\d+)$"), "mlp_out"),
)


def site_of(hook: str) -> str | None:
    """Our name for TransformerLens' name of a site (`blocks.8.hook_resid_pre` -> `resid_pre.8`), or for a module's path
    (`transformer.h.7` -> `resid_post.7`); None for sites that are not in our vocabulary."""
    found = re.match(r"^blocks\.(\d+)\.(.+)$", hook)
    if found:
        kind = TRANSFORMER_LENS.get(found[2])
        return f"{kind}.{found[1]}" if kind else None
    for pattern, kind in PATTERNS:
        if found := pattern.match(hook):
            return f"{kind}.{found[1]}"
    return None


def hook_of(site: str) -> str:
    """TransformerLens' name for one of our sites."""
    kind, _, layer = site.partition(".")
    names = {ours: theirs for theirs, ours in TRANSFORMER_LENS.items()}
    return f"blocks.{layer}.{names[kind]}"


def check_site(hook: str | None, site: str | None) -> None:
    """Raises UserError if a dictionary of `hook` is wanted for another `site`. Nothing is known where one is None."""
    if hook is None or site is None:
        return
    found = site_of(hook)
    if found is None:
        raise UserError(f"stream.site={site}: the dictionary is of {hook}, which is no site that can be read here.")
    if _same_stream(found) != _same_stream(site):
        raise UserError(
            f"stream.site={site}: the dictionary is of {hook}. Set stream.site={found}; or method.site=null, to use it "
            "elsewhere all the same."
        )


def _same_stream(site: str) -> str:
    """What goes out of a block goes into the next one."""
    kind, _, layer = site.partition(".")
    return f"resid_pre.{int(layer) + 1}" if kind == "resid_post" else site
