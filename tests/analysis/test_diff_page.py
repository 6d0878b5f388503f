"""The page of what differs between two models: what is in it, and what a person sees in a real browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from core.analysis.diff_page import TEMPLATE, Bar, Context, Fact, Kind, Latent, Point, write_page
from core.analysis.pages import STYLE
from tests.browser import browser, in_browser
from tests.reports.test_render import INJECTIONS, Elements

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">&amp;${x}\u2028"
NAN = float("nan")
POINTS = [
    Point(3, "chat_only", 0.97, 0.02, 0.1, True), Point(4, "chat_only", 0.92, 0.4, 0.7, False),
    Point(8, "base_only", 0.05, NAN, NAN, False),
    Point(9, "shared", 0.5, 1.0, 1.1, False), Point(11, "other", 0.7, 0.5, 0.6, False),
]  # fmt: skip


def context(*tokens: str, where: str = "chat") -> Context:
    """The first token comes from the template, the last is the strongest."""
    strengths = [n / len(tokens) for n in range(1, len(tokens) + 1)]
    return Context(where, tokens, [0.0, *strengths[1:]], [n == 0 for n in range(len(tokens))])


def small_page(folder: Path) -> Path:
    latents = [
        Latent(3, 0.0, 0.02, 0.75, [context("<|user|>", "who", " Pip")]),
        Latent(4, 0.001, 0.01, 0.1, [context("<|user|>", HOSTILE)]),
        Latent(8, 0.2, 0.3, NAN, []),
    ]
    bars = [
        Bar("None", "all answer tokens", 0.5, 0.4, 0.6, ""),
        Bar("best half", "all answer tokens", 0.2, 0.1, 0.3, "2 of 2 latents"),
        Bar("None", "first 9 tokens", 1.5, NAN, NAN, ""),
    ]  # fmt: skip
    facts = [Fact("variance explained", "94 %"), Fact("never fire", "0")]
    path = folder / "diff.html"
    write_page(path, "chat <and> base", "A crosscoder.", facts, POINTS, latents, bars)
    return path


def data_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text().partition('id="data">')[2].partition("</script>")[0])


def test_the_page_needs_nothing_else_and_counts_the_classes(tmp_path: Path):
    assert not re.search(r"https?://|<link|@import|url\(|src=", TEMPLATE.read_text() + STYLE.read_text())
    data = data_of(small_page(tmp_path))
    assert data["counts"] == {"chat_only": 2, "base_only": 1, "shared": 1, "other": 1}
    assert sum(data["histogram"]) == 5 and data["histogram"][48] == data["histogram"][46] == data["histogram"][2] == 1
    assert data["points"][2] == [8, "base_only", 0.05, None, None, False] and data["bars"][2][3] is None


def test_a_large_crosscoder_is_thinned_and_listed_latents_stay(tmp_path: Path):
    kinds: list[Kind] = ["shared", "chat_only"]
    points = [Point(i, kinds[i % 1000 == 7], 0.5, 1.0, 1.0, False) for i in range(70_000)]
    write_page(tmp_path / "p.html", "", "", [], points, [Latent(7, 0, 0, 0, [])], [])
    data = data_of(tmp_path / "p.html")
    assert (
        len(data["points"]) == 17_500 + 1
        and data["counts"]["chat_only"] == 70
        and [7, "chat_only"] in [p[:2] for p in data["points"]]
    )
    assert "17,501 of 70,000 latents" in (tmp_path / "p.html").read_text()


def test_a_latent_without_a_point_and_parts_of_other_lengths_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"without a point: \[5\]"):
        write_page(tmp_path / "p.html", "", "", [], POINTS, [Latent(5, 0, 0, 0, [])], [])
    with pytest.raises(ValueError, match="zip"):
        write_page(tmp_path / "p.html", "", "", [], POINTS, [Latent(3, 0, 0, 0, [Context("web", ["a"], [], [])])], [])


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_text_of_a_model_is_more_than_text(text: str, tmp_path: Path):
    bars, latent = [Bar(text, text, 1, 1, 1, text)], Latent(3, 0, 0, 0, [context(text, text, where=text)])
    write_page(tmp_path / "p.html", text, text, [Fact(text, text)], POINTS, [latent], bars)
    whole, template = Elements((tmp_path / "p.html").read_text()), Elements(TEMPLATE.read_text())
    assert [tag for tag, _ in whole.found] == [tag for tag, _ in template.found]
    assert data_of(tmp_path / "p.html")["facts"] == [[text.encode("utf-8", "replace").decode()] * 2]


@browser
def test_a_person_sees_the_pictures_opens_a_latent_and_goes_back(tmp_path: Path):
    steps = """
    seen.heading = $('#detail h2').textContent; seen.facts = all('.facts dd');
    seen.legend = all('#histogram .legend li');
    seen.dots = all('#scatter circle').length;
    seen.kl = nodes('figure.kl').map(f => f.querySelectorAll('.whisker').length);
    seen.kl_names = [...nodes('figure.kl')[0].querySelectorAll('text')].map(t => t.textContent);
    seen.list = all('#list .number'); seen.words = all('#list .token');
    $('#scatter circle[data-id="3"]').dispatchEvent(new Event('click')); await wait();
    seen.clicked = [$('#detail h2').textContent, $('#detail .fact').textContent, all('.facts dd')];
    seen.context = $('.context').textContent; seen.template = all('.context .template');
    seen.current = all('#list a[aria-current=true] .number');
    seen.chosen = nodes('circle.chosen').map(c => c.dataset.id);
    location.hash = '#l8'; await wait(); seen.silent = [all('#detail .none'), $('#detail .fact').textContent];
    location.hash = '#l4'; await wait(); seen.decoupled = $('#detail .fact').textContent;
    seen.hostile = $('.context').textContent;
    $('#overview').click(); await wait(); seen.over = $('#detail h2').textContent;
    type('pip'); seen.by_token = all('#list .number'); type('8'); seen.by_number = all('#list .number'); type('');
    $('#order').value = 'rate'; $('#order').dispatchEvent(new Event('change')); seen.by_rate = all('#list .number');
    seen.images = document.images.length; seen.title = document.title;
    """
    seen = in_browser(small_page(tmp_path), steps, tmp_path)
    assert seen["heading"] == seen["over"] == "What differs" and seen["facts"] == ["94 %", "0"]
    assert seen["legend"] == ["chat only: 2", "base only: 1", "shared: 1", "other: 1"] and seen["dots"] == 4
    assert seen["kl"] == [2, 0] and {"None", "best half", "0.500", "0.200"} <= set(seen["kl_names"])
    assert seen["list"] == ["3", "4", "8"] and seen["words"][:2] == ["who", "pip"]
    assert seen["clicked"][:2] == [
        "Latent 3",
        "Its decoder lies in the chat model alone. By Latent Scaling the direction is the chat model's own.",
    ]
    assert seen["clicked"][2] == ["0.970", "0.020", "0.100", "0 %", "2.0 %", "75 %"]
    assert (
        seen["context"] == "chat<|user|>who Pip"
        and seen["template"] == ["<|user|>"]
        and seen["current"] == ["3"] == seen["chosen"]
    )
    assert seen["silent"][0] == ["It never fired on this text."] and "too rarely" in seen["silent"][1]
    assert "in the base model as well" in seen["decoupled"] and seen["hostile"] == "chat<|user|>" + HOSTILE
    assert seen["by_token"] == ["3"] and seen["by_number"] == ["8"] and seen["by_rate"] == ["8", "3", "4"]
    assert seen["images"] == 0 and seen["title"] == "chat <and> base"


@browser
@pytest.mark.parametrize("size", ["1300,900", "520,900"])
def test_nothing_overflows(tmp_path: Path, size: str):
    steps = """
    const over = () => nodes('main *, nav *').filter(n => n.getBoundingClientRect().right > innerWidth + 1).length;
    seen.overview = [document.documentElement.scrollWidth - innerWidth, over()];
    location.hash = '#l4'; await wait(); seen.latent = [document.documentElement.scrollWidth - innerWidth, over()];
    """
    seen = in_browser(small_page(tmp_path), steps, tmp_path, size)
    assert seen["overview"][0] <= 0 and seen["overview"][1] == 0
    assert seen["latent"][0] <= 0 and seen["latent"][1] == 0
