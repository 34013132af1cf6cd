"""Token ids of prompts from those of their lines: items come again and again, and need be tokenised once.

Byte-level BPE splits a text by a regular expression before it merges anything, so what lies on two sides of such a
split can be tokenised apart. The known expressions always split

- Qwen2 to Qwen3.5 and Llama 3: between a line break and what is no blank, for they take line breaks with what precedes
  them, as in ``")\\n"``;
- GPT-2 and SmolLM2: between what is no blank and a line break, for they take blanks with what follows them, as in
  ``" a"``;
- all: between the number or hyphen that a line begins with and the blank behind it.

A tokenizer with another expression, another normaliser or added tokens that reach over blanks gets whole texts.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any

_LETTERS_AND_BREAKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BREAK_WITH_BEFORE = {
    _LETTERS_AND_BREAKS,
    _LETTERS_AND_BREAKS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    _LETTERS_AND_BREAKS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),
}
_NUMBER = re.compile(r"\n*(?:-|(?:<\S*>)?\d{1,3}\.)(?= \S)")  # behind a picture, too
_KEPT = 2**16  # pieces; about 300 bytes each


class TokenCache:
    """Token ids of texts, without special tokens around them.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lines = lines_of(tokenizer)
        self._known: dict[str, array[int]] = {}

    def __call__(self, text: str) -> array[int]:
        """The ids that the tokenizer gives for the whole text."""
        if self._lines is None:
            return array("i", self._tokenizer(text, add_special_tokens=False)["input_ids"])
        pieces = [piece for line in self._lines(text) for piece in _behind_number(line)]
        known = self._known
        if unknown := [piece for piece in dict.fromkeys(pieces) if piece not in known]:
            if len(known) + len(unknown) > _KEPT:
                self._known = known = {}  # other threads go on with theirs
                unknown = list(dict.fromkeys(pieces))
            found = self._tokenizer(unknown, add_special_tokens=False)["input_ids"]
            known.update(zip(unknown, (array("i", ids) for ids in found), strict=True))
        ids = array("i")
        for piece in pieces:
            ids.extend(known[piece])
        return ids


def _behind_number(line: str) -> tuple[str, ...]:
    found = _NUMBER.match(line)
    return (line,) if found is None else (found[0], line[found.end() :])


def _with_break_behind(text: str) -> Iterator[str]:
    """Pieces that begin behind line breaks, with what is no blank."""
    held = ""
    for line in text.split("\n"):
        if held and line and not line[0].isspace():
            yield held
            held = ""
        held += line + "\n"
    yield held[:-1]


def _with_break_before(text: str) -> Iterator[str]:
    """Pieces that begin with the line breaks behind what is no blank."""
    first, *lines = text.split("\n")
    held = first
    for line in lines:
        if held and not held[-1].isspace():
            yield held
            held = ""
        held += "\n" + line
    yield held


Lines = Callable[[str], Iterator[str]]


def lines_of(tokenizer: Any) -> Lines | None:
    """How a tokenizer's texts can be cut at line breaks without changing a token; None where that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation or backend.padding or backend.pre_tokenizer is None:
        return None
    if _state(backend.normalizer) not in ({}, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        return None
    # One that takes the blanks before it, or that holds some, may reach over the end of a piece.
    if any(token.lstrip or re.search(r"\s", token.content) for token in tokenizer.added_tokens_decoder.values()):
        return None
    state = _state(backend.pre_tokenizer)
    *before, byte_level = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if byte_level["type"] != "ByteLevel" or byte_level["add_prefix_space"]:
        return None
    if not before or before == [{"type": "Digits", "individual_digits": True}]:
        return _with_break_before if byte_level["use_regex"] else None
    split = before[0]
    if len(before) > 1 or split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    known = split["pattern"].get("Regex") in _BREAK_WITH_BEFORE and not byte_level["use_regex"]
    return _with_break_behind if known else None


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())
