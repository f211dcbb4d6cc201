"""Parses and formats sizes in bytes as people write them."""

from __future__ import annotations

import re

from ijepa_scale.errors import DataError

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY_UNITS = {"kiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([a-zA-Z]+)", re.ASCII)


def parse_bytes(text: str) -> int:
    """Returns the bytes in a size such as 256MB, 1GiB or 500kB; case doesn't matter.

    Raises:
        DataError: the text isn't a size with a unit, or is less than a byte.
    """
    units = {name.lower(): count for name, count in {**_UNITS, **_BINARY_UNITS}.items()}
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        raise DataError(
            f"size {text!r} can't be read; give a number with {', '.join([*_UNITS, *_BINARY_UNITS])}, like 256MB"
        )
    size = round(float(match[1]) * units[match[2].lower()])
    if size < 1:
        raise DataError(f"size {text!r} is less than a byte; give a number above 0, like 256MB")
    return size


def format_bytes(size: float) -> str:
    """Returns a size with three or four digits and a decimal unit, like 268.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
