"""Reads labels: a whole number is the same class in any spelling, anything else is a class name. Knows no files.

Within a shard, a name is stored as a number below those of 32 bits; see `TEXT_LABEL`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

NO_LABEL = -1
TEXT_LABEL = -(2**31) - 1  # stands for the first of a shard's names, TEXT_LABEL - 1 for the second, and so on
MAX_LABEL = 2**31 - 1
_LONGEST_NAME = 1000  # characters
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_QUOTES = "\"'"


def plain(text: str) -> str:
    """Returns the text without the spaces and quotes around it."""
    text = text.strip()
    while len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
        text = text[1:-1].strip()
    return text


def whole_number(text: str) -> int | None:
    """Returns the whole number that the text spells, like `1`, `01`, `1.0`, `+1` or ` "1"`; None if it spells none."""
    text = plain(text)
    if not _NUMBER.fullmatch(text):
        return None
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else None


def parse_label(data: bytes, kind: str) -> int | str | None:
    """Returns the number or name in the content of a label; None for a JSON without "label".

    `kind` is json for JSON like {"label": 3}, anything else for a number or name as UTF-8 text.

    Raises:
        ValueError: the label is neither a whole number of 32 bits nor a name of at most 1000 characters.
    """
    value: object
    if kind == "json":
        content = json.loads(data)
        value = content.get("label") if isinstance(content, dict) else None
        if value is None:
            return None
    else:
        value = data.decode("utf-8-sig")
    if isinstance(value, str):
        number = whole_number(value)
        value = plain(value) if number is None else number
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    if isinstance(value, int):
        usable = -MAX_LABEL - 1 <= value <= MAX_LABEL
    else:
        usable = 0 < len(value) <= _LONGEST_NAME and value.isprintable()
    if not usable:
        raise ValueError
    return value


def same_to_readers(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns two different names that read the same: they differ in spaces or in Unicode's way of writing accents."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", " ".join(name.split())), name)
        if other != name:
            return other, name
    return None


def differ_in_case(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns pairs of names that differ only in upper and lower case."""
    seen: dict[str, str] = {}
    pairs = [(seen.setdefault(name.casefold(), name), name) for name in names]
    return [(first, second) for first, second in pairs if first != second]


__all__ = [
    "MAX_LABEL", "NO_LABEL", "TEXT_LABEL", "differ_in_case", "parse_label", "plain", "same_to_readers", "whole_number",
]  # fmt: skip
