"""Scraped metadata must come out as plain text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlrank.data.text import clean_brand, clean_categories, clean_text, clean_title, cut, item_text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ('<span class="a-size-medium a-color-secondary">National Geographic</span>', "National Geographic"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("&lt;b&gt;Bold&lt;/b&gt; claim", "Bold claim"),
        ("a<br/>b<BR>c", "a b c"),
        ("x <script>alert('y')</script> z <style>p{}</style><!-- note -->!", "x z !"),
        ("cut off <span class='a-siz", "cut off"),
        ("size < 5 and > 3, I <3 it", "size < 5 and > 3, I <3 it"),
        ("tabs\tand\r\nlines\u00a0fold", "tabs and lines fold"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("lone \ud83d surrogate, nul \x00 byte", "lone surrogate, nul byte"),
        ("Cafe\u0301", "Café"),
        ('<a title="a > b">link</a>', "link"),
        ("", ""),
    ],
)
def test_markup_entities_and_whitespace_go(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


@given(st.text(alphabet=st.characters(), max_size=200), st.integers(1, 50))
def test_any_text_becomes_one_printable_line_within_its_length(raw: str, length: int) -> None:
    text = clean_text(raw, length)
    assert len(text) <= length
    assert text == " ".join(text.split())
    assert text.encode("utf-8").decode("utf-8").isprintable()


@given(st.text(alphabet="<>/abspn \"'=!-&;gtl", max_size=80))
def test_no_closed_tag_survives(raw: str) -> None:
    assert not re.search(r"<(?:span|b|a|p)(?: [a-z]*)?>", clean_text(raw))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("unit", ["<", "<a ", "<a '", '<a "', "&amp;", "<!--", "<script>", "<a b='", "</a '\""])
def test_hostile_markup_does_not_stop_a_run(unit: str) -> None:
    """With quadratic behaviour over the whole field this would take hours."""
    assert len(clean_text(unit * 200_000, 100)) <= 100


@pytest.mark.parametrize(
    "raw", ["", "None", "nan", "<span></span>", "var aPageStart = (new Date()).getTime();", "&nbsp;"]
)
def test_titles_that_are_none(raw: str) -> None:
    assert clean_title(raw) == ""


def test_brands_and_categories_lose_placeholders() -> None:
    assert clean_brand("Unknown") == ""
    assert clean_brand("Visit Amazon's Jane Doe Page") == "Jane Doe"
    assert clean_brand("By Terry") == "By Terry"
    assert clean_categories(["Beauty", "</span></span>", "Beauty", "Nails", "x" * 100]) == ["Beauty", "Nails"]


def test_cut_ends_at_a_word_where_that_is_cheap() -> None:
    assert cut("nine word pieces", 10) == "nine word"
    assert cut("aaaa bbbb cc", 10) == "aaaa bbbb"
    assert cut("a verylongwordindeed", 10) == "a verylong"
    assert cut("short", None) == "short"


def test_item_text_puts_the_most_telling_first() -> None:
    assert item_text("Mug", "Alva", ["Home", "Kitchen"], "Blue.", 100) == "Mug | Alva | Home > Kitchen | Blue."
    assert item_text("Mug", None, [], None, 100) == "Mug"
    assert item_text("Mug", "Alva", [], "long " * 100, 20).startswith("Mug | Alva | long")
