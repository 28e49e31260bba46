"""Text and numbers as a reader sees them: hostile tokens made visible, long ones shortened, scores with digits.

A token may hold anything: line breaks, escape sequences, invisible or reordering characters, lone surrogates, 10,000
letters. `visible` returns text that is safe to print anywhere (markup still has to be escaped by the view).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable

__all__ = ["amount", "direction", "listed", "percent", "shorten", "signed", "visible"]

_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_JOINERS = "\u200c\u200d"  # they shape emoji and Indic or Persian words, so inside a word they stay
_SELECTORS = "\ufe0e\ufe0f"  # text or emoji style of the character before
_MARKS_KEPT = 3  # combining marks stacked on one letter; real orthographies need at most about three


def visible(text: str) -> str:
    r"""The text with every control, invisible or reordering character replaced by a visible sign.

    >>> visible(" a\n"), visible("\x00"), visible("\u202e")
    (' a⏎', '␀', '⟨U+202E⟩')
    """
    out: list[str] = []
    marks = 0
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        marks = marks + 1 if category[0] == "M" else 0
        if character in _SHOWN:
            out.append(_SHOWN[character])
        elif character < " ":
            out.append(chr(0x2400 + ord(character)))
        elif character in _JOINERS + _SELECTORS:
            inside = place > 0 and text[place - 1] not in _JOINERS + _SELECTORS + " "
            out.append(character if inside else _code(character))
        elif category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            out.append(_code(character))
        elif marks and not place:
            out.append("◌" + character)  # a mark on its own would sit on the token before
        elif marks > _MARKS_KEPT:
            if marks == _MARKS_KEPT + 1:
                out.append("…")
        else:
            out.append(character)
    return "".join(out)


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


def shorten(text: str, limit: int = 48, note: bool = True) -> str:
    """Visible text of at most about `limit` characters, cut in the middle; `note` adds the true length.

    >>> shorten("a" * 10_000, 8)
    'aaaa…aaa (10,000 characters)'
    """
    if len(text) <= limit:
        shown = visible(text)
        if len(shown) <= 2 * limit:  # codes of invisible characters are longer than what they stand for
            return shown
    head, tail = limit - limit // 2, (limit - 1) // 2
    short = _fitting(text[:head], limit) + "…" + _fitting(text[len(text) - tail :], limit)
    return f"{short} ({len(text):,} characters)" if note else short


def _fitting(text: str, limit: int) -> str:
    shown = visible(text)
    return shown if len(shown) <= limit else shown[:limit]


def listed(token: str, limit: int = 24, note: bool = True) -> str:
    """A token as an entry of a list or a label: spaces at its ends are drawn, an empty one is named.

    >>> listed(" dogs"), listed("")
    ('␣dogs', '⟨empty⟩')
    """
    if not token:
        return "⟨empty⟩"
    text = shorten(token, limit, note)
    core = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - before - len(core) if core else 0
    return "␣" * before + core + "␣" * after


def direction(tokens: Iterable[str]) -> str:
    """`rtl` where most letters are written right to left, otherwise `ltr`."""
    right = left = 0
    for token in tokens:
        for character in token[:200]:
            side = unicodedata.bidirectional(character)
            right += side in ("R", "AL")
            left += side == "L"
    return "rtl" if right > left else "ltr"


def amount(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and a real minus sign; tiny ones never print as 0.00.

    >>> amount(3.1), amount(-0.00123), amount(1234.5), amount(0.0)
    ('3.10', '−0.00123', '1234', '0')
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = math.floor(math.log10(abs(value)))
    if -5 < size < 7:
        text = f"{value:.{max(0, digits - 1 - size)}f}"
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "−") if not text.startswith("-") else "−" + text[1:]


def signed(value: float, digits: int = 3) -> str:
    """The same with a plus sign where positive: for scores."""
    return ("+" if value > 0 else "") + amount(value, digits)


def percent(fraction: float) -> str:
    """A share in percent; what is nearly but not quite everything is not rounded to it.

    >>> percent(0.971), percent(0.99999), percent(0.00000123)
    ('97.1 %', '>99.9 %', '0.000123 %')
    """
    if 0.9995 <= fraction < 1:
        return ">99.9 %"
    return f"{amount(100 * fraction)} %"
