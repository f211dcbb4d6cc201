"""Class names as text that tables, pictures and terminals can hold. A folder's name may hold any byte but / and NUL."""

from __future__ import annotations

from ijepa_scale.escapes import escaped


def written(name: str) -> str:
    r"""Returns a name in one line of valid UTF-8. Different names stay different.

    A backslash is doubled; an undecodable byte becomes `\xe9`, and a character without a shape or that would reorder
    the line `\n`, `\t` or `\u202e`.
    """
    return "".join("\\\\" if character == "\\" else escaped(character) for character in name)


def shortened(name: str, length: int = 28) -> str:
    """Returns a name as `written`, its middle left out if it is longer than `length` characters."""
    text = written(name)
    if len(text) <= length:
        return text
    head = length * 2 // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"
