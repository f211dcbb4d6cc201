"""Reads the files of a run's folder, and shows their values as text, for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ijepa_scale.errors import DataError
from ijepa_scale.metrics.stored_rows import is_number
from ijepa_scale.regular_file import read_regular


def shown(value: Any) -> str:
    """Returns a value of a file as the text of a cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def percent(value: Any) -> str:
    """Returns a share from 0 to 1 as a percentage, and anything else as `shown` does."""
    return f"{100 * value:.2f}%" if is_number(value) else shown(value)


def read_text(path: Path) -> str | None:
    """Returns a file's text, None if there is no such file.

    Raises:
        DataError: it can't be read.
    """
    if not path.exists():
        return None
    try:
        return read_regular(path).decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); check its permissions") from None


def read_json(path: Path) -> dict[str, Any]:
    """Returns a file's JSON object.

    Raises:
        DataError: it can't be read, or holds something else.
    """
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read as JSON ({error}); copy it again, or leave it out") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; copy it again, or leave it out")
    return content
