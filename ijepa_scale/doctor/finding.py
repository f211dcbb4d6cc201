"""What a check finds. Knows no check."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ijepa_scale.no_answer import NoAnswer

Verdict = Literal["ok", "wrong", "not checked"]

_FAILURES = (OSError, RuntimeError, ValueError, subprocess.SubprocessError)  # ValueError: every `UserError` is one


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table."""

    check: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""  # of what is wrong
    values: dict[str, Any] = field(default_factory=dict)  # for `--json`: plain values, their units in their names
    where: str = ""  # a host or a process; empty: all of them


def checked(check: str, work: Callable[[], Iterable[Finding]], *, remedy: str) -> list[Finding]:
    """Returns the findings of `work`, or the one that says why it failed, with the remedy for that."""
    try:
        return list(work())
    except (NoAnswer, *_FAILURES) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return [Finding(check=check, found=lines[0], verdict="wrong", remedy=remedy)]


def size_text(number: float) -> str:
    """Returns a number of bytes in words, such as "64 MB", in decimal units."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} bytes"


__all__ = ["Finding", "Verdict", "checked", "size_text"]
