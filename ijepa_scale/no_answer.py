"""Calls whose time is bounded, though what they wait for may never answer. Knows no call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class NoAnswer(Exception):  # noqa: N818 - not an error of the call: what it asked hangs
    """What was asked hasn't answered in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer in {seconds:g} s")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Returns the result of `work`, which runs in a thread of its own.

    A thread can't be ended: after `NoAnswer` it goes on waiting, with all the locks that it holds.

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

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise NoAnswer(seconds)
    return answer.result()


__all__ = ["NoAnswer", "within"]
