"""JSON text to plain values: no key twice, finite numbers, and one kind of error for all that is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

LONGEST_WHOLE = 20  # characters of a whole number of 64 bits, its sign included


def parse_json(content: bytes) -> Any:
    """Returns the plain value of a JSON text in UTF-8.

    Raises:
        ValueError: it isn't JSON, a key appears twice, a number is infinite, NaN or a whole one of more than 64 bits,
            or it is nested too deeply.
    """
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_float=_number,
            parse_constant=_number,
            parse_int=_whole,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return content


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} isn't a finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > LONGEST_WHOLE or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:LONGEST_WHOLE]} doesn't fit into 64 bits")
    return int(text)
