"""Class names as text that tables, pictures and terminals can hold. A folder's name may hold any byte but / and NUL."""

from __future__ import annotations

import unicodedata

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # control characters, undecodable bytes, line and paragraph separators
_DIRECTIONS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reorder what follows
_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_FIRST_BYTE = 0xDC00  # of the code points by which Python holds undecodable bytes. Source: PEP 383


def written(name: str) -> str:
    r"""Returns a name in one line of valid UTF-8. Different names stay different.

    A backslash is doubled; an undecodable byte becomes `\xe9`, and a character without a shape or that would reorder
    the line `\n`, `\t` or `\u202e`.
    """
    return "".join(_written(character) for character in name)


def _written(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if _FIRST_BYTE + 0x80 <= code < _FIRST_BYTE + 0x100:
        return f"\\x{code - _FIRST_BYTE:02x}"
    if unicodedata.category(character) in _ESCAPED or character in _DIRECTIONS:
        return f"\\u{code:04x}"
    return character


def shortened(name: str, length: int = 28) -> str:
    """Returns a name as `written`, its middle left out if it is longer than `length` characters."""
    text = written(name)
    if len(text) <= length:
        return text
    head = length * 2 // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"
