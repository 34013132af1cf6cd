"""A page to look at before spending GPU hours: pictures, item texts and what was generated, side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from vlrank.data.picture import PictureMissing, UnreadablePicture
from vlrank.data.tables import atomic_write_text
from vlrank.generation.job import load_picture
from vlrank.storage import Location

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; --bad: #c0392b; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } .facts { color: var(--dim); margin: 0 0 1.5rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-radius: 10px; overflow: hidden; display: flex; flex-direction: column; }
.picture { height: 200px; display: grid; place-items: center; background: #8881; color: var(--dim); }
.picture img { max-width: 100%; max-height: 200px; object-fit: contain; }
.words { padding: .7rem .9rem; } h2 { font-size: .8rem; color: var(--dim); margin: 0; font-weight: 600; }
p { margin: .35rem 0; overflow-wrap: anywhere; } .made { font-size: 1.02rem; }
.text { color: var(--dim); font-size: .88rem; } .made, .text { unicode-bidi: plaintext; }
.bad { color: var(--bad); } dt { color: var(--dim); font-size: .78rem; } dd { margin: 0 0 .3rem; }
"""


@dataclass(frozen=True, slots=True)
class Card:
    """One item on the sheet.

    Attributes:
        item_id: The item.
        text: The item's own text.
        picture: Absolute path, or None.
        generated: Title -> text of what was generated (caption, semantic summary), what is missing left out.
        problem: Why the item has none, or None.
    """

    item_id: int
    text: str
    picture: str | None
    generated: dict[str, str]
    problem: str | None = None


def write_contact_sheet(path: Location, title: str, facts: str, cards: Sequence[Card]) -> None:
    """Write the page: one file that needs nothing else, pictures embedded at 320 pixels.

    Raises:
        UserError: no space left, or no permission.
    """
    body = "\n".join(_card(card) for card in cards)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="facts">{html.escape(facts)}</p>\n'
        f'<main class="grid">\n{body}\n</main></body></html>\n'
    )
    atomic_write_text(path, page)


def _card(card: Card) -> str:
    made = "".join(
        f"<dt>{html.escape(name)}</dt><dd class=made>{html.escape(text)}</dd>" for name, text in card.generated.items()
    )
    problem = f'<p class="bad">{html.escape(card.problem)}</p>' if card.problem else ""
    return (
        f'<article id="item-{card.item_id}"><div class="picture">{_picture(card)}</div><div class="words">'
        f"<h2>item {card.item_id}</h2><dl>{made}</dl>{problem}"
        f'<p class="text">{html.escape(card.text) or "<em>no text</em>"}</p></div></article>'
    )


def _picture(card: Card) -> str:
    if card.picture is None:
        return "no picture"
    try:
        picture = load_picture(card.picture, 320)
    except UnreadablePicture as error:
        return "picture missing" if isinstance(error, PictureMissing) else "picture cannot be read"
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="item {card.item_id}" src="data:image/jpeg;base64,{data}">'
