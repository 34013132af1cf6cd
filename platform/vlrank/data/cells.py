"""Cells of flat tables that hold the text of a list or dictionary: what pandas, json and NumPy write into a CSV.

``['A', 'B']`` is Python, ``["A", "B"]`` JSON, ``['A' 'B']`` NumPy, which leaves the commas out, and pandas nests them:
``{'hi_res': array(['http://...', None], dtype=object)}``. One parser of plain values reads them all and evaluates
nothing; what it does not read whole, such as ``[NEW] Soap``, is text.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from typing import Any

_MISSING = {"", "nan", "NaN", "None", "null", "NULL", "<NA>", "NaT"}
_CONSTANTS = dict.fromkeys(("None", "nan", "NaN", "null", "NULL", "NaT", "NA", "inf"))
_CONSTANTS |= {"True": True, "true": True, "False": False, "false": False}
_STRUCTURE = re.compile(r"[\[{(]|(?:[\w.]*array|list|tuple|set|dict)\(")
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string> [bBuUrR]{0,2} (?: '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" ))
      | (?P<number> [-+]? (?:\d+\.?\d*|\.\d+) (?:[eE][-+]?\d+)? )
      | (?P<gap> \.\.\. )  # NumPy shows the ends of a long array
      | (?P<keyword> \w+ \s*=\s* (?: '[^']*' | "[^"]*" | \([^()]*\) | [\w.]+ ) )  # dtype=object
      | (?P<name> [-+]?[A-Za-z_][\w.]* | <NA> )
      | (?P<mark> [][(){},:] )
    )""",
    re.DOTALL | re.VERBOSE,
)
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_MAX_DEPTH = 30


def parse_cell(value: Any) -> Any:
    """The value that a cell means: a list or dictionary for the text of one, None for the text of a missing value.

    Everything else comes back as it is.

    >>> parse_cell("['Beauty' 'Hair']"), parse_cell('["Beauty", null]'), parse_cell("nan"), parse_cell("[NEW] Soap")
    (['Beauty', 'Hair'], ['Beauty', None], None, '[NEW] Soap')
    """
    if not isinstance(value, str):
        return None if _is_missing(value) else value
    text = value.strip()
    if text in _MISSING:
        return None
    if text[-1] not in ")]}" or not _STRUCTURE.match(text):
        return value
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        try:
            parsed = _Parser(text).parse()
        except ValueError:
            return value
    if _is_missing(parsed):
        return None
    quoted = '"' in text or "'" in text  # [1984] is the title of a book
    return parsed if quoted and isinstance(parsed, list | dict) else value


def _is_missing(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return all(map(_is_missing, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


class _Parser:
    """Recursive descent over the tokens of one cell."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._kind: str | None = None
        self._token = ""
        self._advance()

    def parse(self) -> Any:
        """The one value that the text is.

        Raises:
            ValueError: anything else.
        """
        value = self._value(0)
        if self._kind is not None:
            raise ValueError("text goes on after the value")
        return value

    def _advance(self) -> str:
        token, found = self._token, _TOKEN.match(self._text, self._at)
        if found:
            self._kind, self._at = found.lastgroup, found.end()
            self._token = found.group(found.lastgroup or 0)
        elif self._text[self._at :].strip():
            raise ValueError("not a token")
        else:
            self._kind, self._token = None, ""
        return token

    def _take(self, mark: str) -> bool:
        if self._kind != "mark" or self._token != mark:
            return False
        self._advance()
        return True

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        kind, token = self._kind, self._advance()
        if kind == "string":
            return _string(token)
        if kind == "number":
            return float(token) if re.search(r"[.eE]", token) else int(token)
        if kind == "mark" and token in ("[", "("):
            return self._items(_CLOSING[token], depth)
        if kind == "mark" and token == "{":
            return self._braces(depth)
        if kind == "name" and self._take(
            "("
        ):  # array([...], dtype=object), list([...]), np.str_('A'), Timestamp('...')
            arguments = self._items(")", depth, ("gap", "keyword"))
            return arguments[0] if arguments else None
        if kind == "name" and token.lstrip("+-") in _CONSTANTS:
            return _CONSTANTS[token.lstrip("+-")]
        raise ValueError(f"{token!r} is no value")

    def _items(self, closing: str, depth: int, skipped: tuple[str, ...] = ("gap",)) -> list[Any]:
        items: list[Any] = []
        while not self._take(closing):
            if self._kind in skipped:
                self._advance()
            else:
                items.append(self._value(depth + 1))
            self._take(",")
        return items

    def _braces(self, depth: int) -> dict[Any, Any] | list[Any]:
        keys: list[Any] = []
        values: list[Any] = []
        while not self._take("}"):
            keys.append(self._value(depth + 1))
            if self._take(":"):
                values.append(self._value(depth + 1))
            self._take(",")
        if values and len(values) != len(keys):
            raise ValueError("a key without a value")
        return dict(zip(map(str, keys), values, strict=True)) if values or not keys else keys


def _string(token: str) -> str:
    if token.startswith('"'):
        try:
            return str(json.loads(token, strict=False))
        except ValueError:
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that Python does not know stay as they are
        try:
            value = ast.literal_eval(token)
        except SyntaxError:  # a line break within
            value = ast.literal_eval(token.replace("\n", "\\n"))
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
