"""The quality gate: rules that reject texts which are useless in a prompt."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

REFUSAL = re.compile(
    r"^\W*(i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e|as an ai|i['’]?m (unable|not able)|i am (unable|not able)"
    r"|i (cannot|can['’]?t|could not|couldn['’]?t|am unable to)"
    r" (see|view|help|assist|describe|provide|access|determine|identify|process)"
    r"|there (is|was) no (image|picture|photo)|(the|this) (image|picture) (cannot|can['’]?t|could not) be)",
    re.IGNORECASE,
)

# Function words that hardly occur in the other languages of the table.
_FUNCTION_WORDS = {
    "en": {"the", "and", "with", "for", "this", "that", "is", "are", "of", "it", "from", "has", "who"},
    "de": {"der", "und", "mit", "das", "ist", "ein", "eine", "für", "auf", "nicht", "einem", "einer", "sich"},
    "fr": {"le", "les", "et", "avec", "une", "est", "pour", "dans", "des", "sur", "qui", "cette"},
    "es": {"el", "los", "y", "con", "una", "es", "para", "del", "las", "por", "esta", "que"},
    "it": {"il", "gli", "e", "con", "una", "è", "per", "della", "che", "di", "questo", "nel"},
    "pt": {"o", "os", "com", "uma", "é", "para", "não", "que", "dos", "em", "ao", "um"},
    "nl": {"het", "een", "met", "voor", "niet", "van", "zijn", "deze", "en", "op", "te", "dat"},
}
_WORD = re.compile(r"\w+(?:['’]\w+)?")
# Thai to Lao, Burmese, Khmer, kana, Chinese characters.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
_RUN = 12
"""Letters of an unspaced script that count as much as four words."""


def problem(text: str, *, question: str, cut_off: bool = False, language: str = "en") -> str | None:
    """What is wrong with a generated text; None when nothing is.

    Args:
        text: The text, stripped.
        question: The prompt's text, with the item's text in it.
        cut_off: The model stopped because it reached its token limit.
        language: ``en``, or ``any`` to accept all.

    Returns:
        ``empty``, ``refusal``, ``repetition``, ``copy``, ``wrong_language`` or ``truncated``, the first that applies.
    """
    words = _WORD.findall(text.lower())
    if not any(character.isalpha() for character in text):
        return "empty"
    if REFUSAL.match(text):
        return "refusal"
    if repeats(words, text):
        return "repetition"
    if copies(words, _WORD.findall(question.lower())):
        return "copy"
    if language != "any" and not in_english(text, words):
        return "wrong_language"
    return "truncated" if cut_off else None


def repeats(words: list[str], text: str) -> bool:
    """A run of four words occurs three times, one word fills a third of a text of 12 words or more, or a character is
    repeated 20 times. Scripts that put no blanks between words are judged by `_unspaced_repeats` too."""
    if re.search(r"(\S)\1{19}", text) or _unspaced_repeats(text):
        return True
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if max(runs.values(), default=0) >= 3:
        return True
    return len(words) >= 12 and Counter(words).most_common(1)[0][1] > len(words) / 3


def _unspaced_repeats(text: str) -> bool:
    """Whether a phrase is said four times in a row, a character six times, or `_RUN` letters occur three times."""
    letters = "".join(
        c for c in text if c.isalpha() or unicodedata.category(c).startswith("M")
    )  # Thai vowels are marks
    if len(_UNSPACED.findall(letters)) * 2 <= len(letters):
        return False
    runs = Counter(letters[start : start + _RUN] for start in range(len(letters) - _RUN + 1))
    return bool(re.search(r"(.{2,})\1{3}|(.)\2{5}", letters)) or max(runs.values(), default=0) >= 3


def copies(words: list[str], question: list[str], run: int = 8) -> bool:
    """Half of the text's words lie in runs of ``run`` words that stand in the question word for word.

    Short texts (fewer than ``run`` words) count as copies only when the question contains them as a whole and they are
    at least 5 words long: a title of two words may well be repeated.
    """
    if len(words) < run:
        joined = f" {' '.join(question)} "
        return len(words) >= 5 and f" {' '.join(words)} " in joined
    known = {tuple(question[i : i + run]) for i in range(len(question) - run + 1)}
    covered = [False] * len(words)
    for i in range(len(words) - run + 1):
        if tuple(words[i : i + run]) in known:
            covered[i : i + run] = [True] * run
    return sum(covered) * 2 >= len(words)


def in_english(text: str, words: list[str]) -> bool:
    """Latin script, and no other language's function words more often than English ones. Short texts pass."""
    letters = [character for character in text if character.isalpha()]
    latin = sum(1 for character in letters if character < "ɐ")  # up to Latin Extended-B
    if latin < 0.7 * len(letters):
        return False
    hits = {name: sum(word in known for word in words) for name, known in _FUNCTION_WORDS.items()}
    other = max(count for name, count in hits.items() if name != "en")
    return other < 3 or other <= hits["en"]
