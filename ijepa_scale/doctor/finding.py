"""What a check finds, and checks whose time is bounded. Knows no check."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Verdict = Literal["ok", "wrong", "not checked"]
T = TypeVar("T")

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


class NoAnswer(Exception):  # noqa: N818 - not an error of the check: what it asked hangs
    """What a check asked hasn't answered in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer in {seconds:g} s")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Returns the result of `work`, which runs in a thread of its own.

    A thread can't be ended: after `NoAnswer` it goes on waiting, so the process must end with `os._exit`.

    Raises:
        NoAnswer: it isn't there in time.
        Exception: what `work` raises.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)
            if not isinstance(error, Exception):
                raise

    thread = threading.Thread(target=run, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise NoAnswer(seconds)
    return answer.result()


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


__all__ = ["Finding", "NoAnswer", "Verdict", "checked", "size_text", "within"]
