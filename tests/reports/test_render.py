"""Texts that models, data and results wrote stay texts: in Markdown, in HTML, in the terminal, in file names."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from reports.render import Bullets, Figure, Heading, Markup, Paragraph, Table, inline, markdown, own_words, page
from reports.safe_text import cut, file_name, plain, shortened

INJECTIONS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "</td></tr></table><h1>x</h1>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "a|b\\|c\\",
    "line\n# heading\r\n\n- item\n[x]: http://evil.example",
    "$\\frac{1}{2}$ and $",
    "`code` and ```",
    "**bold** _it_ ~~struck~~ &lt;b&gt; &#60;i&#62;",
    "\x1b[31mred\x1b[0m \u202eright to left \x00",
    "half \ud83d of an emoji",
    "<!-- comment --> <http://evil.example> <?php ?>",
)
SIGNS = st.text("ab1 \\`*_[]()<>&;!|$~#-+.=:\"'/\n\t\u202e\ud83d^{}", max_size=30)
PARSER = MarkdownIt("commonmark").enable("table").enable("strikethrough")
OF_A_TABLE = {f"{name}_{end}" for name in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")}


def text_of(token: Token) -> str:
    return "".join(child.content for child in token.children or [])


def as_shown(text: str) -> str:
    """What a reader of a Markdown page sees of a text: spaces at its ends and line breaks are none."""
    return plain(text).strip()


@pytest.mark.parametrize("text", INJECTIONS)
@given(other=SIGNS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_text_in_a_table_is_one_cell_of_that_text(text: str, other: str):
    for value in (text, other, text + other, other + text):
        tokens = PARSER.parse(markdown([Table(["one", "two"], [[value, "b"]])], Path()))
        assert {token.type for token in tokens} <= {*OF_A_TABLE, "inline"}
        cells = [token for token in tokens if token.type == "inline"]
        assert [text_of(cell) for cell in cells] == ["one", "two", as_shown(value), "b"]
        assert {child.type for cell in cells for child in cell.children or []} <= {"text", "text_special"}


@given(SIGNS)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_text_in_a_heading_a_list_or_a_paragraph_begins_nothing_else(text: str):
    for block, around in (
        (Heading(3, text), "heading"),
        (Paragraph(text), "paragraph"),
        (Bullets([text]), "list_item"),
    ):
        tokens = PARSER.parse(markdown([block], Path()))
        kinds = {token.type.removesuffix("_open").removesuffix("_close") for token in tokens}
        assert kinds <= {around, "inline", "paragraph", "bullet_list"}
        contents = [token for token in tokens if token.type == "inline"]
        assert "".join(map(text_of, contents)).strip("# ") == as_shown(text).strip("# ")
        assert all(child.type in ("text", "text_special") for one in contents for child in one.children or [])


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_dollar_begins_a_formula_on_a_page_that_knows_them(text: str):
    assert not re.search(r"(?<!\\)(?:\\\\)*\$", inline(text))


def test_what_is_ours_keeps_its_signs_and_what_is_no_sign_stays_as_it_is():
    assert inline(Markup("[a](b.md) `c` | d")) == "[a](b.md) `c` \\| d"
    assert markdown([own_words("see `a_b`")], Path()) == "see `a_b`\n"
    for text in (
        "0.29 [0.28, 0.3]",
        "M < K log(N / K)",
        "resid_pre.4",
        "5 * 3",
        "95 % t",
        "a <= b",
        "C:\\path",
        "p & q",
    ):
        assert inline(text) == text


class Elements(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", INJECTIONS)
def test_a_text_on_the_page_is_that_text_and_nothing_else(text: str, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    blocks = [
        Heading(1, text),
        Paragraph(text),
        Bullets([text]),
        Table([text], [[text]]),
        Figure(tmp_path / "a.png", text),
    ]
    whole = page(text, blocks)
    elements = Elements(whole)
    assert elements.text.count(plain(text)) == 7  # title, heading, paragraph, item, two cells, caption
    expected = ["html", "head", "meta", "title", "meta", "meta", "style", "body", "h1", "p", "ul", "li", "div", "table"]
    assert [name for name, _ in elements.found if name != "span"] == [
        *expected, "thead", "tr", "th", "tbody", "tr", "td", "figure", "img", "figcaption"
    ]  # fmt: skip
    assert {key for _, attributes in elements.found for key in attributes if key.startswith("on")} == set()
    assert dict(elements.found[-2][1])["alt"] == plain(text)
    assert "default-src 'none'" in whole


def test_a_long_name_is_short_on_the_page_and_whole_in_its_tooltip(tmp_path: Path):
    name = "m" * 200 + "<" + "n" * 99
    elements = Elements(page("t", [Table(["a"], [[f"model {name} here"]])]))
    [tooltip] = [attributes["title"] for tag, attributes in elements.found if tag == "span"]
    assert tooltip == name and len(elements.text) < 2200 and f"model {'m' * 39}…{'n' * 20} here" in elements.text
    assert name.replace("<", "&lt;") in markdown([Table(["a"], [[name]])], tmp_path)


def test_figures_are_linked_by_addresses_without_signs():
    text = markdown([Figure(Path("r/figures/a b(c)[d]<e>.png"), "x")], Path("r"))
    assert text == "![x](figures/a%20b%28c%29%5Bd%5D%3Ce%3E.png)\n"


def test_texts_are_on_one_line_without_what_cannot_be_seen():
    assert plain("a\r\n\tb\u2028c\x00\x1b\ud800\u202e\ufeff") == "a b c" + "\ufffd" * 5
    assert plain("é漢😀 ␣") == "é漢😀 ␣"
    assert cut("x" * 3000, 10) == "x" * 10 + "… (3,000 characters)"
    assert shortened("abcdefghijkl", 7) == "abcd…kl" and shortened("abc", 7) == "abc"


@given(st.text(max_size=400), st.text(max_size=400))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_file_names_are_safe_and_as_different_as_the_texts(a: str, b: str):
    for text in (a, b):
        name = file_name(text)
        assert re.fullmatch(r"[A-Za-z0-9._,=+\-\[\]@]*", name) and len(name) <= 160 and not name.startswith((".", "-"))
    assert (file_name(a) == file_name(b)) == (a == b)


@pytest.mark.parametrize("text", [*INJECTIONS, "../../etc/passwd", "a/b", "..", ".hidden", "CON:", "x" * 300, ""])
def test_no_text_leads_a_file_out_of_its_folder(text: str, tmp_path: Path):
    path = tmp_path / f"{file_name(text)}.png"
    path.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == [path]


def test_names_that_need_no_change_keep_themselves():
    name = "leask_editing_demo_bundled_resid_pre.2_rebuild_reconstruction_lw_0"
    assert file_name(name) == name and file_name("coder.l1=[0.5],coder=mlp") == "coder.l1=[0.5],coder=mlp"
