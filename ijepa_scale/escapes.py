"""Text in one line: characters that break or reorder a line, or that no encoding holds, as escapes. Strings only."""

from __future__ import annotations

import unicodedata

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # control characters, undecodable bytes, line and paragraph separators
_DIRECTIONS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reorder what follows
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_FIRST_BYTE = 0xDC00  # of the code points by which Python holds undecodable bytes. Source: PEP 383
_LONGEST, _HEAD, _TAIL = 1200, 700, 300  # characters of a message, and what is kept of a longer one


def escaped(character: str) -> str:
    r"""Returns the character, or its escape like `\n`, `\xe9` or `\u202e` if it would break or reorder a line."""
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if _FIRST_BYTE + 0x80 <= code < _FIRST_BYTE + 0x100:
        return f"\\x{code - _FIRST_BYTE:02x}"
    if unicodedata.category(character) in _ESCAPED or character in _DIRECTIONS:
        return f"\\u{code:04x}"
    return character


def one_line(text: str) -> str:
    """Returns the text in one line of valid UTF-8. Backslashes stay, since messages quote names with `repr`."""
    return text if text.isascii() and text.isprintable() else "".join(map(escaped, text))


def bounded(text: str) -> str:
    """Returns a message without its middle if it is very long, as when it quotes a value of a whole file."""
    left_out = len(text) - _HEAD - _TAIL
    return text if len(text) <= _LONGEST else f"{text[:_HEAD]} ...({left_out} characters)... {text[-_TAIL:]}"


__all__ = ["bounded", "escaped", "one_line"]
