"""Scraped metadata must come out as plain text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlrank.data.text import clean_brand, clean_categories, clean_text, clean_title, cut, item_text, templated_text
from vlrank.text_template import TEXT_FIELDS, TemplateField, parse_template


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


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{title}", "Blue mug"),
        ("{title:.4} [{categories[-1]}]", "Blue [Mugs]"),
        ("{categories[0]}: {title}", "Home: Blue mug"),
        ("{categories} / {brand}", "Home > Mugs / Alva"),
        ("{{{brand}}} {description:.6}", "{Alva} Holds"),
        ("  {title} \n ({brand}) ", "Blue mug (Alva)"),
    ],
)
def test_templates_show_what_they_name(template: str, text: str) -> None:
    parts = parse_template(template)
    assert templated_text(parts, "Blue mug", "Alva", ["Home", "Mugs"], "Holds tea.", 60) == text


def test_what_an_item_lacks_leaves_no_brackets_and_a_missing_title_is_told_by_the_rest() -> None:
    short = parse_template("{title:.40} [{categories[-1]}] ({brand})")
    assert templated_text(short, "Mug", None, [], None, 60) == "Mug"
    assert templated_text(short, "", "Alva", ["Home", "Mugs"], None, 60) == "Alva | Home > Mugs [Mugs] (Alva)"
    assert templated_text(parse_template("{brand}"), "Mug", None, [], None, 60) == ""
    # Brackets of the title itself are the shop's.
    assert templated_text(parse_template("{title} {brand}"), "Mug []", None, [], None, 60) == "Mug []"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{titel}", "unknown field `{titel}`; fields are title, brand, categories, description"),
        ("{source_id}", "unknown field"),
        ("{title.__class__}", "cannot be read"),
        ("{title!r}", "cannot be read"),
        ("{title:>40}", "cannot be read"),
        ("{0}", "unknown field"),
        ("{}", "unknown field"),
        ("{title[0]}", "title is no list"),
        ("{categories[1]}", "there is no [1]"),
        ("{categories[__class__]}", "there is no [__class__]"),
        ("{title:.0}", "nothing is left"),
        ("{title", "`{` at character 1 is half a pair (`{title`); write {{ for a brace"),
        ("{title} }", "`}` at character 9 is half a pair (`{title} }`)"),
        (f"{'long ' * 9}{{title}} then {{ broken {'off ' * 9}", "pair (`...g {title} then { broken off off...`)"),
        ("only words", "names no field"),
        ("", "names no field"),
    ],
)
def test_everything_else_in_braces_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_template(template)


@given(st.text(alphabet="{}[]:.-01!_ ategoriscld\n", max_size=40), st.text(max_size=30), st.integers(1, 40))
def test_any_template_is_refused_or_shows_only_plain_pieces_and_fields(template: str, title: str, length: int) -> None:
    """No template of any origin does anything else, and the text is one line of at most the length asked for."""
    try:
        parts = parse_template(template)
    except ValueError:
        return
    fields = [part for part in parts if isinstance(part, TemplateField)]
    assert {part.name for part in fields} <= set(TEXT_FIELDS)
    title = clean_title(title)
    text = templated_text(parts, title, "Alva", ["Home", "Mugs"], None, length)
    assert len(text) <= length
    assert text == " ".join(text.split())


@given(st.text(max_size=40))
def test_plain_text_around_a_field_stays(plain: str) -> None:
    escaped = plain.replace("{", "{{").replace("}", "}}")
    line = " ".join(f"{plain}Mug{plain}".split())
    assert templated_text(parse_template(f"{escaped}{{title}}{escaped}"), "Mug", None, [], None, 1000) == line
