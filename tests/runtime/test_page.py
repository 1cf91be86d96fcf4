"""The page of one stream: the whole text, safely, and nothing from elsewhere."""

from __future__ import annotations

import html
import math
import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from titans_runtime.page import Page
from titans_runtime.report import Lesson


def _page(text: bytes, name: str = "text", lessons: tuple[Lesson, ...] = ()) -> str:
    bits = np.random.default_rng(0).uniform(0, 9, (2, len(text))).astype(np.float32)
    return Page(name, text, bits[0], bits[1], lessons, {"bytes": str(len(text))}).render()


def _shown(page: str) -> str:
    """The text as a reader sees it."""
    found = re.search(r"<pre>(.*)</pre>", page, re.DOTALL)
    assert found is not None
    return html.unescape(re.sub(r"</?i[^>]*>", "", found[1]))


@given(text=st.binary(min_size=1, max_size=80) | st.text(min_size=1, max_size=30).map(str.encode))
def test_the_page_shows_every_byte(text: bytes) -> None:
    assert _shown(_page(text)).replace("\r", "\n") == text.decode("utf-8", "backslashreplace").replace(
        "\r", "\n"
    )


def test_a_text_and_its_name_cannot_add_to_the_page() -> None:
    page = _page(b"</pre><script>alert(1)</script> & $name", "<b>name</b>.html")
    assert page.count("<script>") == 1  # the page's own
    assert "<b>name" not in page
    assert _shown(page).endswith("</script> & $name")


def test_the_page_asks_nothing_of_a_network() -> None:
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", _page(b"a text of its own"))


def test_refusals_are_counted_and_lessons_drawn() -> None:
    taken = [Lesson("readout", i, 4, 4, 1.0, norms={"readout": 1.0 + i}, steps=1) for i in range(4)]
    refused = [Lesson("readout", 9, 4, refused="a <reason>"), Lesson("readout", 13, 4, refused="a <reason>")]
    page = _page(b"some text", lessons=(*taken, *refused))
    assert "<td>a &lt;reason&gt;</td><td>2</td>" in page
    assert "gradient norm of every lesson" in page
    assert "nan" not in _page(b"some text", lessons=(Lesson("readout", 0, 4, 4, math.nan),)).lower()


def test_losses_before_and_after_are_means_over_what_was_measured() -> None:
    lessons = (
        Lesson("readout", 0, 4, 4, loss=2.0, loss_after=1.0, steps=2),
        Lesson("readout", 4, 4, 2, loss=5.0, loss_after=4.0, steps=2),
        Lesson("readout", 8, 4, 4, loss=9.0, steps=1),
        Lesson("prediction", 0, 4, 4, loss=9.0, steps=1),
    )
    page = _page(b"some text", lessons=lessons)
    assert "readout: loss of a token 3.000 before the steps, 2.000 after the last step that was kept" in page
    assert "prediction: loss" not in page


def test_every_layer_has_a_curve_of_its_gradients() -> None:
    """Of twelve layers with two matrices each, beside the readout memory, none is left out."""
    memories = [f"layers.{layer}.memory.{part}" for layer in range(12) for part in range(2)]
    norms = {name: 3.0 if name.endswith("0") else 4.0 for name in memories}
    lessons = [Lesson("prediction", 4 * i, 4, 4, norms=norms, steps=1) for i in range(2)]
    lessons.append(Lesson("readout", 4, 4, 4, norms={"readout": 10.0, "other": math.nan}, steps=1))
    page = _page(b"some text", lessons=tuple(lessons))
    (chart,) = re.findall(r"<figure><figcaption>gradient norm.*?</figure>", page)
    assert re.findall("■ ([^<]*)</span>", chart) == [*(f"layers.{layer}" for layer in range(12)), "readout"]
    lines = re.findall('points="([^"]*)".*?stroke="([^"]*)"', chart)
    assert len({colour for _, colour in lines}) == 13
    height = {y for points, _ in lines[:12] for y in re.findall(r",([0-9.]+)", points)}
    assert height == {"75.0"}, "a norm of 5, half of the largest"
    assert "nan" not in chart


def test_lessons_of_two_editors_in_turn_are_all_drawn_thinned() -> None:
    lessons = [
        Lesson(name, i, 1, 1, norms={name: 1.0}, steps=1)
        for i in range(1500)
        for name in ("readout", "other")
    ]
    page = _page(bytes(1500), lessons=tuple(lessons))
    assert "one lesson in 3 is drawn" in page
    (chart,) = re.findall(r"<figure><figcaption>gradient norm.*?</figure>", page)
    assert [len(points.split()) for points in re.findall('points="([^"]*)"', chart)] == [500, 500]
