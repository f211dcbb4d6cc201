"""Reads labels: a whole number is the same class in any spelling, anything else is a class name. Knows no files.

Within a shard, a name is stored as a number below those of 32 bits; see `TEXT_LABEL`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal

NO_LABEL = -1
TEXT_LABEL = -(2**31) - 1  # stands for the first of a shard's names, TEXT_LABEL - 1 for the second, and so on
MAX_LABEL = 2**31 - 1
_LONGEST_NAME = 1000  # characters
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_QUOTES = "\"'"
_SHOWN = 5  # warnings
# Source: Default_Ignorable_Code_Point of Unicode's DerivedCoreProperties.txt, without those of category Cf.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


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
    """Returns the number or name in the content of a label; None for -1 and for a JSON without "label".

    `kind` is json for JSON like {"label": 3}, anything else for a number or name as UTF-8 text.

    Raises:
        ValueError: the label is neither a whole number from -1 to 2^31 - 1 nor a name of at most 1000 characters.
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
        usable = NO_LABEL <= value <= MAX_LABEL
    else:
        usable = 0 < len(value) <= _LONGEST_NAME and value.isprintable()
    if not usable:
        raise ValueError
    return None if value == NO_LABEL else value


def same_to_readers(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns two different names that read the same.

    They differ in spaces, in invisible characters, or in Unicode's way of writing accents. Show them with `ascii`.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_as_read(name), name)
        if other != name:
            return other, name
    return None


def differ_in_case(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns pairs of names that differ only in upper and lower case."""
    seen: dict[str, str] = {}
    read = [(name, _as_read(name)) for name in names]
    pairs = [(seen.setdefault(seen_as.casefold(), name), name, seen_as) for name, seen_as in read]
    return [(first, second) for first, second, seen_as in pairs if _as_read(first) != seen_as]


def class_warnings(names: Sequence[str], place: str) -> list[str]:
    """Returns warnings about classes that a person may take for one; `place` names what lists them.

    They are different classes to torchvision and here. Where the names themselves choose a class, those that read the
    same are refused instead.
    """
    found: list[str] = []
    seen: dict[str, str] = {}
    for name in names:
        read = _as_read(name)
        first = seen.get(read.casefold())
        if first is None:
            seen[read.casefold()] = name
            continue
        how = "only in case" if _as_read(first) != read else "only in spaces, invisible characters or kind of accents"
        found.append(
            f"{place} names {name!a} twice, as two classes"
            if first == name
            else f"{place} has classes {first!a} and {name!a}, which differ {how}"
        )
    more = f"; {len(found) - _SHOWN} more such pairs" if len(found) > _SHOWN else ""
    return [f"{text}; check that both are meant" for text in found[: _SHOWN - 1]] + [
        f"{text}; check that both are meant{more}" for text in found[_SHOWN - 1 : _SHOWN]
    ]


def _as_read(name: str) -> str:
    """Returns what a person sees of a name, so that names that read the same are equal."""
    seen = (c for c in name if unicodedata.category(c) != "Cf" and not _UNSEEN.match(c))
    return " ".join(unicodedata.normalize("NFC", "".join(seen)).split())


__all__ = [
    "MAX_LABEL", "NO_LABEL", "TEXT_LABEL", "class_warnings", "differ_in_case", "parse_label", "plain",
    "same_to_readers", "whole_number",
]  # fmt: skip
