"""The page of latents and meta-latents: what is in it, and what a person sees in a real browser (headless Chromium)."""

import json
import re
from pathlib import Path

import pytest

from core.analysis.meta_page import TEMPLATE, Latent, MetaLatent, write_page
from tests.browser import browser, in_browser
from tests.reports.test_render import INJECTIONS, Elements

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">&amp;${x}\u2028"


def small_page(folder: Path, n: int = 40) -> Path:
    """n latents; latent 7 is about Einstein, 8 has text that would break a page that does not escape it."""
    tokens: dict[int, list[str]] = {7: ["einstein", "physics"], 8: [HOSTILE]}
    latents = [
        Latent(
            id=i,
            tokens=tokens.get(i, [f"word{i}", "the"]),
            rate=0.001 * i,
            contexts=[(HOSTILE if i == 8 else "so said ", "Einstein" if i == 7 else f"Word{i}", " to them")],
            metas=[] if i == 9 else [(i % 5, 0.5), (5 + i % 3, 0.25)],
        )
        for i in range(n)
    ]
    metas = [MetaLatent(j, ["science"] if j == 2 else [f"shared{j}"], n // 5 + j, [7, 12, 1000 + j]) for j in range(8)]
    path = folder / "browse.html"
    write_page(path, "40 latents <of> a model", "8 meta-latents.", latents, metas, n_latents=n + 10)
    return path


def test_the_page_needs_nothing_else_and_names_what_is_missing(tmp_path: Path):
    text = small_page(tmp_path).read_text()
    assert not re.search(r"https?://|<link|@import|url\(|src=", TEMPLATE.read_text())
    assert "40 latents &lt;of&gt; a model" in text and "the 40 most active of 50 latents" in text
    assert text.count("</script>") == 2 and "$" + "{shown" in text  # the data ends no element; the script is whole


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_page(tmp_path / "p.html", "", "", [Latent(0, [], float("nan"), [], [])], [], 1)


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_token_or_title_is_more_than_text(text: str, tmp_path: Path):
    """The page has the elements of its template; what the tokens say stands in its data alone."""
    latent, meta = Latent(0, [text], 0.5, [(text, text, text)], [(0, 1.0)]), MetaLatent(0, [text], 1, [0])
    write_page(tmp_path / "p.html", text, text, [latent], [meta], 1)
    whole, template = Elements((tmp_path / "p.html").read_text()), Elements(TEMPLATE.read_text())
    assert [tag for tag, _ in whole.found] == [tag for tag, _ in template.found]
    page = (tmp_path / "p.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    shown = text.encode("utf-8", "replace").decode()
    assert data["latents"][0][1] == [shown] and data["metas"][0][1] == [shown]


@browser
def test_a_person_searches_clicks_and_goes_back_and_forth_between_latents_and_meta_latents(tmp_path: Path):
    steps = """
    seen.first = $('#detail h2').textContent; seen.count = $('#count').textContent;
    type('Einstein'); seen.by_token = all('#list .number');
    $('#list a').click(); await wait();
    seen.latent = [$('#detail h2').textContent, all('#detail mark'), all('#detail .entry a'), all('#detail .weight')];
    seen.current = all('#list a[aria-current=true] .number');
    $('#detail .entry a').click(); await wait();
    seen.meta = [$('#detail h2').textContent, all('#detail .entry > :first-child'), all('#detail .entry mark')];
    type('12'); seen.by_number = all('#list .number');
    $('#search').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'})); await wait();
    seen.entered = $('#detail h2').textContent;
    type('word3'); seen.part = all('#list .number');
    type('nothing like this'); seen.none = [$('#count').textContent, all('#list a')];
    type(''); $('#show-metas').click(); seen.metas = [$('#count').textContent, all('#list .number')];
    type('science'); seen.meta_by_token = all('#list .number');
    location.hash = '#l9'; await wait(); seen.alone = all('#detail .none');
    history.back(); await wait(); await wait(); seen.back = $('#detail h2').textContent;
    """
    seen = in_browser(small_page(tmp_path), steps, tmp_path)
    assert seen["first"] == "Latent 0" and seen["count"] == "40 latents"
    assert seen["by_token"] == ["7"] and seen["current"] == ["7"]
    assert seen["latent"] == ["Latent 7", ["Einstein"], ["meta-latent 2", "meta-latent 6"], ["0.50", "0.25"]]
    assert seen["meta"] == ["Meta-latent 2", ["latent 7", "latent 12", "latent 1002"], ["Einstein", "Word12"]]
    assert seen["by_number"] == ["12"] and seen["entered"] == "Latent 12"
    assert seen["part"] == ["3", *map(str, range(30, 40))]
    assert seen["none"] == ["0 latents", []]
    assert seen["metas"] == ["8 meta-latents", ["7", "6", "5", "4", "3", "2", "1", "0"]]
    assert seen["meta_by_token"] == ["2"]
    assert seen["alone"] == ["None: its direction lies below the threshold for all of them."]
    assert seen["back"] == "Latent 12"


@browser
def test_any_text_is_shown_as_text(tmp_path: Path):
    steps = """
    location.hash = '#l8'; await wait();
    seen.context = $('#detail .context').textContent; seen.token = $('#detail .token').textContent;
    seen.images = document.images.length; seen.title = document.title; seen.heading = $('h1').textContent;
    """
    seen = in_browser(small_page(tmp_path), steps, tmp_path)
    assert seen["context"] == HOSTILE + "Word8 to them" and seen["token"] == HOSTILE
    assert seen["images"] == 0 and seen["title"] == seen["heading"] == "40 latents <of> a model"


@browser
@pytest.mark.parametrize("size", ["1300,900", "520,900"])
def test_thousands_of_latents_are_listed_in_parts_and_nothing_overflows(tmp_path: Path, size: str):
    steps = """
    seen.count = $('#count').textContent; seen.listed = all('#list a').length;
    type('word'); seen.some = $('#count').textContent; type('word5'); seen.fewer = $('#count').textContent;
    location.hash = '#l8'; await wait();
    seen.over = document.documentElement.scrollWidth - innerWidth;
    seen.wide = nodes('main *, nav *').filter(n => n.getBoundingClientRect().right > innerWidth + 1).length;
    """
    seen = in_browser(small_page(tmp_path, n=5000), steps, tmp_path, size)
    assert seen["count"] == "300 of 5000 latents" and seen["listed"] == 300
    assert seen["some"] == "300 of 4998 latents" and seen["fewer"] == "111 latents"
    assert seen["over"] <= 0 and seen["wide"] == 0
