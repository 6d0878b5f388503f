"""Text that models, data and results wrote, made harmless before it is printed, drawn, or used as a file's name."""

from __future__ import annotations

import hashlib
import re

LONGEST = 2000  # characters of a text that are shown
LONGEST_FILE_NAME = 150  # of a figure, without its ending
BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
# Control characters, halves of surrogate pairs, marks that turn the direction of text or cannot be seen, no characters.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
REPLACEMENT = "\ufffd"
NO_FILE_NAME = re.compile(r"[^A-Za-z0-9._,=+\-\[\]@]|^[.\-]")


def plain(text: object, most: int = LONGEST) -> str:
    """One line: breaks become spaces, what cannot be seen becomes U+FFFD. A longer text says how long it is."""
    return cut(UNSEEN.sub(REPLACEMENT, BREAKS.sub(" ", str(text))), most)


def cut(text: str, most: int) -> str:
    """The beginning of a text that is too long, and the number of its characters."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def shortened(text: object, most: int) -> str:
    """A plain text of at most `most` characters: of a longer one, its beginning and its end."""
    whole = plain(text)
    return whole if len(whole) <= most else f"{whole[: most - most // 3 - 1]}…{whole[len(whole) - most // 3 :]}"


def file_name(text: str) -> str:
    """A file name without folders, blanks or signs that a shell or an address would read. Where characters were
    replaced, or the end is missing, it ends in a hash of the whole text, so that names stay as different as texts."""
    name = NO_FILE_NAME.sub("_", text)[:LONGEST_FILE_NAME]
    if name == text:
        return name
    return f"{name}_{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"
