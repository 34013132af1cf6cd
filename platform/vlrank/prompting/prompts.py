"""The ranking prompt, in one place for training, validation and reranking.

The history comes before the candidates so that prompts of one user share a prefix that engines can reuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vlrank.data.items import ItemMeta
from vlrank.prompting.chat_template import render_messages
from vlrank.prompting.modes import ModeSpec

CANDIDATES = "Candidate items"
"""The headline that ends the shared beginning of all prompts of a user."""

INSTRUCTIONS = (
    "You are a recommendation ranking assistant.\n\n"
    "Choose exactly ONE item the user is most likely to interact with next."
)


@dataclass(frozen=True, slots=True)
class RankingPrompt:
    """One question to a reranker: which of N numbered candidates comes next?

    Attributes:
        messages: Chat messages for `render_messages`, one user message.
        image_paths: Pictures in the order of the ``{"type": "image"}`` parts; empty in text modes.
        n_candidates: N; the answers are "1".."N".
    """

    messages: list[dict[str, Any]]
    image_paths: tuple[str, ...]
    n_candidates: int


def item_line(spec: ModeSpec, item: ItemMeta, max_chars: int, *, with_shown: bool = True) -> str:
    """One item in one line: its text, and what the mode shows of it, e.g. ``Mug (Image: a red mug)``.

    Line breaks become blanks, because each candidate is one line. Where the line is longer than ``max_chars``, the text
    is cut before the shown part.
    """
    shown = item.get(spec.shows) if with_shown and spec.label else None
    return _line(item["text"], spec.label, str(shown) if shown else "", max_chars)


@lru_cache(maxsize=2**16)  # items come again and again
def _line(text: str, label: str, shown: str, max_chars: int) -> str:
    text = plain(text)
    if not shown:
        return text[:max_chars].rstrip()
    suffix = f" ({label}: {plain(shown)})"
    room = max(0, max_chars - len(suffix))
    return (text[:room].rstrip() + suffix)[:max_chars]


def plain(text: str) -> str:
    """An item's text in one line, without special tokens: it must not end the message or stand for a picture."""
    return " ".join(text.replace("<|", "< |").split())


def build_prompt(
    spec: ModeSpec, history: Sequence[ItemMeta], candidates: Sequence[ItemMeta], max_item_chars: int = 400
) -> RankingPrompt:
    """The prompt for one user.

    Args:
        spec: The mode.
        history: The user's items, oldest first, already cut to ``max_history``.
        candidates: The items to choose from, in the order in which they are numbered from 1.
        max_item_chars: Longest line of one item.
    """
    lines = [f"- {item_line(spec, item, max_item_chars)}" for item in history]
    head = f"{INSTRUCTIONS}\n\nUser history:\n" + "\n".join(lines) + f"\n\n{CANDIDATES}:\n"
    tail = f"\n\nAnswer with only one number (1-{len(candidates)})."
    numbered = [f"{i}. {item_line(spec, item, max_item_chars)}" for i, item in enumerate(candidates, start=1)]
    if not spec.pixels:
        content: Any = head + "\n".join(numbered) + tail
        return RankingPrompt([{"role": "user", "content": content}], (), len(candidates))
    # An item without a picture (`missing: text`) is shown by its line alone. Adjacent texts are joined into one part,
    # because templates may write something between parts.
    content, images, text = [], [], head
    for item, line in zip(candidates, numbered, strict=True):
        if path := item.get("image_path"):
            content += [{"type": "text", "text": text}, {"type": "image"}]
            images.append(path)
            text = ""
        text += line + "\n"
    content.append({"type": "text", "text": text.rstrip("\n") + tail})
    return RankingPrompt(
        [{"role": "user", "content": [part for part in content if part.get("text") != ""]}],
        tuple(images),
        len(candidates),
    )


def render(tokenizer: Any, prompt: RankingPrompt) -> str:
    """The prompt's text up to where the answer begins, through the model's own chat template.

    Args:
        tokenizer: A tokenizer or processor; image parts become the template's single image placeholders.
    """
    return render_messages(tokenizer, prompt.messages)
